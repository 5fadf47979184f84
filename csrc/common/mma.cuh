// Tensor-core products, summed in fp32: one instruction of a warp. bf16 numbers (PTX's mma.m16n8k16): lane 4 g + t
// holds, two to a register and the first in the lower half,
//   of A  rows g, g + 8, g, g + 8 at depths 2t, 2t + 1 (the first two registers) and 2t + 8, 2t + 9;
//   of B  column g at the same depths;
//   of the sums  row g at columns 2t, 2t + 1, and row g + 8.
// tests/cuda_on_cpu/ holds its counterpart.
#pragma once

#include <cstdint>

namespace lorun {

// Rounded to nearest.
__device__ inline uint32_t pack_bf16(float first, float second) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
  return out;
}

__device__ inline void mma_bf16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same of tf32 numbers, the upper 19 bits of fp32 ones (mma.m16n8k8), one to a register: lane 4 g + t holds of A
// rows g and g + 8 at depth t, then these at depth t + 4, of B column g at both depths, and sums as above.
__device__ inline void mma_tf32(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace lorun
