// Shapes, dtypes and allocation for operators written against torch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>

namespace lorun {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Measurements, operator parameters and accumulators beside an image stored as T: fp64 stays, the rest is fp32.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType wide_type(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What a kernel's ending that reads nothing has read.
struct Nothing {};

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>) for an image's storage type T. `name` is the argument's, for the error.
template <class F>
auto dispatch_storage(ScalarType type, const char* name, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(TypeTag<float>{});
    case ScalarType::Double:
      return f(TypeTag<double>{});
    case ScalarType::BFloat16:
      return f(TypeTag<BFloat16>{});
    case ScalarType::Half:
      return f(TypeTag<Half>{});
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16, got another dtype");
  }
}

// The same for operators that take float32 and float64 only.
template <class F>
auto dispatch_wide(ScalarType type, const char* name, const F& f) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name, ": expected float32 or float64");
  return type == ScalarType::Float ? f(TypeTag<float>{}) : f(TypeTag<double>{});
}

template <class Sizes>
std::string text_of(const Sizes& sizes) {
  std::string text = "(";
  for (const int64_t size : sizes) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + ")";
}

inline std::string shape_of(const Tensor& t) {
  return text_of(t.sizes());
}

// The Python layer words its own, friendlier checks; these keep a direct call of the op inside its memory.
inline void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> want) {
  const auto got = t.sizes();
  STD_TORCH_CHECK(std::equal(got.begin(), got.end(), want.begin(), want.end()), name, ": expected shape ",
                  text_of(want), ", got ", text_of(got));
}

inline const char* name_of(ScalarType type) {
  return type == ScalarType::Double     ? "float64"
         : type == ScalarType::BFloat16 ? "bfloat16"
         : type == ScalarType::Half     ? "float16"
                                        : "float32";
}

inline void check_type(const char* name, const Tensor& t, ScalarType want) {
  STD_TORCH_CHECK(t.scalar_type() == want, name, ": expected ", name_of(want), " beside this image, got another dtype");
}

inline void check_step_size(const Tensor& rho, int64_t n, int64_t channels, ScalarType wide) {
  check_type("rho", rho, wide);
  const bool shared = rho.dim() == 1 && rho.size(0) == 1;
  const bool each = rho.dim() == 2 && rho.size(0) == n && rho.size(1) == channels;
  STD_TORCH_CHECK(shared || each, "rho: expected shape (1) or (", n, ", ", channels, "), got ", shape_of(rho));
}

// What aten::new_empty gives. Not torch::stable::new_empty(), which finds the operator by its name and packs every
// argument: most of what a small call costs below Python.
inline Tensor empty_beside(const Tensor& like, const int64_t* shape, size_t rank, ScalarType type) {
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), shape, static_cast<int64_t>(rank), &dtype, nullptr,
                                                   nullptr, 0, nullptr, &made));
  return Tensor(made);
}

inline Tensor empty_beside(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return empty_beside(like, shape.begin(), shape.size(), type);
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// The tensor itself, or a dense copy in this type.
inline Tensor dense_in_type(const Tensor& t, ScalarType type) {
  if (t.scalar_type() == type) {
    return dense(t);
  }
  Tensor copy = torch::stable::new_empty(t, t.sizes(), type);
  torch::stable::copy_(copy, t);
  return copy;
}

// Room for (n, channels, height, width) whose channels are innermost in memory. Made in one call, and no view: torch
// lets nobody work in place on a view that an op returns.
inline Tensor empty_channels_last(const Tensor& like, int64_t n, int64_t channels, int64_t height, int64_t width,
                                  ScalarType type) {
  const int64_t sizes[] = {n, channels, height, width};
  const int64_t strides[] = {height * width * channels, 1, width * channels, channels};
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides, dtype, device, index, &made));
  return Tensor(made);
}

// (n, channels, height, width) seen as (n, height, width, channels).
inline Tensor seen_from_inside(const Tensor& t) {
  return torch::stable::transpose(torch::stable::transpose(t, 1, 2), 2, 3);
}

// Whether the values of (n, channels, height, width) lie in memory as (n, height, width, channels), dense.
inline bool channels_lie_inside(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  for (const size_t dim : {1, 3, 2, 0}) {
    if (sizes[dim] != 1 && strides[dim] != expected) {
      return false;
    }
    expected *= sizes[dim];
  }
  return true;
}

// A tensor whose memory holds the values so: itself, or a copy, of one shape or the other.
inline Tensor channels_inside(const Tensor& t) {
  return channels_lie_inside(t) ? t : dense(seen_from_inside(t));
}

inline std::optional<Tensor> channels_inside(const std::optional<Tensor>& t) {
  return t ? std::optional(channels_inside(*t)) : std::nullopt;
}

}  // namespace lorun
