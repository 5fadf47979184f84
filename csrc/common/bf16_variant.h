// The kernels of a file once more, for processors with AVX-512 that round to bf16 in one instruction. After
// for_each_variant.h:
//
//   #define LORUN_KERNELS "my_op/kernels.inl"
//   #include "common/bf16_variant.h"
//   LORUN_PICK_STORING(T, variant, my_kernel<T>)(arguments);    // T: what the kernel stores
//
// No include guard: each inclusion is for another file of kernels.

#ifdef LORUN_X86
#include <immintrin.h>

#define LORUN_VARIANT avx512bf16
#define LORUN_TARGET LORUN_TARGET_AVX512_BF16
#define LORUN_VECTOR_BYTES 64
#define LORUN_REGISTERS 32
#define LORUN_ROUNDS_BF16
#include "common/lanes.inl"
#include LORUN_KERNELS
#undef LORUN_VARIANT
#undef LORUN_TARGET
#undef LORUN_VECTOR_BYTES
#undef LORUN_REGISTERS
#undef LORUN_ROUNDS_BF16

#ifndef LORUN_PICK_STORING
#define LORUN_PICK_STORING(T, variant, ...)                                      \
  [](::lorun::CpuVariant picked) {                                               \
    if constexpr (std::is_same_v<T, BFloat16>) {                                 \
      if (picked == ::lorun::CpuVariant::kAvx512 && ::lorun::rounds_to_bf16()) { \
        return &avx512bf16::__VA_ARGS__;                                         \
      }                                                                          \
    }                                                                            \
    return LORUN_PICK_FOR(picked, __VA_ARGS__);                                  \
  }(variant)
#endif
#elif !defined(LORUN_PICK_STORING)
#define LORUN_PICK_STORING(T, variant, ...) LORUN_PICK_FOR(variant, __VA_ARGS__)
#endif

#undef LORUN_KERNELS
