// Bands, one vector of channels after the other (formulas in depthwise_conv2d.h).

namespace lorun::depthwise_conv2d::LORUN_VARIANT {

using namespace ::lorun::LORUN_VARIANT;

template <class T>
constexpr int64_t kCount = Lanes<Wide<T>>::kCount;

// V: a vector of channels, or one alone.
template <class T, class V>
constexpr int64_t kLanes = sizeof(V) / sizeof(Wide<T>);

template <class V, class T>
LORUN_TARGET LORUN_INLINE inline V get(const T* at) {
  if constexpr (kLanes<T, V> == 1) {
    return widen(*at);
#if LORUN_VECTOR_BYTES == 64
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    // One instruction, where load() takes two.
    using L = Lanes<float>;
    const typename L::Short zeros = {}, v = *reinterpret_cast<const typename L::LooseShort*>(at);
    return reinterpret_cast<V>(__builtin_shufflevector(zeros, v, 0, 16, 0, 17, 0, 18, 0, 19, 0, 20, 0, 21, 0, 22, 0, 23,
                                                       0, 24, 0, 25, 0, 26, 0, 27, 0, 28, 0, 29, 0, 30, 0, 31));
#endif
  } else {
    return load(at);
  }
}

template <class T, class V>
LORUN_TARGET LORUN_INLINE inline void put(T* at, V v) {
  if constexpr (kLanes<T, V> == 1) {
    *at = narrow<T>(v);
  } else {
    store(at, narrowed<T>(v));
  }
}

#if LORUN_VECTOR_BYTES == 64 && !defined(LORUN_ROUNDS_BF16)

// To bf16, in the upper halves, as narrow() of convert.h rounds; the sums' NaNs come from bf16 and stay what they are.
template <class V>
LORUN_TARGET LORUN_INLINE inline V rounded(V v) {
  const auto bits = reinterpret_cast<Lanes<float>::Bits>(v);
  return reinterpret_cast<V>(bits + 0x7fffu + ((bits >> 16) & 1u));
}

#endif

// In a column of some rows.
template <class T, class V, int kHere>
LORUN_TARGET LORUN_INLINE inline void put_column(T* at, int64_t row, const V (&v)[kHere]) {
#if LORUN_VECTOR_BYTES == 64 && !defined(LORUN_ROUNDS_BF16)
  if constexpr (std::is_same_v<T, BFloat16> && kLanes<T, V> > 1 && kHere % 2 == 0) {
    // Two rows share the shuffle that takes the upper halves.
#pragma GCC unroll 2
    for (int r = 0; r < kHere; r += 2) {
      using Words = uint16_t __attribute__((vector_size(64)));
      const auto a = reinterpret_cast<Words>(rounded(v[r])), b = reinterpret_cast<Words>(rounded(v[r + 1]));
      const Words both = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33,
                                                 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63);
      store(at + r * row, __builtin_shufflevector(both, both, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
      store(at + (r + 1) * row,
            __builtin_shufflevector(both, both, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31));
    }
    return;
  }
#endif
#pragma GCC unroll 4
  for (int r = 0; r < kHere; ++r) {
    put(at + r * row, v[r]);
  }
}

template <class T>
constexpr T kZeros[kCount<T>] = {};

// Some rows of an image, column by column, with the row above and the row below: zeros where the image has none.
template <class T, class V, int kHere>
class Around {
 public:
  LORUN_TARGET LORUN_INLINE inline Around(const Bands& b, const T* image, int64_t top, int64_t column)
      : rows_(image + (top * b.width + column) * b.channels), pitch_(b.channels), row_(b.width * b.channels) {
    const bool first = top == 0, last = top + kHere == b.height;
    above_ = first ? kZeros<T> : rows_ - row_;
    below_ = last ? kZeros<T> : rows_ + kHere * row_;
    above_pitch_ = first ? 0 : pitch_;
    below_pitch_ = last ? 0 : pitch_;
  }

  LORUN_TARGET LORUN_INLINE inline void next(V (&v)[kHere + 2]) {
    v[0] = get<V>(above_);
#pragma GCC unroll 4
    for (int i = 0; i < kHere; ++i) {
      v[i + 1] = get<V>(rows_ + i * row_);
    }
    v[kHere + 1] = get<V>(below_);
    above_ += above_pitch_;
    rows_ += pitch_;
    below_ += below_pitch_;
  }

 private:
  const T *above_, *rows_, *below_;
  int64_t above_pitch_, below_pitch_, pitch_, row_;
};

// Rows that the next band reads, or writes: fetched to the second-level cache from end to end, a vector of each at
// every step of this band's vectors.
template <class T, class V, int kHere, bool kWrites = false>
class Later {
 public:
  LORUN_TARGET LORUN_INLINE inline Later(const Bands& b, const T* image, int64_t top, int64_t column, int64_t columns,
                                         int64_t c)
      : at_(image + (top * b.width + column) * b.channels + columns * c), row_(b.width * b.channels) {}

  LORUN_TARGET LORUN_INLINE inline void next() {
#pragma GCC unroll 4
    for (int i = 0; i < kHere; ++i) {
      __builtin_prefetch(at_ + i * row_, kWrites, 2);
    }
    at_ += kLanes<T, V>;
  }

 private:
  const T* at_;
  int64_t row_;
};

// c: the first of the channels.
template <class T, class V, int kHere>
LORUN_TARGET LORUN_INLINE inline void convolve_rows(const Problem<T>& p, const Band& at, int64_t top, int64_t c,
                                                    const V (&w)[kTaps], V bias) {
  const Bands& b = p.bands;
  const int64_t row = b.width * b.channels, image = at.image * b.height * row;
  const int64_t from = std::max<int64_t>(at.left - 1, 0), to = std::min(at.right + 1, b.width);
  Around<T, V, kHere> x(b, p.x + image + c, top, from);
  Later<T, V, kHere> read(b, p.x + image, top + kRows + 1, from, to - from, c);
  Later<T, V, kHere, true> written(b, p.y + image, top + kRows, from, to - from, c);
  T* y = p.y + image + (top * b.width + from - 1) * b.channels + c;
  V left[kHere], here[kHere];
#pragma GCC unroll 4
  for (int r = 0; r < kHere; ++r) {
    left[r] = here[r] = bias;
  }
  for (int64_t column = from; column < to; ++column, y += b.channels) {
    V v[kHere + 2], right[kHere];
    x.next(v);
    read.next();
    written.next();
#pragma GCC unroll 4
    for (int r = 0; r < kHere; ++r) {
      right[r] = bias;
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        left[r] += v[r + i] * w[3 * i + 2];
        here[r] += v[r + i] * w[3 * i + 1];
        right[r] += v[r + i] * w[3 * i];
      }
    }
    if (column > at.left) {
      put_column(y, row, left);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kHere; ++r) {
      left[r] = here[r];
      here[r] = right[r];
    }
  }
  if (at.right == b.width) {
    put_column(y, row, left);
  }
}

template <class V, class T>
LORUN_TARGET LORUN_INLINE inline void convolve(const Problem<T>& p, const Band& at, int64_t c) {
  V w[kTaps];
#pragma GCC unroll 9
  for (int t = 0; t < kTaps; ++t) {
    w[t] = get<V>(p.taps + t * p.bands.channels + c);
  }
  const V bias = p.bias ? get<V>(p.bias + c) : V{};
  if (at.bottom - at.top == kRows) {
    convolve_rows<T, V, kRows>(p, at, at.top, c, w, bias);
  } else {
    for (int64_t top = at.top; top < at.bottom; ++top) {
      convolve_rows<T, V, 1>(p, at, top, c, w, bias);
    }
  }
}

template <class T, class V, int kHere>
LORUN_TARGET LORUN_INLINE inline void sum_rows(const GradientProblem<T>& p, const Band& at, int64_t top, int64_t c,
                                               V (&sums)[kSums]) {
  const Bands& b = p.bands;
  const int64_t row = b.width * b.channels, image = at.image * b.height * row;
  Around<T, V, kHere> grad(b, p.grad + image + c, top, std::max<int64_t>(at.left - 1, 0));
  Later<T, V, kHere> read(b, p.x + image, top + kRows, at.left, at.right - at.left, c);
  V g[3][kHere + 2] = {};  // the columns to the left, here and to the right
  if (at.left > 0) {
    grad.next(g[0]);
  }
  grad.next(g[1]);
  const T* x = p.x + image + (top * b.width + at.left) * b.channels + c;
  for (int64_t column = at.left; column < at.right; ++column, x += b.channels) {
    if (column + 1 < b.width) {
      grad.next(g[2]);
    } else {
      std::fill_n(g[2], kHere + 2, V{});
    }
    read.next();
#pragma GCC unroll 4
    for (int r = 0; r < kHere; ++r) {
      const V value = get<V>(x + r * row);
#pragma GCC unroll 9
      for (int t = 0; t < kTaps; ++t) {
        sums[t] += value * g[2 - t % 3][r + 2 - t / 3];
      }
      sums[kTaps] += g[1][r + 1];
    }
#pragma GCC unroll 6
    for (int i = 0; i < kHere + 2; ++i) {
      g[0][i] = g[1][i];
      g[1][i] = g[2][i];
    }
  }
}

// Adds a band's to those of its part, (10, lanes).
template <class V, class T>
LORUN_TARGET LORUN_INLINE inline void sum(const GradientProblem<T>& p, const Band& at, int64_t c, Wide<T>* part) {
  V sums[kSums];
#pragma GCC unroll 10
  for (int t = 0; t < kSums; ++t) {
    sums[t] = get<V>(part + t * kLanes<T, V>);
  }
  if (at.bottom - at.top == kRows) {
    sum_rows<T, V, kRows>(p, at, at.top, c, sums);
  } else {
    for (int64_t top = at.top; top < at.bottom; ++top) {
      sum_rows<T, V, 1>(p, at, top, c, sums);
    }
  }
#pragma GCC unroll 10
  for (int t = 0; t < kSums; ++t) {
    put(part + t * kLanes<T, V>, sums[t]);
  }
}

template <class V, class T>
LORUN_TARGET LORUN_INLINE inline void run_band(const Bands& b, const Problem<T>* p, const GradientProblem<T>* g,
                                               const Band& at, Wide<T>* part) {
  constexpr int64_t kStep = kLanes<T, V>;
  for (int64_t i = 0; i < b.channels; i += kStep) {
    const int64_t c = std::min(i, b.channels - kStep);  // the last vector's first channels may be the one's before
    if (p != nullptr) {
      convolve<V>(*p, at, c);
    }
    if (g != nullptr) {
      sum<V>(*g, at, c, part + kSums * i);
    }
  }
}

// Bands [begin, end), of one problem or both. part: the gradient's sums, (vectors, 10, lanes_of(channels)).
template <class T>
LORUN_TARGET void run_bands(const Bands& b, const Problem<T>* p, const GradientProblem<T>* g, int64_t begin,
                            int64_t end, Wide<T>* part) {
  for (int64_t i = begin; i < end; ++i) {
    const Band at(b, i);
    if (b.channels < kCount<T>) {
      run_band<Wide<T>>(b, p, g, at, part);
    } else {
      run_band<typename Lanes<Wide<T>>::Vec>(b, p, g, at, part);
    }
  }
}

template <class T>
int64_t lanes_of(int64_t channels) {
  return channels < kCount<T> ? 1 : kCount<T>;
}

}  // namespace lorun::depthwise_conv2d::LORUN_VARIANT
