// Merged weights on the CPU (formulas in lora_merge.h): all layers and stages in one parallel loop.
//
// A piece of work is one leading index of one weight at one stage. Its part of the update is summed in registers,
// a run of columns at a time, in one fixed order; W0 is added and the result rounded once. Zero factors leave W0 to the
// last bit.

#include "lora_merge/lora_merge.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/convert.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "common/tensor.h"
#include "lora_merge/one.h"

#define LORUN_KERNELS "lora_merge/update.inl"
#include "common/for_each_variant.h"

namespace lorun::lora_merge {
namespace {

struct Slot;

bool is_channels_last(const Tensor& weight) {
  return weight.dim() == 4 && weight.size(1) > 1 && weight.stride(1) == 1 && !weight.is_contiguous();
}

// Of all stages, (K, *weight.shape).
Tensor empty_merged(const Tensor& weight, int64_t stages, ScalarType type, bool channels_last) {
  if (weight.dim() == 2) {
    return empty_beside(weight, {stages, weight.size(0), weight.size(1)}, type);
  }
  const int64_t a = weight.size(0), b = weight.size(1), kh = weight.size(2), kw = weight.size(3);
  if (!channels_last) {
    return empty_beside(weight, {stages, a, b, kh, kw}, type);
  }
  const Tensor inner = empty_beside(weight, {stages, a, kh, kw, b}, type);
  return torch::stable::transpose(torch::stable::transpose(inner, 3, 4), 2, 3);
}

// Values from one channel, and from one tap, of a weight to the next.
struct Strides {
  int64_t channel, tap;
};

// Those of a weight whose rows of taps follow each other.
std::optional<Strides> strides_of(const Tensor& weight) {
  if (weight.dim() == 2) {
    return Strides{weight.stride(1), 1};
  }
  const Strides found{weight.stride(1), weight.stride(3)};
  return weight.stride(2) == weight.size(3) * found.tap ? std::optional(found) : std::nullopt;
}

// Of one stage, as the weight lies in memory.
Tensor empty_like(const Tensor& weight, ScalarType type) {
  if (is_channels_last(weight)) {
    return empty_channels_last(weight, weight.size(0), weight.size(1), weight.size(2), weight.size(3), type);
  }
  return empty_beside(weight, weight.sizes().data(), weight.dim(), type);
}

struct Layer {
  Shape shape;
  ScalarType wide, target;
  Tensor weight, down, up, merged;  // weight: in the wide type or the target's
  Strides strides;                  // of weight
  double scale;
  bool channels_last;
  int64_t stage, stages;  // the first of those that are merged, and how many
  int64_t first;          // of its pieces of work among all layers'

  int64_t pieces() const {
    return stages * shape.lead;
  }

  int64_t work() const {
    return pieces() * shape.slice() * (1 + shape.rank / 4);
  }
};

Layer layer_of(const Shape& shape, const Tensor& weight, const Tensor& down, const Tensor& up, const Tensor& merged,
               double scale, ScalarType target, bool channels_last, std::optional<int64_t> stage, int64_t first) {
  const ScalarType type = weight.scalar_type(), wide = wide_type(type);
  const std::optional<Strides> given = strides_of(weight);
  const Tensor base = given && (type == wide || type == target) ? weight : dense_in_type(weight, wide);
  const Strides strides = strides_of(base).value_or(Strides{shape.taps, 1});
  return {shape,  wide,    target, base,          dense_in_type(down, wide), dense_in_type(up, wide),
          merged, strides, scale,  channels_last, stage.value_or(0),         stage ? 1 : shape.stages,
          first};
}

template <class T, class W>
LORUN_INLINE inline T round_to(W v) {
  if constexpr (std::is_same_v<T, double>) {
    return v;
  } else {
    return narrow<T>(static_cast<float>(v));
  }
}

// Pieces [begin, end) of a layer whose weight is stored as S.
template <class T, class W, class S>
void merge_pieces(const Layer& layer, int64_t begin, int64_t end) {
  const Shape& s = layer.shape;
  const int64_t n = s.slice();
  const S* weight = layer.weight.const_data_ptr<S>();
  const W* down = layer.down.const_data_ptr<W>();
  const W* up = layer.up.const_data_ptr<W>();
  T* merged = layer.merged.mutable_data_ptr<T>();
  const W scale = static_cast<W>(layer.scale);
  const Strides from = layer.strides;
  const Strides to = layer.channels_last ? Strides{1, s.channels} : Strides{s.taps, 1};
  const int64_t by_lead = layer.weight.stride(0);
  W* sums = static_cast<W*>(scratch<Slot>(n * sizeof(W)));
  const auto kernel = LORUN_PICK(update<W>);
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t k = layer.stage + piece / s.lead, a = piece % s.lead;
    kernel(s, down + k * s.down(), up + k * s.rows * s.rank, a * n, n, sums);
    const S* base = weight + a * by_lead;
    T* out = merged + piece * n;
    multiversion([&](auto) LORUN_INLINE {
      if (from.channel == s.taps && to.channel == s.taps && from.tap == 1) {
        for (int64_t v = 0; v < n; ++v) {
          out[v] = round_to<T>(static_cast<W>(base[v]) + scale * sums[v]);
        }
        return;
      }
      for (int64_t tap = 0; tap < s.taps; ++tap) {
        for (int64_t c = 0; c < s.channels; ++c) {
          const W value = static_cast<W>(base[c * from.channel + tap * from.tap]);
          out[c * to.channel + tap * to.tap] = round_to<T>(value + scale * sums[c * s.taps + tap]);
        }
      }
    });
  }
}

void merge_range(const Layer& layer, int64_t begin, int64_t end) {
  dispatch_storage(layer.target, "dtype", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (layer.wide == ScalarType::Double) {
      merge_pieces<T, double, double>(layer, begin, end);
    } else if (layer.weight.scalar_type() == ScalarType::Float) {
      merge_pieces<T, float, float>(layer, begin, end);
    } else if constexpr (!std::is_same_v<T, double>) {
      merge_pieces<T, float, T>(layer, begin, end);
    }
  });
}

