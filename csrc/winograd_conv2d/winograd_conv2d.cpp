// 3x3 convolution by F(4x4, 3x3) on the CPU (formulas in winograd_conv2d.h).
//
// A thread takes a few tiles at a time through both transforms and the products between them, so that what lies
// between, 36 values a tile and channel, stays in its second-level cache. The products are register tiles of 6
// (AVX-512: 12) image tiles and two vectors of channels. Bias, activation and residual are applied to results in
// registers. A residual block's second convolution follows its first by a row of tiles, where both fit the cache.

#include "winograd_conv2d/winograd_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "common/caches.h"
#include "common/convert.h"
#include "common/finishing.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/tensor.h"

#define LORUN_KERNELS "winograd_conv2d/tiles.inl"
#include "common/for_each_variant.h"

#define LORUN_KERNELS "winograd_conv2d/tiles.inl"
#include "common/bf16_variant.h"

namespace lorun::winograd_conv2d {
namespace {

constexpr int64_t kMultiple = 12;          // of tiles, as the products want them
constexpr int64_t kWorkBytes = 128 << 10;  // a part of the second-level cache
constexpr int64_t kRingBytes = 256 << 10;  // another: what lies between a block's convolutions
constexpr int64_t kFewColumns = 8;         // of a panel, whose neighbours' are computed twice

// Tiles that a thread takes at a time.
template <class T>
int64_t tiles_together(int64_t channels) {
  const int64_t bytes = kPoints * channels * static_cast<int64_t>(sizeof(T));
  return std::max(kWorkBytes / std::max(bytes, int64_t{1}) / kMultiple, int64_t{1}) * kMultiple;
}

template <class S>
void run(const Problem<S>& p) {
  using T = Wide<S>;
  const int64_t in = p.filter.in, out = p.filter.out, together = tiles_together<T>(in + out);
  const auto kernel = LORUN_PICK_STORING(S, variant_for<T>(in, out), convolve<S>);
  const int64_t blocks = (p.tiles() + together - 1) / together;
  parallel(blocks, together * kPoints * (in + out), [&](int64_t begin, int64_t end) {
    const Work<S> w(together, in, out);
    for (int64_t b = begin; b < end; ++b) {
      kernel(p, w, b * together, std::min((b + 1) * together, p.tiles()));
    }
  });
}

// Columns of a panel whose ring has its size, and 0 if a block's filters do not lie in the second-level cache beside it
// and a thread's points: then it is two passes.
template <class S>
int64_t columns_of_block(int64_t channels, int64_t middle) {
  using T = Wide<S>;
  constexpr int64_t kBytes = sizeof(T);
  const int64_t column = Ring<S>::kRows * kTile * middle * static_cast<int64_t>(sizeof(S));
  const int64_t columns = kRingBytes / std::max<int64_t>(column, 1) - 2;
  const int64_t filters = 2 * kPoints * channels * middle * kBytes;
  const int64_t points = tiles_together<T>(channels + middle) * kPoints * (channels + middle) * kBytes;
  const bool fit = filters + kRingBytes + points <= second_level_cache();
  return fit && columns >= kFewColumns ? columns : 0;
}

// A thread takes rows of tiles of one panel, and first those of the first convolution that its neighbours compute too.
template <class S>
void run(const Block<S>& p, int64_t columns) {
  using T = Wide<S>;
  const int64_t channels = p.first.in, middle = p.first.out, together = tiles_together<T>(channels + middle);
  const auto kernel = LORUN_PICK_STORING(S, variant_for<T>(channels, middle), block<S>);
  const Slices panels(p.tile_columns(), (p.tile_columns() + columns - 1) / columns, 1);
  const int64_t rows = p.tile_rows(), work = panels.size * kPoints * 2 * (channels + middle);
  parallel(p.n * panels.count * rows, work, [&](int64_t begin, int64_t end) {
    const Work<S> w(together, std::max(channels, middle), std::max(channels, middle));
    const Ring<S> ring(panels.size, middle);
    for (int64_t at = begin, next; at < end; at = next) {
      const int64_t panel = at / rows, first = at % rows;
      next = std::min(end, (panel + 1) * rows);
      const int64_t i = panel % panels.count;
      kernel(p, w, ring, {panel / panels.count, panels.begin(i), panels.end(i)}, first, first + next - at);
    }
  });
}

Tensor fitting_filter(const char* name, const Tensor& weight, int64_t in, int64_t out, ScalarType wide) {
  check_channels(in, out);
  check_shape(name, weight, {kPoints, in, out});
  check_type(name, weight, wide);
  return dense(weight);
}

Tensor convolution(Tensor x, Tensor weight, std::optional<Tensor> bias, bool relu, std::optional<Tensor> residual) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 3, "x, weight: expected 4 and 3 dimensions, got ", shape_of(x),
                  " and ", shape_of(weight));
  const Images images{x.size(0), x.size(2), x.size(3)};
  const int64_t in = x.size(1), out = weight.size(2), row = images.width * out;
  const ScalarType type = x.scalar_type(), wide = wide_type(type);
  const Tensor points = fitting_filter("weight", weight, in, out, wide), image = channels_inside(x);
  const std::optional<Tensor> offset = fitting_bias("bias", bias, out, wide);
  const std::optional<Tensor> added = fitting_residual(residual, x, out);
  const Tensor y = empty_channels_last(x, images.n, out, images.height, images.width, type);
  dispatch_storage(type, "x", [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Wide<S>;
    const Finish<S> to{out, y.mutable_data_ptr<S>(), row, pointer<T>(offset), pointer<S>(added), nullptr, relu};
    run(Problem<S>{images, {in, out, points.const_data_ptr<T>()}, image.const_data_ptr<S>(), to});
  });
  return y;
}

