// Sums over rows of the image with many channels (formulas in thin_conv2d.h).

namespace lorun::thin_conv2d::LORUN_VARIANT {

using namespace ::lorun::LORUN_VARIANT;

template <class T>
using Vec = typename Lanes<T>::Vec;

// The rows of one of the few channels around a row, with zeros outside the image: (3, width + 2).
template <class S, class T = Wide<S>>
LORUN_TARGET inline void around(const GradientProblem<S>& p, int64_t image, int64_t row, int64_t channel, T* padded) {
  for (int64_t i = 0; i < 3; ++i, padded += p.width + 2) {
    const int64_t at = row + i - 1;
    if (at < 0 || at >= p.height) {
      std::fill_n(padded, p.width + 2, T(0));
      continue;
    }
    const S* from = p.few + (image * p.height + at) * p.width * p.fews + channel;
    padded[0] = padded[p.width + 1] = T(0);
    for (int64_t j = 0; j < p.width; ++j) {
      padded[j + 1] = widen(from[j * p.fews]);
    }
  }
}

// sums (fews, 9, manys) += those of rows [begin, end) of all images. A vector holds some of the many channels; the
// sums of all nine taps stay in registers for some pixels of a row.
template <class S, class T = Wide<S>>
LORUN_TARGET void sum_rows(const GradientProblem<S>& p, T* padded, int64_t begin, int64_t end, T* sums) {
  constexpr int64_t kPixels = 64;
  const int64_t pitch = p.width + 2;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t f = 0; f < p.fews; ++f) {
      around(p, r / p.height, r % p.height, f, padded);
      for (int64_t column = 0; column < p.width; column += kPixels) {
        const int64_t pixels = std::min(kPixels, p.width - column);
        for (int64_t c = 0; c < p.manys; c += Lanes<T>::kCount) {
          const S* many = p.many + (r * p.width + column) * p.manys + c;
          const T *above = padded + column, *beside = above + pitch, *below = beside + pitch;
          Vec<T> sum[kTaps] = {};
          for (int64_t q = 0; q < pixels; ++q) {
            const Vec<T> value = load(many + q * p.manys);
#pragma GCC unroll 3
            for (int j = 0; j < 3; ++j) {
              sum[j] += value * above[q + j];
              sum[3 + j] += value * beside[q + j];
              sum[6 + j] += value * below[q + j];
            }
          }
          T* to = sums + f * kTaps * p.manys + c;
#pragma GCC unroll 9
          for (int t = 0; t < kTaps; ++t) {
            store(to + t * p.manys, load(to + t * p.manys) + sum[t]);
          }
        }
      }
    }
  }
}

}  // namespace lorun::thin_conv2d::LORUN_VARIANT
