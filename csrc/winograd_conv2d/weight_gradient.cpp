// The gradient of a 3x3 convolution's weight on the CPU (formulas in winograd_conv2d.h).
//
// A thread takes some tiles at a time through both transforms and adds their products to its sums, (36, in, out), in
// register tiles over channels. Every part of the tiles has sums of its own, which are added in order: the result does
// not depend on the number of threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "common/parallel.h"
#include "common/simd.h"
#include "common/tensor.h"
#include "winograd_conv2d/winograd_conv2d.h"

#define LORUN_KERNELS "winograd_conv2d/weight_gradient.inl"
#include "common/for_each_variant.h"

namespace lorun::winograd_conv2d {
namespace {

constexpr int64_t kWorkBytes = 384 << 10;  // with the sums of one point, in the second-level cache
// Parts of the tiles: at most so many, of so many tiles at least, and so much memory; a power of two, for equal shares.
constexpr int64_t kParts = 16, kPartTiles = 36, kPartBytes = 8 << 20;

template <class S, class T = Wide<S>>
void run(const GradientProblem<S>& p, T* grad, const Tensor& like) {
  constexpr int64_t kBytes = sizeof(T);
  [[maybe_unused]] const CpuVariant variant = variant_for<T>(p.in, p.out);
  const auto sum = LORUN_PICK_FOR(variant, sum_tiles<S>);
  const auto finish = LORUN_PICK_FOR(variant, to_weight<S>);
  const int64_t row = whole_vectors<T>(p.out), values = p.in * row, channels = kPoints * (p.in + p.out);
  const int64_t fit = kPartBytes / std::max<int64_t>(kPoints * values * kBytes, 1);
  const int64_t most = std::clamp<int64_t>(std::min(fit, p.tiles() / kPartTiles), 1, kParts);
  const auto parts = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(most)));
  const int64_t together = std::max<int64_t>(kWorkBytes / std::max<int64_t>(channels * kBytes, 1), 1);
  const Tensor memory = empty_beside(like, {parts, kPoints, p.in, row}, wide_type(like.scalar_type()));
  T* sums = memory.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    const Work<S> w(together, p.in, p.out);
    for (int64_t part = first; part < last; ++part) {
      T* to = sums + part * kPoints * values;
      std::fill_n(to, kPoints * values, T(0));
      const int64_t end = (part + 1) * p.tiles() / parts;
      for (int64_t t = part * p.tiles() / parts; t < end; t += together) {
        sum(p, w, t, std::min(t + together, end), to);
      }
    }
  });
  parallel(p.in, parts * kPoints * row, [&](int64_t begin, int64_t end) { finish(p, sums, parts, begin, end, grad); });
}

Tensor weight_gradient(Tensor grad, Tensor x) {
  STD_TORCH_CHECK(grad.dim() == 4 && x.dim() == 4, "grad, x: expected 4 dimensions, got ", shape_of(grad), " and ",
                  shape_of(x));
  const Images images{x.size(0), x.size(2), x.size(3)};
  const int64_t in = x.size(1), out = grad.size(1);
  check_shape("grad", grad, {images.n, out, images.height, images.width});
  check_channels(in, out);
  const ScalarType type = x.scalar_type();
  check_type("grad", grad, type);
  const Tensor pixels = channels_inside(x), gradients = channels_inside(grad);
  const Tensor g = empty_beside(x, {3, 3, in, out}, wide_type(type));
  dispatch_storage(type, "x", [&](auto tag) {
    using S = typename decltype(tag)::type;
    run(GradientProblem<S>{images, in, out, pixels.const_data_ptr<S>(), gradients.const_data_ptr<S>()},
        g.mutable_data_ptr<Wide<S>>(), x);
  });
  // (out, in, 3, 3), without a copy
  return torch::stable::transpose(torch::stable::transpose(torch::stable::transpose(g, 0, 3), 1, 2), 2, 3);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("winograd_weight_gradient", TORCH_BOX(&weight_gradient));
}

}  // namespace lorun::winograd_conv2d
