// What the ops' arguments must look like, for the CPU and the CUDA implementation.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cassi/cassi.h"
#include "common/tensor.h"

namespace lorun::cassi {

struct OperatorTensors {
  Geometry g;
  Tensor mask;
  int64_t m_sample, m_band;  // from one sample's, one band's mask to the next one's; 0: all share one
};

// Columns by which bands may be shifted: far from where their products with a step would no longer be represented.
constexpr int64_t kMostShift = int64_t{1} << 40;

inline void check_shift(int64_t bands, int64_t step) {
  const int64_t most = kMostShift / std::max<int64_t>(bands, 1);
  STD_TORCH_CHECK(step >= 0 && step <= most, "step: expected 0 to ", most, " beside ", bands, " bands, got ", step);
}

inline OperatorTensors operator_of(const Tensor& mask, int64_t samples, int64_t bands, int64_t step, ScalarType image) {
  check_shift(bands, step);
  STD_TORCH_CHECK(bands >= 1, "bands: expected at least 1, got ", bands);
  check_type("mask", mask, wide_type(image));
  const int64_t rank = mask.dim(), masks = rank > 2 ? mask.size(rank - 3) : 1;  // of a sample
  STD_TORCH_CHECK(rank == 2 || (rank == 3 && masks == bands) ||
                      (rank == 4 && mask.size(0) == samples && (masks == 1 || masks == bands)),
                  "mask: expected (H, W), (", bands, ", H, W) or (", samples, ", 1 or ", bands, ", H, W), got ",
                  shape_of(mask));
  const int64_t height = mask.size(rank - 2), width = mask.size(rank - 1), plane = height * width;
  return {{samples, bands, height, width, step}, dense(mask), rank == 4 ? masks * plane : 0, masks > 1 ? plane : 0};
}

inline OperatorTensors operator_of_image(const Tensor& x, const Tensor& mask, int64_t step) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected (N, L, H, W), got ", shape_of(x));
  OperatorTensors op = operator_of(mask, x.size(0), x.size(1), step, x.scalar_type());
  check_shape("x", x, {op.g.samples, op.g.bands, op.g.height, op.g.width});
  return op;
}

inline OperatorTensors operator_of_measurement(const Tensor& y, const Tensor& mask, int64_t bands, int64_t step) {
  STD_TORCH_CHECK(y.dim() == 3, "y: expected (N, H, W + step*(L-1)), got ", shape_of(y));
  OperatorTensors op = operator_of(mask, y.size(0), bands, step, y.scalar_type());
  check_shape("y", y, {op.g.samples, op.g.height, op.g.measured()});
  return op;
}

inline OperatorTensors operator_of_weight(const Tensor& mask, const Tensor& mu, int64_t bands, int64_t step) {
  const ScalarType wide = mask.scalar_type();
  check_type("mu", mu, wide);
  STD_TORCH_CHECK(mu.dim() == 1, "mu: expected shape (N), got ", shape_of(mu));
  return operator_of(mask, mu.size(0), bands, step, wide);
}

// For the gradient of a mask, of the mask's shape.
inline Tensor empty_mask(const Tensor& y, const Geometry& g, bool per_band, bool per_sample) {
  const int64_t shape[] = {g.samples, per_band ? g.bands : 1, g.height, g.width};
  const int first = per_sample ? 0 : per_band ? 1 : 2;
  return empty_beside(y, shape + first, 4 - first, y.scalar_type());
}

// The geometry of an image beside a measurement in the accumulation type.
inline Geometry geometry_of(const Tensor& x, const Tensor& y, int64_t step) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected (N, L, H, W), got ", shape_of(x));
  check_shift(x.size(1), step);
  const Geometry g{x.size(0), x.size(1), x.size(2), x.size(3), step};
  check_type("y", y, wide_type(x.scalar_type()));
  check_shape("y", y, {g.samples, g.height, g.measured()});
  return g;
}

// The further arguments of a step, dense, in the accumulation type W; null pointers for what is absent.
template <class W>
struct StepArguments {
  const W *y, *rho, *weight;
  int64_t rho_sample, rho_band;  // elements from one to the next
  int64_t weight_rows;
};

struct StepTensors {
  Tensor rho, y, weight;

  StepTensors(const Geometry& g, ScalarType wide, const std::optional<Tensor>& y_, const Tensor& rho_,
              const std::optional<Tensor>& weight_) {
    check_type("rho", rho_, wide);
    const bool per_sample = rho_.dim() == 2 && rho_.size(0) == g.samples;
    STD_TORCH_CHECK(
        (rho_.dim() == 1 && rho_.size(0) == 1) || (per_sample && (rho_.size(1) == 1 || rho_.size(1) == g.bands)),
        "rho: expected shape (1), (", g.samples, ", 1) or (", g.samples, ", ", g.bands, "), got ", shape_of(rho_));
    if (y_) {
      check_type("y", *y_, wide);
      check_shape("y", *y_, {g.samples, g.height, g.measured()});
      y = dense(*y_);
    }
    if (weight_) {
      check_type("weight", *weight_, wide);
      STD_TORCH_CHECK(weight_->dim() == 3 && (weight_->size(0) == 1 || weight_->size(0) == g.samples) &&
                          weight_->size(1) == g.height && weight_->size(2) == g.measured(),
                      "weight: expected (1 or ", g.samples, ", ", g.height, ", ", g.measured(), "), got ",
                      shape_of(*weight_));
      weight = dense(*weight_);
    }
    rho = dense(rho_);
  }

  template <class W>
  StepArguments<W> arguments(const Geometry& g) const {
    const bool table = rho.dim() == 2;
    return {y.defined() ? y.const_data_ptr<W>() : nullptr,
            rho.const_data_ptr<W>(),
            weight.defined() ? weight.const_data_ptr<W>() : nullptr,
            table ? rho.size(1) : 0,
            table && rho.size(1) > 1,
            weight.defined() ? weight.size(0) * g.height : 1};
  }
};

inline Tensor with_unit_columns(const Tensor& x) {
  return x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

inline ImageStrides strides_of(const Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2)};
}

}  // namespace lorun::cassi
