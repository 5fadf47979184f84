// The merged weight of one layer at one stage, for ops that go on with it.
#pragma once

#include "common/tensor.h"

namespace lorun::lora_merge {

// W0 + scale * dW, dense, of `type`, channels innermost where W0's are: of a linear layer or a convolution that is
// not transposed, from factors without a stage axis.
Tensor merge_one(const Tensor& weight, const Tensor& down, const Tensor& up, double scale, ScalarType type);

}  // namespace lorun::lora_merge
