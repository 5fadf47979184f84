// Merged weights W0 + scale * dW of every stage of a layer.
//
// dW is a stack of `batch` products up (rows, rank) * down (rank, cols), read as the weight (lead, channels, taps) in
// that order. Both forms and all layers are of this kind: a convolution or a linear layer is one product; a transposed
// convolution in the peft form has one per input channel.
#pragma once

#include <cstdint>

#include "common/hd.h"

namespace lorun::lora_merge {

struct Shape {
  int64_t stages;
  int64_t batch, rows, rank, cols;
  int64_t lead, channels, taps;

  // Values of one leading index of the weight: what one piece of work computes.
  LORUN_HD int64_t slice() const {
    return channels * taps;
  }

  LORUN_HD int64_t weight() const {
    return lead * channels * taps;
  }
};

}  // namespace lorun::lora_merge
