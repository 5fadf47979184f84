// 3x3 convolution with stride 1 and padding 1 by minimal filtering F(4x4, 3x3) (Winograd; Lavin and Gray,
// arXiv 1509.09308). Of every 4 x 4 tile of the result,
//
//   y = A^T (sum over channels of U[c] * B^T d[c] B) A,     U = G w G^T,     * element by element,
//
// d being the 6 x 6 tile of the image around it: 36 products in place of 144, and 36 matrix products over channels
// ("points") for all tiles. The matrices are in lorun_fast/reference/winograd_conv2d.py.
//
// The transpose of the convolution is one with in and out exchanged and w turned by half. The gradient of w is
//
//   G^T (sum over tiles of B^T d B * A g A^T) G,
//
// g being the 4 x 4 tile of the result's gradient.
//
// Operations a tile, in and out channels C: 36 C^2 multiply-adds, and some 250 C for the transforms, against 144 C^2.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/scratch.h"
#include "common/simd.h"

namespace lorun::winograd_conv2d {

constexpr int64_t kTile = 4, kSpan = 6, kPoints = kSpan * kSpan;
constexpr int64_t kChannels = 8;  // both channel counts are multiples of it

struct Images {
  int64_t n, height, width;

  int64_t tile_rows() const {
    return (height + kTile - 1) / kTile;
  }

  int64_t tile_columns() const {
    return (width + kTile - 1) / kTile;
  }

  int64_t tiles() const {
    return n * tile_rows() * tile_columns();
  }
};

// A tile's place: its image, and its first pixel of the result.
struct Place {
  int64_t image, top, left;

  Place(const Images& i, int64_t tile)
      : image(tile / (i.tile_rows() * i.tile_columns())),
        top(tile / i.tile_columns() % i.tile_rows() * kTile),
        left(tile % i.tile_columns() * kTile) {}
};

// Channels innermost everywhere: x (n, height, width, in); y and residual (n, height, width, out); u (36, in, out).
template <class T>
struct Problem : Images {
  int64_t in, out;
  const T *x, *u, *bias, *residual;  // the last two may be null
  T* y;
  bool relu;
};

// grad (n, height, width, out): of the result.
template <class T>
struct GradientProblem : Images {
  int64_t in, out;
  const T *x, *grad;
};

// The widest vectors that both channel counts fill.
template <class T>
CpuVariant variant_for(int64_t in, int64_t out) {
  constexpr int64_t kWide = 64 / sizeof(T);
  const bool fill = in % kWide == 0 && out % kWide == 0;
  const CpuVariant active = active_variant();
  return active == CpuVariant::kAvx512 && !fill ? CpuVariant::kAvx2 : active;
}

// Of one thread: v, a row of channels for each tile and point; m, in the forward pass their products, in the backward
// pass the same of the gradient; padded, a tile that leaves the image.
template <class T>
struct Work {
  int64_t v_pitch, m_pitch;  // from point to point
  T *v, *m, *padded;

  Work(int64_t tiles, int64_t in, int64_t out) {
    // Points a multiple of 4 KB apart would compete for the same places of the first-level cache.
    constexpr int64_t kApart = 64 / sizeof(T);
    v_pitch = tiles * in + kApart;
    m_pitch = tiles * out + kApart;
    v = static_cast<T*>(scratch<Work>(kPoints * (v_pitch + m_pitch + std::max(in, out)) * sizeof(T)));
    m = v + kPoints * v_pitch;
    padded = m + kPoints * m_pitch;
  }
};

}  // namespace lorun::winograd_conv2d
