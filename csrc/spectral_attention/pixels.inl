// The passes over pixels (formulas in spectral_attention.h).

namespace lorun::spectral_attention::LORUN_VARIANT {

using namespace ::lorun::LORUN_VARIANT;

template <class W>
using Vec = typename Lanes<W>::Vec;

constexpr int kRows = LORUN_REGISTERS == 32 ? 8 : 4;

// c[r, :] += sum over k of a[r, k] b[k, :], kRows rows of Vecs vectors.
template <int Vecs, class W>
LORUN_TARGET LORUN_INLINE inline void tile(const W* a, int64_t a_row, int64_t a_step, const W* b, int64_t pitch,
                                           int64_t depth, W* c) {
  constexpr int64_t kCount = Lanes<W>::kCount;
  Vec<W> sum[kRows][Vecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < Vecs; ++j) {
      sum[r][j] = load(c + r * pitch + j * kCount);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<W> row[Vecs];
#pragma GCC unroll 2
    for (int j = 0; j < Vecs; ++j) {
      row[j] = load(b + k * pitch + j * kCount);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const W value = a[r * a_row + k * a_step];
#pragma GCC unroll 2
      for (int j = 0; j < Vecs; ++j) {
        sum[r][j] += value * row[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < Vecs; ++j) {
      store(c + r * pitch + j * kCount, sum[r][j]);
    }
  }
}

// c += a b for `rows` rows, a multiple of kRows, of `pitch` columns; a[r, k] lies at a[r * a_row + k * a_step].
template <class W>
LORUN_TARGET LORUN_INLINE inline void product(const W* a, int64_t a_row, int64_t a_step, const W* b, int64_t pitch,
                                              int64_t rows, int64_t depth, W* c) {
  constexpr int64_t kCount = Lanes<W>::kCount;
  for (int64_t r = 0; r < rows; r += kRows) {
    int64_t j = 0;
    for (; j + 2 * kCount <= pitch; j += 2 * kCount) {
      tile<2>(a + r * a_row, a_row, a_step, b + j, pitch, depth, c + r * pitch + j);
    }
    if (j < pitch) {
      tile<1>(a + r * a_row, a_row, a_step, b + j, pitch, depth, c + r * pitch + j);
    }
  }
}

// `rows` rows of `count` values, from one storage to the other; a row ends with a vector over what others had.
template <class From, class To>
LORUN_TARGET LORUN_INLINE inline void copy_rows(const From* from, int64_t from_pitch, int64_t rows, int64_t count,
                                                To* to, int64_t to_pitch) {
  constexpr int64_t kCount = Lanes<Wide<To>>::kCount;
  for (int64_t r = 0; r < rows; ++r, from += from_pitch, to += to_pitch) {
    if (count < kCount) {
      for (int64_t i = 0; i < count; ++i) {
        to[i] = narrow<To>(widen(from[i]));
      }
      continue;
    }
    for (int64_t i = 0; i < count - kCount; i += kCount) {
      store(to + i, narrowed<To>(load(from + i)));
    }
    store(to + count - kCount, narrowed<To>(load(from + count - kCount)));
  }
}

// Pixels among the kPixels that follow those from p on, a part for each head: what they hold is fetched beside its
// work.
struct Next {
  int64_t begin, end;

  Next(const Shape& s, int64_t p, int64_t end_of_all, int64_t head) {
    const int64_t count = std::max<int64_t>(std::min(end_of_all - p - kPixels, kPixels), 0);
    begin = p + kPixels + count * head / s.heads;
    end = p + kPixels + count * (head + 1) / s.heads;
  }
};

// Asks for `values` values of these rows, for 1 to be written: their pieces are too short for the processor to see them
// coming.
template <int Write, class T>
LORUN_TARGET LORUN_INLINE inline void fetch(const Next& next, const T* rows, int64_t pitch, int64_t values) {
  for (int64_t r = next.begin; r < next.end; ++r) {
    const char* at = reinterpret_cast<const char*>(rows + r * pitch);
    for (int64_t i = 0; i < values * static_cast<int64_t>(sizeof(T)) + 63; i += 64) {
      __builtin_prefetch(at + i, Write, 2);
    }
  }
}

// squares += the squares of a head's channels, over pixels.
template <class W>
LORUN_TARGET LORUN_INLINE inline void add_squares(const W* head, int64_t pitch, int64_t pixels, W* squares) {
  for (int64_t i = 0; i < pitch; i += Lanes<W>::kCount) {
    Vec<W> sum{};
    for (int64_t p = 0; p < pixels; ++p) {
      const Vec<W> value = load(head + p * pitch + i);
      sum += value * value;
    }
    store(squares + i, load(squares + i) + sum);
  }
}

// Sums over pixels [begin, end) of a sample, heads one after another; with its gradient, those of the backward pass.
template <class T>
LORUN_TARGET void sum_pixels(const Shape& s, const T* qkv, const T* grad, int64_t begin, int64_t end, Wide<T>* space,
                             Wide<T>* sums) {
  using W = Wide<T>;
  const int64_t pitch = s.pitch(), channels = s.channels(), rows = (s.d + kRows - 1) / kRows * kRows;
  const Sums at{pitch, grad != nullptr};
  W *left = space, *right = left + kPixels * pitch;
  std::fill_n(space, 2 * kPixels * pitch, W(0));
  std::fill_n(sums, s.heads * at.values(), W(0));
  for (int64_t p = begin; p < end; p += kPixels) {
    const int64_t pixels = std::min(kPixels, end - p);
    for (int64_t head = 0; head < s.heads; ++head) {
      const T* q = qkv + p * s.width() + head * s.d;
      const Next next(s, p, end, head);
      fetch<0>(next, qkv, s.width(), (grad ? 3 : 2) * channels);
      if (grad) {
        fetch<0>(next, grad, s.out_width(), channels);
      }
      W* to = sums + head * at.values();
      copy_rows(q, s.width(), pixels, s.d, left, pitch);
      copy_rows(q + channels, s.width(), pixels, s.d, right, pitch);
      add_squares(left, pitch, pixels, to + at.of_q());
      add_squares(right, pitch, pixels, to + at.of_k());
      product(left, 1, pitch, right, pitch, rows, pixels, to);
      if (grad) {
        copy_rows(grad + p * s.out_width() + head * s.d, s.out_width(), pixels, s.d, left, pitch);
        copy_rows(q + 2 * channels, s.width(), pixels, s.d, right, pitch);
        product(left, 1, pitch, right, pitch, rows, pixels, to + s.matrix());
      }
    }
  }
}

// `values` where x is positive, else zero; NaN of x lets them pass.
template <class T>
LORUN_TARGET LORUN_INLINE inline void pass_positive(const T* x, const T* values, int64_t count, T* y) {
  using W = Wide<T>;
  constexpr int64_t kCount = Lanes<W>::kCount;
  if (count < kCount) {
    for (int64_t i = 0; i < count; ++i) {
      y[i] = widen(x[i]) <= W(0) ? narrow<T>(W(0)) : values[i];
    }
    return;
  }
  for (int64_t i = 0; i < count; i += kCount) {
    const int64_t at = std::min(i, count - kCount);  // the last over values that others had
    store(y + at, narrowed<T>(load(x + at) <= W(0) ? Vec<W>{} : load(values + at)));
  }
}

// y of pixels [begin, end) of a sample. mix: of each head A transposed, (j, i).
template <class T>
LORUN_TARGET void mix_pixels(const Shape& s, const T* qkv, const Wide<T>* mix, int64_t begin, int64_t end,
                             Wide<T>* space, T* y) {
  using W = Wide<T>;
  const int64_t pitch = s.pitch(), channels = s.channels(), width = s.width(), out = s.out_width();
  W *v = space, *mixed = v + kPixels * pitch;
  std::fill_n(v, kPixels * pitch, W(0));
  for (int64_t p = begin; p < end; p += kPixels) {
    const int64_t pixels = std::min(kPixels, end - p), rows = (pixels + kRows - 1) / kRows * kRows;
    for (int64_t head = 0; head < s.heads; ++head) {
      const Next next(s, p, end, head);
      fetch<0>(next, qkv + 2 * channels, width, channels + s.hidden);
      fetch<1>(next, y, out, out);
      copy_rows(qkv + p * width + 2 * channels + head * s.d, width, pixels, s.d, v, pitch);
      std::fill_n(mixed, rows * pitch, W(0));
      product(v, pitch, 1, mix + head * s.matrix(), pitch, rows, s.d, mixed);
      copy_rows(mixed, pitch, pixels, s.d, y + p * out + head * s.d, out);
    }
    for (int64_t i = p; i < p + pixels && s.hidden; ++i) {
      const T* h = qkv + i * width + 3 * channels;
      pass_positive(h, h, s.hidden, y + i * out + channels);
    }
  }
}

// The gradients of pixels [begin, end) of a sample. mix: of each head what makes dq of k, dk of q and dv of g, then the
// factors of q in dq and of k in dk.
template <class T>
LORUN_TARGET void mix_gradients(const Shape& s, const T* qkv, const T* grad, const Wide<T>* mix, int64_t begin,
                                int64_t end, Wide<T>* space, T* to) {
  using W = Wide<T>;
  constexpr int64_t kCount = Lanes<W>::kCount;
  const int64_t pitch = s.pitch(), channels = s.channels(), width = s.width(), out = s.out_width();
  const int64_t tile_values = kPixels * pitch;
  W *q = space, *k = q + tile_values, *g = k + tile_values, *mixed = g + tile_values;
  std::fill_n(space, 3 * tile_values, W(0));
  for (int64_t p = begin; p < end; p += kPixels) {
    const int64_t pixels = std::min(kPixels, end - p), rows = (pixels + kRows - 1) / kRows * kRows;
    for (int64_t head = 0; head < s.heads; ++head) {
      const Next next(s, p, end, head);
      fetch<0>(next, qkv, width, width);
      fetch<0>(next, grad, out, out);
      fetch<1>(next, to, width, width);
      const T* from = qkv + p * width + head * s.d;
      copy_rows(from, width, pixels, s.d, q, pitch);
      copy_rows(from + channels, width, pixels, s.d, k, pitch);
      copy_rows(grad + p * out + head * s.d, out, pixels, s.d, g, pitch);
      const W* matrices = mix + head * (3 * s.matrix() + 2 * pitch);
      const W* factors = matrices + 3 * s.matrix();
      const W *lefts[] = {k, q, g}, *along[] = {q, k, nullptr};
      for (int i = 0; i < 3; ++i) {
        for (int64_t j = 0; j < pitch; j += kCount) {
          const Vec<W> factor = i < 2 ? load(factors + i * pitch + j) : Vec<W>{};
          for (int64_t at = j; at < rows * pitch; at += pitch) {
            store(mixed + at, i < 2 ? load(along[i] + at) * factor : Vec<W>{});
          }
        }
        product(lefts[i], pitch, 1, matrices + i * s.matrix(), pitch, rows, s.d, mixed);
        copy_rows(mixed, pitch, pixels, s.d, to + p * width + i * channels + head * s.d, width);
      }
    }
    for (int64_t i = p; i < p + pixels && s.hidden; ++i) {
      pass_positive(qkv + i * width + 3 * channels, grad + i * out + channels, s.hidden, to + i * width + 3 * channels);
    }
  }
}

}  // namespace lorun::spectral_attention::LORUN_VARIANT
