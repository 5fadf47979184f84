// The gradient of such a convolution's weight on the CPU (formulas in thin_conv2d.h).
//
// Every part of the images' rows has sums of its own, which are added in order: the result does not depend on the
// number of threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "common/tensor.h"
#include "thin_conv2d/thin_conv2d.h"

#define LORUN_KERNELS "thin_conv2d/weight_gradient.inl"
#include "common/for_each_variant.h"

namespace lorun::thin_conv2d {
namespace {

constexpr int64_t kParts = 16, kPartRows = 8;  // at most so many, of so many rows at least

struct Padded;

Tensor weight_gradient(Tensor grad, Tensor x) {
  STD_TORCH_CHECK(grad.dim() == 4 && x.dim() == 4, "grad, x: expected 4 dimensions, got ", shape_of(grad), " and ",
                  shape_of(x));
  const int64_t n = x.size(0), in = x.size(1), height = x.size(2), width = x.size(3), out = grad.size(1);
  check_shape("grad", grad, {n, out, height, width});
  const bool from = check_channels(in, out);
  const ScalarType type = x.scalar_type(), wide = wide_type(type);
  check_type("grad", grad, type);
  const Tensor few = channels_inside(from ? x : grad), many = channels_inside(from ? grad : x);
  const int64_t fews = from ? in : out, manys = from ? out : in, rows = n * height;
  const auto parts =
      static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::clamp<int64_t>(rows / kPartRows, 1, kParts))));
  const Tensor memory = empty_beside(x, {parts, fews, kTaps, manys}, wide);
  const Tensor g = empty_beside(x, {out, in, 3, 3}, wide);
  dispatch_storage(type, "x", [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Wide<S>;
    const GradientProblem<S> p{height, width, fews, manys, few.const_data_ptr<S>(), many.const_data_ptr<S>()};
    const int64_t values = fews * kTaps * manys;
    const auto kernel = LORUN_PICK_FOR(variant_for<T>(manys), sum_rows<S>);
    T* sums = memory.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      T* padded = static_cast<T*>(scratch<Padded>(3 * (width + 2) * sizeof(T)));
      for (int64_t part = first; part < last; ++part) {
        std::fill_n(sums + part * values, values, T(0));
        kernel(p, padded, part * rows / parts, (part + 1) * rows / parts, sums + part * values);
      }
    });
    T* to = g.mutable_data_ptr<T>();
    for (int64_t f = 0; f < fews; ++f) {
      for (int64_t t = 0; t < kTaps; ++t) {
        for (int64_t c = 0; c < manys; ++c) {
          T sum = 0;
          for (int64_t part = 0; part < parts; ++part) {
            sum += sums[part * values + (f * kTaps + t) * manys + c];
          }
          to[from ? (c * fews + f) * kTaps + t : (f * manys + c) * kTaps + kTaps - 1 - t] = sum;
        }
      }
    }
  });
  return g;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("thin_weight_gradient", TORCH_BOX(&weight_gradient));
}

}  // namespace lorun::thin_conv2d
