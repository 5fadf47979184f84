// Blur and downsample: which pixels, measurements and taps meet. Shared by the CPU and CUDA implementations.
//
//   y = A x = (k conv x)[::s, ::s], circular,   x^ = A^T y,   z = x - rho A^T (A x - y)
//
// Rows and columns are alike, so the arithmetic is that of one Axis. With h the kernel reversed and X, Y the image and
// the measurement continued periodically,
//   y[i]          = sum_e h[e] X[i*s + e],                      X[e] = x[pixel(e)]
//   x^[p*s + q]   = sum_t k[first(q) + s*t] Y[p + shift(q) + t],   Y[e] = y[measurement(e)]
// so the forward op is s*s unit-stride correlations summed, one per phase of X, and the adjoint s*s of them side by
// side, one per phase of x^.
#pragma once

#include <cstdint>

#include "common/hd.h"

namespace lorun::blur_downsample {

// I: the integers to count in.
template <class I>
struct AxisOf {
  I count;  // measurements; the image has count * scale pixels
  I scale;
  I taps;

  LORUN_HD I pixels() const {
    return count * scale;
  }

  // x's pixel at X[e]; e may lie any number of periods away.
  LORUN_HD I pixel(I e) const {
    return modulo(e - (taps - 1 - taps / 2), pixels());
  }

  // y's measurement at Y[e].
  LORUN_HD I measurement(I e) const {
    return modulo(e - taps / 2 / scale, count);
  }

  // The first tap that reaches pixels of phase q; the others follow at multiples of the scale.
  LORUN_HD I first(I q) const {
    return modulo(taps / 2 - q, scale);
  }

  // Where Y starts for pixels of phase q: 0 or 1.
  LORUN_HD I shift(I q) const {
    return taps / 2 / scale + (q - taps / 2 + first(q)) / scale;
  }

  // How many of the taps start, start + s, start + 2s, ... there are.
  LORUN_HD I steps(I start) const {
    return start < taps ? (taps - start + scale - 1) / scale : 0;
  }

  // The most steps that any start has.
  LORUN_HD I most_steps() const {
    return steps(0);
  }

  static LORUN_HD I modulo(I value, I period) {
    const I rest = value % period;
    return rest < 0 ? rest + period : rest;
  }
};

template <class I>
struct ShapeOf {
  I samples, channels;
  AxisOf<I> rows, cols;
  bool per_sample;  // a kernel for each sample

  LORUN_HD I planes() const {
    return samples * channels;
  }

  LORUN_HD I taps() const {
    return rows.taps * cols.taps;
  }

  LORUN_HD I kernel_of(I plane) const {
    return per_sample ? plane / channels : 0;
  }
};

using Axis = AxisOf<int64_t>;
using Shape = ShapeOf<int64_t>;

// The planes of an (N, C, rows, cols) tensor with any strides.
template <class T>
struct Planes {
  const T* data;
  int64_t channels, by_sample, by_channel, by_row, by_col;

  LORUN_HD const T* plane(int64_t index) const {
    return data + index / channels * by_sample + index % channels * by_channel;
  }

  LORUN_HD const T* row(int64_t index, int64_t i) const {
    return plane(index) + i * by_row;
  }
};

}  // namespace lorun::blur_downsample
