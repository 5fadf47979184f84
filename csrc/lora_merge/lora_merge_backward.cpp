// Gradients of the factors of one stage from those of its merged weights, on the CPU (formulas in lora_merge.h): all
// layers in one parallel loop, whose pieces are blocks of columns of down and blocks of rows of up.
//
// Bytes: G twice, from the caches for all but the largest layers, and both factors; operations: 4 rank for each value
// of G.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "lora_merge/lora_merge.h"

namespace lorun::lora_merge {

inline constexpr int64_t kRanks = 4;     // rows of down that are summed together
inline constexpr int64_t kColumns = 96;  // of down in a piece: whole groups of vectors of every variant
inline constexpr int64_t kRows = 256;    // of up in a piece
inline constexpr int64_t kDeep = 256;    // columns of down that are turned at a time
inline constexpr int64_t kAcross = 32;   // ranks of up that are summed together

}  // namespace lorun::lora_merge

#define LORUN_KERNELS "lora_merge/gradients.inl"
#include "common/for_each_variant.h"

namespace lorun::lora_merge {
namespace {

struct Slot;

struct Layer {
  Shape shape;
  ScalarType wide;
  Tensor grad, down, up, of_down, of_up;
  double scale;
  int64_t stage, first;  // of its pieces among all layers'

  int64_t column_blocks() const {
    return (shape.cols + kColumns - 1) / kColumns;
  }

  int64_t down_pieces() const {
    return shape.batch * column_blocks();
  }

  int64_t pieces() const {
    return down_pieces() + (shape.rows + kRows - 1) / kRows;
  }

  int64_t work() const {
    return shape.weight() * (1 + shape.rank / 2);
  }
};

// Pieces [begin, end) of a layer: first those of down, then those of up.
template <class W>
void run(const Layer& layer, int64_t begin, int64_t end) {
  const Shape& s = layer.shape;
  const W* g = layer.grad.const_data_ptr<W>();
  const W* down = layer.down.const_data_ptr<W>() + layer.stage * s.down();
  const W* up = layer.up.const_data_ptr<W>() + layer.stage * s.rows * s.rank;
  W* of_down = layer.of_down.mutable_data_ptr<W>() + layer.stage * s.down();
  W* of_up = layer.of_up.mutable_data_ptr<W>() + layer.stage * s.rows * s.rank;
  const W scale = static_cast<W>(layer.scale);
  W* const across = static_cast<W*>(scratch<Slot>((kDeep + kRows) * kAcross * sizeof(W)));
  for (int64_t piece = begin; piece < end; ++piece) {
    if (piece < layer.down_pieces()) {
      const int64_t b = piece / layer.column_blocks(), first = piece % layer.column_blocks() * kColumns;
      LORUN_PICK(down_gradient<W>)
      (s, g + b * s.rows * s.cols, up, scale, first, std::min(s.cols, first + kColumns), of_down + b * s.rank * s.cols);
    } else {
      const int64_t first = (piece - layer.down_pieces()) * kRows;
      LORUN_PICK(up_gradient<W>)
      (s, g + first * s.cols, down, scale, std::min(kRows, s.rows - first), across, across + kDeep * kAcross,
       of_up + first * s.rank);
    }
  }
}

// Of the factor's shape; zeros at the other stages.
Tensor empty_gradient(const Tensor& factor, ScalarType wide) {
  const Tensor made = empty_beside(factor, factor.sizes().data(), factor.dim(), wide);
  return factor.size(0) > 1 ? torch::stable::fill_(made, 0) : made;
}

std::vector<Tensor> backward(std::vector<Tensor> grads, std::vector<Tensor> downs, std::vector<Tensor> ups,
                             std::vector<double> scales, std::vector<bool> transposed, int64_t stage) {
  const std::size_t count = grads.size();
  STD_TORCH_CHECK(downs.size() == count && ups.size() == count && scales.size() == count && transposed.size() == count,
                  "grads, downs, ups, scales, transposed: expected lists of one length");
  std::vector<Layer> layers;
  layers.reserve(count);
  int64_t pieces = 0, work = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const Shape shape = shape_of_layer(grads[i], downs[i], ups[i], transposed[i], true);
    check_stage(stage, shape);
    const ScalarType wide = wide_type(grads[i].scalar_type());
    layers.push_back({shape, wide, dense_in_type(grads[i], wide), dense_in_type(downs[i], wide),
                      dense_in_type(ups[i], wide), empty_gradient(downs[i], wide), empty_gradient(ups[i], wide),
                      scales[i], stage, pieces});
    pieces += layers.back().pieces();
    work += layers.back().work();
  }
  parallel(pieces, pieces ? work / pieces : 0, [&](int64_t begin, int64_t end) {
    for (const Layer& layer : layers) {
      const int64_t from = std::max(begin, layer.first) - layer.first;
      const int64_t to = std::min(end - layer.first, layer.pieces());
      if (from < to) {
        layer.wide == ScalarType::Double ? run<double>(layer, from, to) : run<float>(layer, from, to);
      }
    }
  });
  std::vector<Tensor> found;
  found.reserve(2 * count);
  for (std::size_t i = 0; i < count; ++i) {
    found.push_back(dense_in_type(layers[i].of_down, downs[i].scalar_type()));
  }
  for (std::size_t i = 0; i < count; ++i) {
    found.push_back(dense_in_type(layers[i].of_up, ups[i].scalar_type()));
  }
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("lora_merge_stage_backward", TORCH_BOX(&backward));
}

}  // namespace lorun::lora_merge
