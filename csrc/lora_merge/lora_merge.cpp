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

#define LORUN_KERNELS "lora_merge/update.inl"
#include "common/for_each_variant.h"

namespace lorun::lora_merge {
namespace {

struct Slot;

Shape shape_of_layer(const Tensor& weight, const Tensor& down, const Tensor& up, bool transposed) {
  STD_TORCH_CHECK(weight.dim() == 2 || weight.dim() == 4, "weight: expected 2 or 4 dimensions, got ", shape_of(weight));
  STD_TORCH_CHECK(up.dim() == 3 && down.dim() >= 3 && down.size(0) == up.size(0),
                  "down, up: expected a common leading stage axis, got ", shape_of(down), " and ", shape_of(up));
  Shape s{};
  s.stages = up.size(0);
  s.lead = weight.size(0);
  s.channels = weight.size(1);
  s.taps = weight.dim() == 4 ? weight.size(2) * weight.size(3) : 1;
  s.rows = up.size(1);
  s.rank = up.size(2);
  s.batch = transposed && down.dim() == 5 ? s.lead : 1;
  const int64_t products = s.batch * s.rows;
  s.cols = products > 0 ? s.weight() / products : 0;
  STD_TORCH_CHECK(products * s.cols == s.weight() && down.numel() == s.stages * s.batch * s.rank * s.cols,
                  "down, up: expected factors of weight ", shape_of(weight), ", got ", shape_of(down), " and ",
                  shape_of(up));
  return s;
}

bool is_channels_last(const Tensor& weight) {
  return weight.dim() == 4 && weight.size(1) > 1 && weight.stride(1) == 1 && !weight.is_contiguous();
}

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

// The tensor itself, or a dense copy in the type that sums are formed in.
Tensor widened(const Tensor& t, ScalarType wide) {
  if (t.scalar_type() == wide && t.is_contiguous()) {
    return t;
  }
  Tensor copy = torch::stable::new_empty(t, t.sizes(), wide);
  torch::stable::copy_(copy, t);
  return copy;
}

struct Layer {
  Shape shape;
  ScalarType wide, target;
  Tensor weight, down, up, merged;
  double scale;
  bool channels_last;
  int64_t first;  // of its pieces of work among all layers'

  int64_t pieces() const {
    return shape.stages * shape.lead;
  }
};

template <class T, class W>
LORUN_INLINE inline T round_to(W v) {
  if constexpr (std::is_same_v<T, double>) {
    return v;
  } else {
    return narrow<T>(static_cast<float>(v));
  }
}

// Pieces [begin, end) of a layer.
template <class T, class W>
void merge_pieces(const Layer& layer, int64_t begin, int64_t end) {
  const Shape& s = layer.shape;
  const int64_t n = s.slice(), factors = s.batch * s.rank * s.cols;
  const W* weight = layer.weight.const_data_ptr<W>();
  const W* down = layer.down.const_data_ptr<W>();
  const W* up = layer.up.const_data_ptr<W>();
  T* merged = layer.merged.mutable_data_ptr<T>();
  const W scale = static_cast<W>(layer.scale);
  W* sums = static_cast<W*>(scratch<Slot>(n * sizeof(W)));
  const auto kernel = LORUN_PICK(update<W>);
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t k = piece / s.lead, a = piece % s.lead;
    kernel(s, down + k * factors, up + k * s.rows * s.rank, a * n, n, sums);
    const W* base = weight + a * n;
    T* out = merged + piece * n;
    multiversion([&](auto) LORUN_INLINE {
      if (!layer.channels_last) {
        for (int64_t v = 0; v < n; ++v) {
          out[v] = round_to<T>(base[v] + scale * sums[v]);
        }
        return;
      }
      for (int64_t tap = 0; tap < s.taps; ++tap) {
        for (int64_t c = 0; c < s.channels; ++c) {
          out[tap * s.channels + c] = round_to<T>(base[c * s.taps + tap] + scale * sums[c * s.taps + tap]);
        }
      }
    });
  }
}

void merge_range(const Layer& layer, int64_t begin, int64_t end) {
  dispatch_storage(layer.target, "dtype", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (layer.wide == ScalarType::Double) {
      merge_pieces<T, double>(layer, begin, end);
    } else {
      merge_pieces<T, float>(layer, begin, end);
    }
  });
}

std::vector<Tensor> merge(std::vector<Tensor> weights, std::vector<Tensor> downs, std::vector<Tensor> ups,
                          std::vector<double> scales, std::vector<bool> transposed, std::optional<ScalarType> dtype,
                          std::optional<bool> channels_last) {
  const std::size_t count = weights.size();
  STD_TORCH_CHECK(downs.size() == count && ups.size() == count && scales.size() == count && transposed.size() == count,
                  "weights, downs, ups, scales, transposed: expected lists of one length");
  std::vector<Layer> layers;
  std::vector<Tensor> results;
  layers.reserve(count);
  results.reserve(count);
  int64_t pieces = 0, work = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const Shape shape = shape_of_layer(weights[i], downs[i], ups[i], transposed[i]);
    const ScalarType wide = wide_type(weights[i].scalar_type());
    const ScalarType target = dtype.value_or(weights[i].scalar_type());
    const bool last = weights[i].dim() == 4 && channels_last.value_or(is_channels_last(weights[i]));
    results.push_back(empty_merged(weights[i], shape.stages, target, last));
    layers.push_back({shape, wide, target, widened(weights[i], wide), widened(downs[i], wide), widened(ups[i], wide),
                      results.back(), scales[i], last, pieces});
    pieces += layers.back().pieces();
    work += layers.back().pieces() * shape.slice() * (1 + shape.rank / 4);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("lora_merge", TORCH_BOX(&merge));
}

}  // namespace lorun::lora_merge
