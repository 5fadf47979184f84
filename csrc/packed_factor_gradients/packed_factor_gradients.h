// The gradients of a convolution's low-rank factors, stride 1, by matrix tiles and in one pass over both images.
//
// With y = conv(x, W + up . down), up (out, rank), down (rank, in, kernel, kernel), and y's gradient G:
//
//   s = up^T G,  grad_down = the weight gradient of conv(x, down) whose result has the gradient s,
//   t = conv(x, down),  grad_up[o, i] = sum over pixels of G[o] t[i].
//
// s and t have `rank` channels instead of `out`; they live for the row that is at hand, rounded to bf16. Both sums over
// pixels are weight gradients (packed_weight_gradient.h), of `down` with x on the right, and of a 1 x 1 convolution
// with G on the right, t on the left.
//
// Bytes: G and x read once. Products: N H W rank (in kernel^2 twice, out twice), `rank` in tiles of 16.
#pragma once

#include "packed_conv2d/packed_conv2d.h"
#include "packed_weight_gradient/packed_weight_gradient.h"

namespace lorun::packed_factor_gradients {

using packed_conv2d::Filter;
using packed_conv2d::Strided;
using packed_weight_gradient::kLaidOut;
using packed_weight_gradient::Shape;

struct Problem {
  int64_t n, out, in, rank, height, width, kernel, padding;  // height, width: of x

  // The weight gradient whose result is grad_down.
  Shape down() const {
    return {n, rank, in, height, width, kernel, padding, kLaidOut / 2};
  }

  // The weight gradient whose result is grad_up, transposed.
  Shape up() const {
    return {n, rank, out, down().grad_height(), down().grad_width(), 1, 0, kLaidOut / 2};
  }
};

}  // namespace lorun::packed_factor_gradients
