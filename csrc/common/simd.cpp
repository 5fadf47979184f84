#include "common/simd.h"

#include <cstdlib>
#include <string_view>

namespace lorun {

namespace {

CpuVariant detect() {
#ifdef LORUN_X86
  CpuVariant best = CpuVariant::kBaseline;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    best = CpuVariant::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq")) {
      best = CpuVariant::kAvx512;
    }
  }
  const char* wish = std::getenv("LORUN_CPU");
  if (wish != nullptr) {
    for (const CpuVariant v : kCompiledVariants) {
      if (std::string_view(wish) == name(v) && v < best) {
        return v;
      }
    }
  }
  return best;
#else
  return CpuVariant::kBaseline;
#endif
}

}  // namespace

bool asks_for_lesser() {
#ifdef LORUN_X86
  const char* wish = std::getenv("LORUN_CPU");
  for (const CpuVariant v : kCompiledVariants) {
    if (wish != nullptr && std::string_view(wish) == name(v)) {
      return true;
    }
  }
#endif
  return false;
}

CpuVariant active_variant() {
  static const CpuVariant variant = detect();
  return variant;
}

}  // namespace lorun
