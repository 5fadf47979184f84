// One binary for many CPUs: a loop is compiled for several instruction sets, and the machine picks at run time.
//
//   multiversion([&](auto width) LORUN_INLINE { for (...) ...; });
//
// The body, and every function that it calls, must be LORUN_INLINE: a call that is not inlined is compiled for
// the baseline only. `width` is the variant's vector width in bytes as an integral constant.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#define LORUN_INLINE __attribute__((always_inline))

#if defined(__x86_64__)
#define LORUN_X86 1
#define LORUN_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#if defined(__clang__)
#define LORUN_TARGET_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")))
#define LORUN_TARGET_AVX512_BF16 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma,f16c")))
#else
#define LORUN_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,prefer-vector-width=512")))
#define LORUN_TARGET_AVX512_BF16 \
  __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")))
#endif
#endif

namespace lorun {

enum class CpuVariant { kBaseline, kAvx2, kAvx512 };

inline const char* name(CpuVariant v) {
  return v == CpuVariant::kAvx512 ? "avx512" : v == CpuVariant::kAvx2 ? "avx2" : "baseline";
}

#ifdef LORUN_X86
inline constexpr std::array kCompiledVariants{CpuVariant::kBaseline, CpuVariant::kAvx2, CpuVariant::kAvx512};
#else
inline constexpr std::array kCompiledVariants{CpuVariant::kBaseline};
#endif

// The best compiled variant that this machine runs; LORUN_CPU=baseline|avx2|avx512 asks for a lesser one.
CpuVariant active_variant();

// Whether the machine, which runs the variant for AVX-512, also rounds to bf16 in one instruction. LORUN_CPU turns it
// off.
bool rounds_to_bf16();

// Whether LORUN_CPU names a variant.
bool asks_for_variant();

template <int Bytes>
using VectorWidth = std::integral_constant<int, Bytes>;

namespace detail {

#ifdef LORUN_X86
template <class F>
LORUN_TARGET_AVX2 void run_avx2(const F& body) {
  body(VectorWidth<32>{});
}

template <class F>
LORUN_TARGET_AVX512 void run_avx512(const F& body) {
  body(VectorWidth<64>{});
}
#endif

template <class F>
void run_baseline(const F& body) {
  body(VectorWidth<16>{});
}

}  // namespace detail

template <class F>
void multiversion(const F& body) {
#ifdef LORUN_X86
  switch (active_variant()) {
    case CpuVariant::kAvx512:
      return detail::run_avx512(body);
    case CpuVariant::kAvx2:
      return detail::run_avx2(body);
    case CpuVariant::kBaseline:
      break;
  }
#endif
  detail::run_baseline(body);
}

// The widest variant whose vectors of T hold each of these numbers of channels, 8 or more, in as few lanes as half as
// wide ones do.
template <class T, class... Counts>
CpuVariant variant_for(Counts... channels) {
  constexpr int64_t kWide = 64 / sizeof(T);
  const bool fill = ((channels % kWide == 0 || (channels > kWide && channels % kWide > kWide / 2)) && ...);
  const CpuVariant active = active_variant();
  return active == CpuVariant::kAvx512 && !fill ? CpuVariant::kAvx2 : active;
}

}  // namespace lorun
