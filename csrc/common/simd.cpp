#include "common/simd.h"

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string_view>

namespace lorun {

namespace {

// The variant that LORUN_CPU names.
std::optional<CpuVariant> wish() {
  const char* named = std::getenv("LORUN_CPU");
  for (const CpuVariant v : kCompiledVariants) {
    if (named != nullptr && std::string_view(named) == name(v)) {
      return v;
    }
  }
  return std::nullopt;
}

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
  return std::min(best, wish().value_or(best));
#else
  return CpuVariant::kBaseline;
#endif
}

}  // namespace

bool asks_for_variant() {
  return wish().has_value();
}

bool rounds_to_bf16() {
#ifdef LORUN_X86
  static const bool found =
      !asks_for_variant() && active_variant() == CpuVariant::kAvx512 && __builtin_cpu_supports("avx512bf16") != 0;
  return found;
#else
  return false;
#endif
}

CpuVariant active_variant() {
  static const CpuVariant variant = detect();
  return variant;
}

}  // namespace lorun