Tensor residual_block(Tensor x, Tensor first, std::optional<Tensor> first_bias, Tensor second,
                      std::optional<Tensor> second_bias, std::optional<Tensor> residual) {
  STD_TORCH_CHECK(x.dim() == 4 && first.dim() == 3, "x, first: expected 4 and 3 dimensions, got ", shape_of(x), " and ",
                  shape_of(first));
  const Images images{x.size(0), x.size(2), x.size(3)};
  const int64_t channels = x.size(1), middle = first.size(2), width = images.width;
  const ScalarType type = x.scalar_type(), wide = wide_type(type);
  const Tensor image = channels_inside(x), points = fitting_filter("first", first, channels, middle, wide);
  const Tensor other_points = fitting_filter("second", second, middle, channels, wide);
  const std::optional<Tensor> offset = fitting_bias("first_bias", first_bias, middle, wide);
  const std::optional<Tensor> other_offset = fitting_bias("second_bias", second_bias, channels, wide);
  const std::optional<Tensor> more = fitting_residual(residual, x, channels);
  const Tensor y = empty_channels_last(x, images.n, channels, images.height, width, type);
  dispatch_storage(type, "x", [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Wide<S>;
    const Filter<T> one{channels, middle, points.const_data_ptr<T>()};
    const Filter<T> other{middle, channels, other_points.const_data_ptr<T>()};
    const S* pixels = image.const_data_ptr<S>();
    const T* bias = pointer<T>(offset);
    const Finish<S> to{
        channels, y.mutable_data_ptr<S>(), width * channels, pointer<T>(other_offset), pixels, pointer<S>(more), false};
    const int64_t columns = columns_of_block<S>(channels, middle);
    if (columns > 0) {
      run(Block<S>{images, one, other, pixels, bias, to}, columns);
      return;
    }
    const Tensor between = empty_beside(x, {images.n, images.height, width, middle}, type);
    S* values = between.mutable_data_ptr<S>();
    run(Problem<S>{images, one, pixels, {middle, values, width * middle, bias, nullptr, nullptr, true}});
    run(Problem<S>{images, other, values, to});
  });
  return y;
}

