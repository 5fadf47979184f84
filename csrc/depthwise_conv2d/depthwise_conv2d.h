// Depthwise 3x3 convolution with stride 1 and padding 1: each channel with a kernel of its own.
//
//   y[p, c]  = sum over taps t of w[t, c] * x[p + t, c] + bias[c]
//   dx[p, c] = sum over taps t of w[-t, c] * dy[p + t, c]
//   dw[t, c] = sum over pixels p of dy[p - t, c] * x[p, c],   dbias[c] = sum over p of dy[p, c]
//
// 9 multiply-adds for a value that is read once and written once: as much work for the arithmetic as for the memory. So
// each value is loaded once or twice, and what comes next is fetched meanwhile. An image is cut into panels of columns,
// a panel into bands of four rows, so that the rows around a band, those of its results and the same of the next band
// fit the second-level cache. In a band a vector of channels walks along the columns with its taps in registers: it
// loads the six values of a column, and adds them to three sums a row, the results to the left, here and to the right.
// dx is y's loop with the taps reversed; dw's takes the same rows of dy right after it, from the cache.
//
// Sums of a result are in the order of the columns, whatever the panels and bands. Those of dw and dbias are of parts
// of the bands, which are added in order, whatever the number of threads. Where the processor rounds to bf16 itself,
// results below 2^-126 are zero.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/tensor.h"

namespace lorun::depthwise_conv2d {

constexpr int64_t kTaps = 9;
constexpr int64_t kSums = kTaps + 1;  // of the gradients of a channel's taps and its bias
constexpr int64_t kRows = 4;          // of a band

// Images (n, height, width, channels) in bands; those of a panel follow one another.
struct Bands {
  int64_t n, height, width, channels, columns;

  int64_t rows() const {
    return (height + kRows - 1) / kRows;
  }

  int64_t panels() const {
    return (width + columns - 1) / columns;
  }

  int64_t count() const {
    return n * panels() * rows();
  }
};

// Rows [top, bottom) and columns [left, right) of an image.
struct Band {
  int64_t image, top, bottom, left, right;

  Band(const Bands& b, int64_t i) {
    const int64_t panel = i / b.rows() % b.panels();
    image = i / b.rows() / b.panels();
    top = i % b.rows() * kRows;
    bottom = std::min(top + kRows, b.height);
    left = panel * b.columns;
    right = std::min(left + b.columns, b.width);
  }
};

// y from x; or dx, then x is dy and the taps are reversed. taps: (9, channels). bias may be null.
template <class T>
struct Problem {
  Bands bands;
  const T* x;
  const Wide<T>*taps, *bias;
  T* y;
};

// dw and dbias.
template <class T>
struct GradientProblem {
  Bands bands;
  const T *grad, *x;
};

}  // namespace lorun::depthwise_conv2d
