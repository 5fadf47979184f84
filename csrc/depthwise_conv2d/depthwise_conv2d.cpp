// Depthwise 3x3 convolution and its gradients on the CPU (formulas in depthwise_conv2d.h).

#include "depthwise_conv2d/depthwise_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/caches.h"
#include "common/convert.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/tensor.h"

#define LORUN_KERNELS "depthwise_conv2d/bands.inl"
#include "common/for_each_variant.h"

#define LORUN_KERNELS "depthwise_conv2d/bands.inl"
#include "common/bf16_variant.h"

namespace lorun::depthwise_conv2d {
namespace {

// A panel's columns at least: it reads one more on each side.
constexpr int64_t kLeastColumns = 16;
// Parts of the gradients' sums: at most so many, of so many pixels at least.
constexpr int64_t kParts = 64, kPartPixels = 512;

// The widest variant of which the channels fill a vector.
template <class T>
CpuVariant variant_of(int64_t channels) {
  constexpr auto kWide = static_cast<int64_t>(64 / sizeof(Wide<T>));
  const CpuVariant fills = channels >= kWide       ? CpuVariant::kAvx512
                           : channels >= kWide / 2 ? CpuVariant::kAvx2
                                                   : CpuVariant::kBaseline;
  return std::min(active_variant(), fills);
}

void check(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected 4 dimensions, got ", shape_of(x));
  STD_TORCH_CHECK(x.size(1) > 0, "x: expected one channel or more, got ", shape_of(x));
  check_shape("weight", weight, {x.size(1), 1, 3, 3});
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight: expected x's dtype, got another one");
}

Bands bands_of(const Tensor& x) {
  const int64_t width = std::max<int64_t>(x.size(3), 1);
  // A band's rows and the two around it, the next one's, and the results of both.
  const int64_t column = (4 * kRows + 2) * x.size(1) * x.element_size();
  const int64_t most = std::max(second_level_cache() / 2 / column, kLeastColumns), panels = (width + most - 1) / most;
  return {x.size(0), x.size(2), x.size(3), x.size(1), (width + panels - 1) / panels};
}

// (channels, 1, 3, 3) -> (9, channels)
template <class T>
std::vector<Wide<T>> taps_of(const Tensor& weight, bool reversed) {
  const int64_t channels = weight.size(0);
  const T* w = weight.const_data_ptr<T>();
  std::vector<Wide<T>> taps(kTaps * channels);
  for (int64_t t = 0; t < kTaps; ++t) {
    Wide<T>* to = taps.data() + (reversed ? kTaps - 1 - t : t) * channels;
    for (int64_t c = 0; c < channels; ++c) {
      to[c] = widen(w[c * kTaps + t]);
    }
  }
  return taps;
}

Tensor convolution(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  check(x, weight);
  const ScalarType type = x.scalar_type();
  const Bands bands = bands_of(x);
  if (bias) {
    check_shape("bias", *bias, {bands.channels});
  }
  const std::optional<Tensor> offset = bias ? std::optional(dense_in_type(*bias, wide_type(type))) : std::nullopt;
  const Tensor image = channels_inside(x), w = dense(weight);
  const Tensor y = empty_channels_last(x, bands.n, bands.channels, bands.height, bands.width, type);
  dispatch_storage(type, "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const std::vector<Wide<T>> taps = taps_of<T>(w, false);
    const Wide<T>* shift = offset ? offset->const_data_ptr<Wide<T>>() : nullptr;
    const Problem<T> p{bands, image.const_data_ptr<T>(), taps.data(), shift, y.mutable_data_ptr<T>()};
    const auto kernel = LORUN_PICK_STORING(T, variant_of<T>(bands.channels), run_bands<T>);
    parallel(bands.count(), 2 * kRows * bands.columns * bands.channels,
             [&](int64_t begin, int64_t end) { kernel(bands, &p, nullptr, begin, end, nullptr); });
  });
  return y;
}

// part: (vectors, 10, lanes). weight: (channels, 1, 3, 3).
template <class T>
void to_gradients(const Wide<T>* part, int64_t channels, int64_t lanes, T* weight, T* bias) {
  for (int64_t i = 0; i < channels; i += lanes, part += kSums * lanes) {
    const int64_t first = std::min(i, channels - lanes);
    for (int64_t c = first; c < first + lanes; ++c) {
      for (int64_t t = 0; t < kTaps; ++t) {
        weight[c * kTaps + t] = narrow<T>(part[t * lanes + c - first]);
      }
      bias[c] = narrow<T>(part[kTaps * lanes + c - first]);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> gradients(Tensor grad, Tensor x, Tensor weight, bool of_x) {
  check(x, weight);
  const ScalarType type = x.scalar_type();
  const Bands bands = bands_of(x);
  check_shape("grad", grad, {bands.n, bands.channels, bands.height, bands.width});
  STD_TORCH_CHECK(grad.scalar_type() == type, "grad: expected x's dtype, got another one");
  const Tensor image = channels_inside(x), change = channels_inside(grad), w = dense(weight);
  const Tensor grad_x = of_x ? empty_channels_last(x, bands.n, bands.channels, bands.height, bands.width, type)
                             : empty_beside(x, {0}, type);
  const Tensor grad_weight = empty_beside(x, {bands.channels, 1, 3, 3}, type);
  const Tensor grad_bias = empty_beside(x, {bands.channels}, type);
  dispatch_storage(type, "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const std::vector<Wide<T>> taps = taps_of<T>(w, true);
    const Problem<T> p{bands, change.const_data_ptr<T>(), taps.data(), nullptr, grad_x.mutable_data_ptr<T>()};
    const GradientProblem<T> g{bands, change.const_data_ptr<T>(), image.const_data_ptr<T>()};
    const CpuVariant variant = variant_of<T>(bands.channels);
    const auto kernel = LORUN_PICK_STORING(T, variant, run_bands<T>);
    const int64_t lanes = LORUN_PICK_FOR(variant, lanes_of<T>)(bands.channels);
    const int64_t values = (bands.channels + lanes - 1) / lanes * lanes * kSums;
    const int64_t parts = std::clamp<int64_t>(bands.n * bands.height * bands.width / kPartPixels, 1, kParts);
    std::vector<Wide<T>> sums(parts * values);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        kernel(bands, of_x ? &p : nullptr, &g, i * bands.count() / parts, (i + 1) * bands.count() / parts,
               sums.data() + i * values);
      }
    });
    for (int64_t i = 1; i < parts; ++i) {
      for (int64_t k = 0; k < values; ++k) {
        sums[k] += sums[i * values + k];
      }
    }
    to_gradients(sums.data(), bands.channels, lanes, grad_weight.mutable_data_ptr<T>(),
                 grad_bias.mutable_data_ptr<T>());
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&convolution));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&gradients));
}

}  // namespace lorun::depthwise_conv2d
