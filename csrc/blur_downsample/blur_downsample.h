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

struct Axis {
  int64_t count;  // measurements; the image has count * scale pixels
  int64_t scale;
  int64_t taps;

  LORUN_HD int64_t pixels() const {
    return count * scale;
  }

  // x's pixel at X[e]; e may lie any number of periods away.
  LORUN_HD int64_t pixel(int64_t e) const {
    return modulo(e - (taps - 1 - taps / 2), pixels());
  }

  // y's measurement at Y[e].
  LORUN_HD int64_t measurement(int64_t e) const {
    return modulo(e - taps / 2 / scale, count);
  }

  // The first tap that reaches pixels of phase q; the others follow at multiples of the scale.
  LORUN_HD int64_t first(int64_t q) const {
    return modulo(taps / 2 - q, scale);
  }

  // Where Y starts for pixels of phase q: 0 or 1.
  LORUN_HD int64_t shift(int64_t q) const {
    return taps / 2 / scale + (q - taps / 2 + first(q)) / scale;
  }

  // How many of the taps start, start + s, start + 2s, ... there are.
  LORUN_HD int64_t steps(int64_t start) const {
    return start < taps ? (taps - start + scale - 1) / scale : 0;
  }

  // The most steps that any start has.
  LORUN_HD int64_t most_steps() const {
    return steps(0);
  }

  static LORUN_HD int64_t modulo(int64_t value, int64_t period) {
    const int64_t rest = value % period;
    return rest < 0 ? rest + period : rest;
  }
};

struct Shape {
  int64_t samples, channels;
  Axis rows, cols;
  bool per_sample;  // a kernel for each sample

  LORUN_HD int64_t planes() const {
    return samples * channels;
  }

  LORUN_HD int64_t taps() const {
    return rows.taps * cols.taps;
  }

  LORUN_HD int64_t kernel_of(int64_t plane) const {
    return per_sample ? plane / channels : 0;
  }
};

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
