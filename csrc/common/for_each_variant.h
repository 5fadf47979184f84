// Compiles a file of explicitly vectorised kernels once per instruction set.
//
//   #define LORUN_KERNELS "my_op/kernels.inl"
//   #include "common/for_each_variant.h"
//   LORUN_PICK(my_kernel<float>)(arguments);        // the best variant that this machine runs
//   LORUN_PICK_FOR(variant, my_kernel<float>)(arguments);
//
// The file defines functions marked LORUN_TARGET in namespace LORUN_VARIANT; LORUN_VECTOR_BYTES is the width,
// LORUN_REGISTERS the number of vector registers, and common/lanes.inl comes before it, once per variant. It includes
// nothing: shared declarations come before. (Vector types do not survive inlining from a function of a lesser target,
// so multiversion() of simd.h, enough for plain loops, is not enough here.) No include guard: each inclusion is for
// another file of kernels.

#include <type_traits>

#include "common/convert.h"
#include "common/simd.h"
#include "common/tensor.h"

#define LORUN_VARIANT baseline
#define LORUN_TARGET
#define LORUN_VECTOR_BYTES 16
#ifdef __aarch64__
#define LORUN_REGISTERS 32
#else
#define LORUN_REGISTERS 16
#endif
#include "common/lanes.inl"
#include LORUN_KERNELS
#undef LORUN_VARIANT
#undef LORUN_TARGET
#undef LORUN_VECTOR_BYTES
#undef LORUN_REGISTERS

#ifdef LORUN_X86
#define LORUN_VARIANT avx2
#define LORUN_TARGET LORUN_TARGET_AVX2
#define LORUN_VECTOR_BYTES 32
#define LORUN_REGISTERS 16
#include "common/lanes.inl"
#include LORUN_KERNELS
#undef LORUN_VARIANT
#undef LORUN_TARGET
#undef LORUN_VECTOR_BYTES
#undef LORUN_REGISTERS

#define LORUN_VARIANT avx512
#define LORUN_TARGET LORUN_TARGET_AVX512
#define LORUN_VECTOR_BYTES 64
#define LORUN_REGISTERS 32
#include "common/lanes.inl"
#include LORUN_KERNELS
#undef LORUN_VARIANT
#undef LORUN_TARGET
#undef LORUN_VECTOR_BYTES
#undef LORUN_REGISTERS

#ifndef LORUN_PICK_FOR
#define LORUN_PICK_FOR(variant, ...)                                \
  ((variant) == ::lorun::CpuVariant::kAvx512 ? &avx512::__VA_ARGS__ \
   : (variant) == ::lorun::CpuVariant::kAvx2 ? &avx2::__VA_ARGS__   \
                                             : &baseline::__VA_ARGS__)
#endif
#elif !defined(LORUN_PICK_FOR)
#define LORUN_PICK_FOR(variant, ...) (&baseline::__VA_ARGS__)
#endif
#ifndef LORUN_PICK
#define LORUN_PICK(...) LORUN_PICK_FOR(::lorun::active_variant(), __VA_ARGS__)
#endif

#undef LORUN_KERNELS