std::vector<Tensor> merge_layers(const std::vector<Tensor>& weights, const std::vector<Tensor>& downs,
                                 const std::vector<Tensor>& ups, const std::vector<double>& scales,
                                 const std::vector<bool>& transposed, std::optional<ScalarType> dtype,
                                 std::optional<bool> channels_last, std::optional<int64_t> stage) {
  const std::size_t count = weights.size();
  STD_TORCH_CHECK(downs.size() == count && ups.size() == count && scales.size() == count && transposed.size() == count,
                  "weights, downs, ups, scales, transposed: expected lists of one length");
  std::vector<Layer> layers;
  std::vector<Tensor> results;
  layers.reserve(count);
  results.reserve(count);
  int64_t pieces = 0, work = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const Shape shape = shape_of_layer(weights[i], downs[i], ups[i], transposed[i], true);
    const ScalarType target = dtype.value_or(weights[i].scalar_type());
    const bool last = weights[i].dim() == 4 && channels_last.value_or(is_channels_last(weights[i]));
    if (stage) {
      check_stage(*stage, shape);
    }
    results.push_back(stage ? empty_like(weights[i], target) : empty_merged(weights[i], shape.stages, target, last));
    layers.push_back(
        layer_of(shape, weights[i], downs[i], ups[i], results.back(), scales[i], target, last, stage, pieces));
    pieces += layers.back().pieces();
    work += layers.back().work();
  }
  parallel(pieces, pieces ? work / pieces : 0, [&](int64_t begin, int64_t end) {
    for (const Layer& layer : layers) {
      const int64_t from = std::max(begin, layer.first), to = std::min(end, layer.first + layer.pieces());
      if (from < to) {
        merge_range(layer, from - layer.first, to - layer.first);
      }
    }
  });
  return results;
}

std::vector<Tensor> merge(std::vector<Tensor> weights, std::vector<Tensor> downs, std::vector<Tensor> ups,
                          std::vector<double> scales, std::vector<bool> transposed, std::optional<ScalarType> dtype,
                          std::optional<bool> channels_last) {
  return merge_layers(weights, downs, ups, scales, transposed, dtype, channels_last, std::nullopt);
}

std::vector<Tensor> merge_stage(std::vector<Tensor> weights, std::vector<Tensor> downs, std::vector<Tensor> ups,
                                std::vector<double> scales, std::vector<bool> transposed, int64_t stage) {
  return merge_layers(weights, downs, ups, scales, transposed, std::nullopt, std::nullopt, stage);
}

}  // namespace

Tensor merge_one(const Tensor& weight, const Tensor& down, const Tensor& up, double scale, ScalarType type) {
  const Shape shape = shape_of_layer(weight, down, up, false, false);
  const Tensor merged = empty_like(weight, type);
  const Layer layer = layer_of(shape, weight, down, up, merged, scale, type, is_channels_last(weight), 0, 0);
  parallel(layer.pieces(), layer.pieces() ? layer.work() / layer.pieces() : 0,
           [&](int64_t begin, int64_t end) { merge_range(layer, begin, end); });
  return merged;
}

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("lora_merge", TORCH_BOX(&merge));
  m.impl("lora_merge_stage", TORCH_BOX(&merge_stage));
}

}  // namespace lorun::lora_merge