constexpr double kG[kSpan][3] = {{1. / 4, 0, 0},
                                 {-1. / 6, -1. / 6, -1. / 6},
                                 {-1. / 6, 1. / 6, -1. / 6},
                                 {1. / 24, 1. / 12, 1. / 6},
                                 {1. / 24, -1. / 12, 1. / 6},
                                 {0, 0, 1}};

// U of one input channel for `kLanes` output channels or fewer, `count`: u[point][lane].
constexpr int64_t kLanes = 8;

template <class S>
LORUN_INLINE inline void points(const S* w, int64_t row, int64_t column, int64_t channel, int64_t count,
                                double (&u)[kPoints][kLanes]) {
  double taps[3][3][kLanes] = {}, half[kSpan][3][kLanes];
  for (int64_t l = 0; l < count; ++l) {
    for (int a = 0; a < 3; ++a) {
      for (int b = 0; b < 3; ++b) {
        taps[a][b][l] = widen(w[a * row + b * column + l * channel]);
      }
    }
  }
  for (int i = 0; i < kSpan; ++i) {
    for (int b = 0; b < 3; ++b) {
      for (int64_t l = 0; l < kLanes; ++l) {
        half[i][b][l] = kG[i][0] * taps[0][b][l] + kG[i][1] * taps[1][b][l] + kG[i][2] * taps[2][b][l];
      }
    }
  }
  for (int i = 0; i < kSpan; ++i) {
    for (int j = 0; j < kSpan; ++j) {
      for (int64_t l = 0; l < kLanes; ++l) {
        u[i * kSpan + j][l] = kG[j][0] * half[i][0][l] + kG[j][1] * half[i][1][l] + kG[j][2] * half[i][2][l];
      }
    }
  }
}

Tensor weight_points(Tensor weight, bool adjoint) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                  "weight: expected (out, in, 3, 3), got ", shape_of(weight));
  const ScalarType type = weight.scalar_type();
  // Of the convolution that is asked for: `out` of its channels, each with `in`, and where their taps lie.
  const int64_t out = weight.size(adjoint ? 1 : 0), in = weight.size(adjoint ? 0 : 1);
  const int64_t by_out = weight.stride(adjoint ? 1 : 0), by_in = weight.stride(adjoint ? 0 : 1);
  const int64_t sign = adjoint ? -1 : 1, row = sign * weight.stride(2), column = sign * weight.stride(3);
  const int64_t first = adjoint ? 2 * (weight.stride(2) + weight.stride(3)) : 0;
  const Tensor u = empty_beside(weight, {kPoints, in, out}, wide_type(type));
  dispatch_storage(type, "weight", [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Wide<S>;
    const S* w = weight.const_data_ptr<S>() + first;
    T* to = u.mutable_data_ptr<T>();
    // Lanes are neighbours in U: what they read lies apart, but meets them again a channel later, in the cache.
    parallel((out + kLanes - 1) / kLanes, kLanes * in * kPoints, [&](int64_t begin, int64_t end) {
      multiversion([&](auto) LORUN_INLINE {
        double found[kPoints][kLanes];
        for (int64_t o = begin * kLanes; o < std::min(end * kLanes, out); o += kLanes) {
          const int64_t count = std::min(kLanes, out - o);
          for (int64_t c = 0; c < in; ++c) {
            points(w + o * by_out + c * by_in, row, column, by_out, count, found);
            T* at = to + c * out + o;
            for (int64_t p = 0; p < kPoints; ++p, at += in * out) {
              for (int64_t l = 0; l < count; ++l) {
                at[l] = static_cast<T>(found[p][l]);
              }
            }
          }
        }
      });
    });
  });
  return u;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("winograd_conv2d", TORCH_BOX(&convolution));
  m.impl("winograd_block", TORCH_BOX(&residual_block));
  m.impl("winograd_weight", TORCH_BOX(&weight_points));
}

}  // namespace lorun::winograd_conv2d
