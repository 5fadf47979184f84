// What follows a convolution that keeps its image's size, as its call gives it: found to fit, dense, channels
// innermost.
#pragma once

#include <cstdint>
#include <optional>

#include "common/tensor.h"

namespace lorun {

inline std::optional<Tensor> fitting_bias(const char* name, const std::optional<Tensor>& bias, int64_t out,
                                          ScalarType wide) {
  if (!bias) {
    return std::nullopt;
  }
  check_shape(name, *bias, {out});
  check_type(name, *bias, wide);
  return dense(*bias);
}

// x: the image that is convolved, of the same type.
inline std::optional<Tensor> fitting_residual(const std::optional<Tensor>& residual, const Tensor& x, int64_t out) {
  if (residual) {
    check_shape("residual", *residual, {x.size(0), out, x.size(2), x.size(3)});
    check_type("residual", *residual, x.scalar_type());
  }
  return channels_inside(residual);
}

template <class T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

}  // namespace lorun
