// 3x3 convolution with stride 1 and padding 1 from or to few channels: a network's first layer and its last.
//
//   y[p, o] = act(sum over taps t and channels c of w[o, t, c] * x[p + t, c] + bias[o]) + residual[p, o]
//
// To few channels (1 to 4), a vector holds channels of one pixel, and a sum over its lanes ends each result: V results
// (V lanes) at a time, pairs of half sums at each step, V - 1 additions of two shuffles each. From few, it holds
// channels of the result.
//
// The gradient of w for a tap and a pair of channels is a sum over pixels q of the image with many channels,
//
//   many[q, C] * few[q + t, c],
//
// many being the result's gradient and few the image from few channels; to few it is the other way round, and the taps
// turned by half.
//
// Operations a pixel: 9 C c multiply-adds, c the few; its bytes: one read of x and one write of y. At C = 16 vectors of
// 16 lanes make 9 of each, against 4 KB of memory for each 16 pixels.
#pragma once

#include <cstdint>

#include "common/tensor.h"

namespace lorun::thin_conv2d {

constexpr int64_t kFew = 4;       // channels on one side at most
constexpr int64_t kChannels = 8;  // those of the other are multiples of it
constexpr int64_t kTaps = 9;

// Whether it leads from the few channels.
inline bool check_channels(int64_t in, int64_t out) {
  const bool from = in >= 1 && in <= kFew && out % kChannels == 0, to = out >= 1 && out <= kFew && in % kChannels == 0;
  STD_TORCH_CHECK(from || to, "expected 1 to 4 channels on one side and multiples of 8 on the other, got ", in, " and ",
                  out);
  return from;
}

// Channels innermost: x (n, height, width, in), y and residual (n, height, width, out). w: to few channels (out, 3, 3,
// in), from few (3, 3, in, out). bias and residual may be null. S: what images are stored as; all else is
// Wide<S>.
template <class S>
struct Problem {
  int64_t n, height, width, in, out;
  const S* x;
  const Wide<S>*w, *bias;
  const S* residual;
  S* y;
  bool relu;
};

// few (n, height, width, fews), many (n, height, width, manys).
template <class S>
struct GradientProblem {
  int64_t height, width, fews, manys;
  const S *few, *many;
};

}  // namespace lorun::thin_conv2d
