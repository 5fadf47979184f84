// 3x3 convolution from or to few channels on the CPU (formulas in thin_conv2d.h).

#include "thin_conv2d/thin_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "common/finishing.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "common/tensor.h"

#define LORUN_KERNELS "thin_conv2d/rows.inl"
#include "common/for_each_variant.h"

#define LORUN_KERNELS "thin_conv2d/rows.inl"
#include "common/bf16_variant.h"

namespace lorun::thin_conv2d {
namespace {

// Pixels of a step at most, and one on each side.
constexpr int64_t kMostPixels = 16 + 2;

template <class S>
using Rows = void (*)(const Problem<S>&, S*, int64_t, int64_t);

template <class S>
Rows<S> rows_of(const Problem<S>& p) {
  if (p.in <= kFew) {
    const CpuVariant variant = variant_for<Wide<S>>(p.out);
    if constexpr (sizeof(S) < sizeof(Wide<S>)) {
      return LORUN_PICK_STORING(S, variant, panels_from_few<S>);
    } else {
      return LORUN_PICK_FOR(variant, rows_from_few<S>);
    }
  }
  const CpuVariant variant = variant_for<Wide<S>>(p.in);
  switch (p.out) {
    case 1:
      return LORUN_PICK_FOR(variant, to_few<S, 1>);
    case 2:
      return LORUN_PICK_FOR(variant, to_few<S, 2>);
    case 3:
      return LORUN_PICK_FOR(variant, to_few<S, 3>);
    default:
      return LORUN_PICK_FOR(variant, to_few<S, 4>);
  }
}

struct Padded;

// (out, 3, 3, in) -> (3, 3, in, out)
Tensor outputs_inside(const Tensor& taps) {
  Tensor t = taps;
  for (int64_t i = 0; i < 3; ++i) {
    t = torch::stable::transpose(t, i, i + 1);
  }
  return dense(t);
}

Tensor convolution(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual, bool relu) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, "x, weight: expected 4 dimensions, got ", shape_of(x), " and ",
                  shape_of(weight));
  const int64_t n = x.size(0), in = x.size(1), height = x.size(2), width = x.size(3), out = weight.size(0);
  check_shape("weight", weight, {out, in, 3, 3});
  const bool from = check_channels(in, out);
  const ScalarType type = x.scalar_type(), wide = wide_type(type);
  check_type("weight", weight, type);
  if (bias) {
    check_type("bias", *bias, type);
  }
  const std::optional<Tensor> wide_bias = bias ? std::optional(dense_in_type(*bias, wide)) : std::nullopt;
  const std::optional<Tensor> offset = fitting_bias("bias", wide_bias, out, wide);
  const std::optional<Tensor> added = fitting_residual(residual, x, out);
  const Tensor image = channels_inside(x);
  const Tensor taps = dense(seen_from_inside(dense_in_type(weight, wide)));  // (out, 3, 3, in)
  const Tensor w = from ? outputs_inside(taps) : taps;
  const Tensor y = empty_channels_last(x, n, out, height, width, type);
  dispatch_storage(type, "x", [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Wide<S>;
    const Problem<S> p{n,
                       height,
                       width,
                       in,
                       out,
                       image.const_data_ptr<S>(),
                       w.const_data_ptr<T>(),
                       pointer<T>(offset),
                       pointer<S>(added),
                       y.mutable_data_ptr<S>(),
                       relu};
    const auto kernel = rows_of(p);
    parallel(n * height, width * (in + out), [&](int64_t begin, int64_t end) {
      kernel(p, static_cast<S*>(scratch<Padded>(3 * kMostPixels * in * sizeof(S))), begin, end);
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("thin_conv2d", TORCH_BOX(&convolution));
}

}  // namespace lorun::thin_conv2d
