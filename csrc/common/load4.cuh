#pragma once

#include "common/cuda.cuh"

namespace lorun {

// Four neighbours from a multiple of 16 bytes.
template <class W>
__device__ void load4(const W* from, W* to) {
  struct Pack {
    W at[16 / sizeof(W)];
  };
  constexpr int kCount = 16 / sizeof(W);
#pragma unroll
  for (int i = 0; i < 4; i += kCount) {
    const Pack part = load16<Pack>(from + i);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      to[i + k] = part.at[k];
    }
  }
}

}  // namespace lorun
