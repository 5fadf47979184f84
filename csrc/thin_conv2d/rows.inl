// Rows of the result, some pixels at a time (formulas in thin_conv2d.h).

namespace lorun::thin_conv2d::LORUN_VARIANT {

using namespace ::lorun::LORUN_VARIANT;

template <class T>
using Vec = typename Lanes<T>::Vec;

// Three rows of the image around `pixels` results, from the column before them on.
template <class S>
struct Around {
  const S* rows[3];
};

// Those around the results from (row, column) on; a copy with zeros outside the image where they leave it.
template <class S>
LORUN_TARGET LORUN_INLINE inline Around<S> around(const Problem<S>& p, int64_t image, int64_t row, int64_t column,
                                                  int64_t pixels, S* padded) {
  const S* x = p.x + image * p.height * p.width * p.in;
  const int64_t left = column - 1, span = pixels + 2, pitch = p.width * p.in;
  if (row > 0 && row + 1 < p.height && left >= 0 && left + span <= p.width) {
    const S* first = x + ((row - 1) * p.width + left) * p.in;
    return {{first, first + pitch, first + 2 * pitch}};
  }
  std::fill_n(padded, 3 * span * p.in, S(0));
  const int64_t first = std::max<int64_t>(left, 0), stop = std::min(left + span, p.width);
  for (int64_t i = std::max<int64_t>(row - 1, 0); i < std::min(row + 2, p.height); ++i) {
    std::copy_n(x + (i * p.width + first) * p.in, (stop - first) * p.in,
                padded + ((i - row + 1) * span + first - left) * p.in);
  }
  return {{padded, padded + span * p.in, padded + 2 * span * p.in}};
}

// Lanes of a and of b, those of b counted on from those of a.
template <class T, class Index, Index... kAt>
LORUN_TARGET LORUN_INLINE inline Vec<T> chosen(Vec<T> a, Vec<T> b, std::integer_sequence<Index, kAt...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kAt...);
#else
  return __builtin_shuffle(a, b, typename Lanes<T>::Bits{kAt...});
#endif
}

// Of two vectors' lanes, which belong to sums in groups of `Group`, the first or the second half of every group.
template <int Group, int Half, class Index, Index... kLane>
constexpr auto half_of_groups(std::integer_sequence<Index, kLane...>) {
  constexpr Index kPart = Group / 2;
  return std::integer_sequence<Index, (kLane / kPart * Group + Half * kPart + kLane % kPart)...>{};
}

// The sums over the lanes of as many vectors as have room in one, `Group` lanes of it each; 1 in the end.
template <class T, int Group>
LORUN_TARGET LORUN_INLINE inline Vec<T> lane_sums(const Vec<T>* v) {
  constexpr int kCount = Lanes<T>::kCount;
  if constexpr (Group == kCount) {
    return v[0];
  } else {
    using Lane = std::make_integer_sequence<typename Lanes<T>::Bit, kCount>;
    const Vec<T> a = lane_sums<T, 2 * Group>(v), b = lane_sums<T, 2 * Group>(v + kCount / (2 * Group));
    return chosen<T>(a, b, half_of_groups<2 * Group, 0>(Lane{})) +
           chosen<T>(a, b, half_of_groups<2 * Group, 1>(Lane{}));
  }
}

// Rows [begin, end) of all images, to Out channels.
template <class S, int Out>
LORUN_TARGET void to_few(const Problem<S>& p, S* padded, int64_t begin, int64_t end) {
  using T = Wide<S>;
  constexpr int kCount = Lanes<T>::kCount, kPixels = std::max(kCount / Out, 1), kSums = kPixels * Out;
  constexpr int kVecs = (kSums + kCount - 1) / kCount;
  T bias[kVecs * kCount] = {}, found[kVecs * kCount];
  for (int i = 0; p.bias && i < kSums; ++i) {
    bias[i] = p.bias[i % Out];
  }
  for (int64_t r = begin; r < end; ++r) {
    const int64_t image = r / p.height, row = r % p.height;
    for (int64_t column = 0; column < p.width; column += kPixels) {
      const Around<S> x = around(p, image, row, column, kPixels, padded);
      Vec<T> sum[kVecs * kCount] = {};
      for (int64_t c = 0; c < p.in; c += kCount) {
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          Vec<T> w[3][Out];
#pragma GCC unroll 3
          for (int j = 0; j < 3; ++j) {
#pragma GCC unroll 4
            for (int o = 0; o < Out; ++o) {
              w[j][o] = load(p.w + ((o * 3 + i) * 3 + j) * p.in + c);
            }
          }
#pragma GCC unroll 18
          for (int q = 0; q < kPixels + 2; ++q) {
            const Vec<T> value = load(x.rows[i] + q * p.in + c);
#pragma GCC unroll 3
            for (int j = 0; j < 3; ++j) {
              if (q >= j && q - j < kPixels) {
#pragma GCC unroll 4
                for (int o = 0; o < Out; ++o) {
                  sum[(q - j) * Out + o] += value * w[j][o];
                }
              }
            }
          }
        }
      }
#pragma GCC unroll 2
      for (int i = 0; i < kVecs; ++i) {
        Vec<T> y = lane_sums<T, 1>(sum + i * kCount) + load(bias + i * kCount);
        if (p.relu) {
          y = y < T(0) ? Vec<T>{} : y;  // NaN stays
        }
        store(found + i * kCount, y);
      }
      const int64_t at = (r * p.width + column) * Out;
      const int64_t values = std::min<int64_t>(kPixels, p.width - column) * Out;
      for (int64_t i = 0; i < values; ++i) {
        p.y[at + i] = narrow<S>(p.residual ? found[i] + widen(p.residual[at + i]) : found[i]);
      }
    }
  }
}

