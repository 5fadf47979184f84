// Merged weights W0 + scale * dW of every stage of a layer.
//
// dW is a stack of `batch` products up (rows, rank) * down (rank, cols), read as the weight (lead, channels, taps) in
// that order. Both forms and all layers are of this kind: a convolution or a linear layer is one product; a transposed
// convolution in the peft form has one per input channel.
//
// The gradients of the factors from G, the weight's: scale * up^T G for down, scale * sum over the batch of G down^T
// for up.
#pragma once

#include <cstdint>

#include "common/tensor.h"

namespace lorun::lora_merge {

struct Shape {
  int64_t stages;
  int64_t batch, rows, rank, cols;
  int64_t lead, channels, taps;

  // Values of one leading index of the weight: what one piece of work computes.
  int64_t slice() const {
    return channels * taps;
  }

  int64_t weight() const {
    return lead * channels * taps;
  }

  // Values of one stage's down.
  int64_t down() const {
    return batch * rank * cols;
  }
};

// Of a weight (or its gradient) and its factors, which have a stage axis if stacked. Raises where they do not fit.
inline Shape shape_of_layer(const Tensor& weight, const Tensor& down, const Tensor& up, bool transposed, bool stacked) {
  STD_TORCH_CHECK(weight.dim() == 2 || weight.dim() == 4, "weight: expected 2 or 4 dimensions, got ", shape_of(weight));
  const int64_t lead = stacked ? 1 : 0;
  STD_TORCH_CHECK(up.dim() == 2 + lead && down.dim() >= 2 + lead && (!stacked || down.size(0) == up.size(0)),
                  "down, up: expected ", stacked ? "a common leading" : "no", " stage axis, got ", shape_of(down),
                  " and ", shape_of(up));
  Shape s{};
  s.stages = stacked ? up.size(0) : 1;
  s.lead = weight.size(0);
  s.channels = weight.size(1);
  s.taps = weight.dim() == 4 ? weight.size(2) * weight.size(3) : 1;
  s.rows = up.size(lead);
  s.rank = up.size(lead + 1);
  s.batch = transposed && down.dim() == 4 + lead ? s.lead : 1;
  const int64_t products = s.batch * s.rows;
  s.cols = products > 0 ? s.weight() / products : 0;
  STD_TORCH_CHECK(products * s.cols == s.weight() && down.numel() == s.stages * s.down(),
                  "down, up: expected factors of weight ", shape_of(weight), ", got ", shape_of(down), " and ",
                  shape_of(up));
  return s;
}

// Raises unless a stage of a layer's is asked for.
inline void check_stage(int64_t stage, const Shape& s) {
  STD_TORCH_CHECK(stage >= 0 && stage < s.stages, "stage: expected 0 to ", s.stages - 1, ", got ", stage);
}

}  // namespace lorun::lora_merge
