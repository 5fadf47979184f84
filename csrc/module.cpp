// lorun_fast._C: importing it registers the compiled operators (each op's file does so by itself);
// the module's only function tells how it was built.

#include <cstdint>
#include <string>

namespace {
constexpr uint64_t kTarget = TORCH_TARGET_VERSION;
}
// The pybind11 that torch 2.11 bundles refuses to be included while this is defined; this file uses no torch API.
#undef TORCH_TARGET_VERSION

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "common/amx.h"
#include "common/simd.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

py::tuple version_of(uint64_t encoded) {
  return py::make_tuple(encoded >> 56, (encoded >> 48) & 0xff);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["flags"] = LORUN_CXX_FLAGS;
  info["torch"] = TORCH_VERSION;
  info["torch_target"] = version_of(kTarget);
#ifdef USE_CUDA
  info["cuda"] = true;
  info["cuda_archs"] = LORUN_CUDA_ARCHS;
#else
  info["cuda"] = false;
  info["cuda_archs"] = "";
#endif
  py::list variants;
  for (const lorun::CpuVariant v : lorun::kCompiledVariants) {
    variants.append(lorun::name(v));
  }
  info["cpu_variants"] = py::tuple(variants);
  info["cpu_active"] = lorun::name(lorun::active_variant());
  info["amx"] = lorun::has_amx();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "How the extension was built, and which CPU variant this machine runs.");
}
