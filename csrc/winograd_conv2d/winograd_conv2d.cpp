// 3x3 convolution by F(4x4, 3x3) on the CPU (formulas in winograd_conv2d.h).
//
// A thread takes a few tiles at a time through both transforms and the products between them, so that what lies
// between, 36 values a tile and channel, stays in its second-level cache. The products are register tiles of 6
// (AVX-512: 12) image tiles and two vectors of channels. Bias, activation and residual are applied to results in
// registers.

#include "winograd_conv2d/winograd_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "common/tensor.h"

#define LORUN_KERNELS "winograd_conv2d/tiles.inl"
#include "common/for_each_variant.h"

namespace lorun::winograd_conv2d {
namespace {

struct Slot;

constexpr int64_t kChannels = 8;           // both channel counts are multiples of it
constexpr int64_t kMultiple = 12;          // of tiles, as the products want them
constexpr int64_t kWorkBytes = 128 << 10;  // a part of the second-level cache

// (n, channels, height, width) seen as (n, height, width, channels), dense.
Tensor channels_inside(const Tensor& t) {
  return dense(torch::stable::transpose(torch::stable::transpose(t, 1, 2), 2, 3));
}

Tensor channels_outside(const Tensor& t) {
  return torch::stable::transpose(torch::stable::transpose(t, 2, 3), 1, 2);
}

// The widest vectors that both channel counts fill.
template <class T>
auto kernel_for(const Problem<T>& p) {
#ifdef LORUN_X86
  constexpr int64_t kWide = 64 / sizeof(T);
  if (active_variant() == CpuVariant::kAvx512 && p.in % kWide == 0 && p.out % kWide == 0) {
    return &avx512::convolve<T>;
  }
  if (active_variant() != CpuVariant::kBaseline) {
    return &avx2::convolve<T>;
  }
#endif
  return &baseline::convolve<T>;
}

template <class T>
void run(const Problem<T>& p) {
  const auto kernel = kernel_for(p);
  const int64_t channels = kPoints * (p.in + p.out), bytes = channels * static_cast<int64_t>(sizeof(T));
  const int64_t together = std::max(kWorkBytes / bytes / kMultiple, int64_t{1}) * kMultiple;
  const int64_t blocks = (p.tiles() + together - 1) / together;
  parallel(blocks, together * channels, [&](int64_t begin, int64_t end) {
    // Points a multiple of 4 KB apart would compete for the same places of the first-level cache.
    constexpr int64_t kApart = 64 / sizeof(T);
    Work<T> w{};
    w.v_pitch = together * p.in + kApart;
    w.m_pitch = together * p.out + kApart;
    w.v = static_cast<T*>(scratch<Slot>(kPoints * (w.v_pitch + w.m_pitch + p.in) * sizeof(T)));
    w.m = w.v + kPoints * w.v_pitch;
    w.padded = w.m + kPoints * w.m_pitch;
    for (int64_t b = begin; b < end; ++b) {
      kernel(p, w, b * together, std::min((b + 1) * together, p.tiles()));
    }
  });
}

Tensor convolution(Tensor x, Tensor weight, std::optional<Tensor> bias, bool relu, std::optional<Tensor> residual) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 3, "x, weight: expected 4 and 3 dimensions, got ", shape_of(x),
                  " and ", shape_of(weight));
  const int64_t n = x.size(0), in = x.size(1), height = x.size(2), width = x.size(3), out = weight.size(2);
  STD_TORCH_CHECK(in % kChannels == 0 && out % kChannels == 0, "expected multiples of 8 channels, got ", in, " and ",
                  out);
  check_shape("weight", weight, {kPoints, in, out});
  const ScalarType type = x.scalar_type();
  check_type("weight", weight, wide_type(type));
  if (bias) {
    check_shape("bias", *bias, {out});
    check_type("bias", *bias, wide_type(type));
  }
  if (residual) {
    check_shape("residual", *residual, {n, out, height, width});
    check_type("residual", *residual, wide_type(type));
  }
  const Tensor image = channels_inside(x), points = dense(weight);
  const std::optional<Tensor> added = residual ? std::optional(channels_inside(*residual)) : std::nullopt;
  const std::optional<Tensor> offset = bias ? std::optional(dense(*bias)) : std::nullopt;
  const Tensor y = empty_beside(x, {n, height, width, out}, type);
  const auto call = [&](auto tag) {
    using T = typename decltype(tag)::type;
    run(Problem<T>{n, height, width, in, out, image.const_data_ptr<T>(), points.const_data_ptr<T>(),
                   offset ? offset->const_data_ptr<T>() : nullptr, added ? added->const_data_ptr<T>() : nullptr,
                   y.mutable_data_ptr<T>(), relu});
  };
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "x: expected float32 or float64");
  if (type == ScalarType::Float) {
    call(TypeTag<float>{});
  } else {
    call(TypeTag<double>{});
  }
  return channels_outside(y);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("winograd_conv2d", TORCH_BOX(&convolution));
}

}  // namespace lorun::winograd_conv2d