constexpr int kPixelsFromFew = 8;

// The same from few channels: the results of kPixelsFromFew pixels of a row from `at` on, of which `pixels` are stored;
// rows: those around them, from the column before the first.
template <class S>
LORUN_TARGET LORUN_INLINE inline void from_few(const Problem<S>& p, const Wide<S>* const (&rows)[3], int64_t at,
                                               int64_t pixels) {
  using T = Wide<S>;
  for (int64_t o = 0; o < p.out; o += Lanes<T>::kCount) {
    Vec<T> sum[kPixelsFromFew] = {};
    for (int i = 0; i < 3; ++i) {
      for (int64_t k = 0; k < 3 * p.in; ++k) {
        const Vec<T> w = load(p.w + (i * 3 * p.in + k) * p.out + o);
#pragma GCC unroll 8
        for (int q = 0; q < kPixelsFromFew; ++q) {
          sum[q] += rows[i][q * p.in + k] * w;
        }
      }
    }
    const Vec<T> bias = p.bias ? load(p.bias + o) : Vec<T>{};
#pragma GCC unroll 8
    for (int q = 0; q < kPixelsFromFew; ++q) {
      if (q >= pixels) {
        break;
      }
      const int64_t to = (at + q) * p.out + o;
      Vec<T> y = sum[q] + bias;
      if (p.relu) {
        y = y < T(0) ? Vec<T>{} : y;  // NaN stays
      }
      if (p.residual) {
        y += load(p.residual + to);
      }
      store(p.y + to, narrowed<S>(y));
    }
  }
}

template <class S>
LORUN_TARGET void rows_from_few(const Problem<S>& p, S* padded, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t image = r / p.height, row = r % p.height;
    for (int64_t column = 0; column < p.width; column += kPixelsFromFew) {
      const Around<S> x = around(p, image, row, column, kPixelsFromFew, padded);
      from_few(p, x.rows, r * p.width + column, std::min<int64_t>(kPixelsFromFew, p.width - column));
    }
  }
}

// Of images in 16 bits: panels of columns, whose rows are widened once, with the zeros around the image, and stay for
// the three rows of results that need them.
template <class S>
LORUN_TARGET void panels_from_few(const Problem<S>& p, S*, int64_t begin, int64_t end) {
  using T = Wide<S>;
  constexpr int64_t kPanel = 256;
  T widened[3][(kPanel + kPixelsFromFew + 2) * kFew];
  const auto slot = [&](int64_t row) { return widened[(row + 3) % 3]; };
  for (int64_t panel = 0; panel < p.width; panel += kPanel) {
    const int64_t stop = std::min(panel + kPanel, p.width), read = std::max<int64_t>(panel - 1, 0);
    const int64_t before = (panel == 0) * p.in, count = (std::min(stop + 1, p.width) - read) * p.in;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t image = r / p.height, row = r % p.height;
      for (int64_t k = r == begin || row == 0 ? row - 1 : row + 1; k <= row + 1; ++k) {
        T* to = slot(k);
        std::fill_n(to, (stop - panel + kPixelsFromFew + 2) * p.in, T(0));
        if (k >= 0 && k < p.height) {
          const S* from = p.x + ((image * p.height + k) * p.width + read) * p.in;
          for (int64_t i = 0; i < count; ++i) {
            to[before + i] = widen(from[i]);
          }
        }
      }
      for (int64_t column = panel; column < stop; column += kPixelsFromFew) {
        const int64_t at = (column - panel) * p.in;
        const T* const rows[] = {slot(row - 1) + at, slot(row) + at, slot(row + 1) + at};
        from_few(p, rows, r * p.width + column, std::min<int64_t>(kPixelsFromFew, stop - column));
      }
    }
  }
}

}  // namespace lorun::thin_conv2d::LORUN_VARIANT
