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
#include "common/tensor.h"

namespace lorun::winograd_conv2d {

constexpr int64_t kTile = 4, kSpan = 6, kPoints = kSpan * kSpan;
constexpr int64_t kChannels = 8;  // at least, on both sides, unless there are none: one of AVX2's vectors

inline void check_channels(int64_t in, int64_t out) {
  STD_TORCH_CHECK((in == 0 || in >= kChannels) && (out == 0 || out >= kChannels), "expected at least ", kChannels,
                  " channels, got ", in, " and ", out);
}

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

  Place(int64_t image, int64_t top, int64_t left) : image(image), top(top), left(left) {}
};

// u: (36, in, out).
template <class T>
struct Filter {
  int64_t in, out;
  const T* u;
};

// What becomes of results: y = act(result + bias) + added + more, whose rows lie `row` values apart. bias, added and
// more, both as y, may be null. S: what images are stored as; all else is Wide<S>.
template <class S>
struct Finish {
  int64_t channels;
  S* y;
  int64_t row;
  const Wide<S>* bias;
  const S *added, *more;
  bool relu;
};

// Channels innermost everywhere: x (n, height, width, in); y and what is added (n, height, width, out).
template <class S>
struct Problem : Images {
  Filter<Wide<S>> filter;
  const S* x;
  Finish<S> to;
};

// Two convolutions, a ReLU between them, to other channels and back.
template <class S>
struct Block : Images {
  Filter<Wide<S>> first, second;
  const S* x;
  const Wide<S>* first_bias;
  Finish<S> to;
};

// Columns [begin, end) of an image's tiles.
struct Panel {
  int64_t image, begin, end;
};

// What lies between a block's convolutions, of the 12 rows of pixels that are needed at a time: three rows of tiles in
// turns, wide enough for a panel's columns and one more on each side. One row of zeros stands for those outside the
// image.
template <class S>
struct Ring {
  static constexpr int64_t kSlots = 3, kRows = kSlots * kTile + 1;
  int64_t channels, row;
  S* values;

  Ring(int64_t columns, int64_t channels) : channels(channels), row((columns + 2) * kTile * channels) {
    values = static_cast<S*>(scratch<Ring>(kRows * row * sizeof(S)));
    std::fill_n(values + (kRows - 1) * row, row, S(0));
  }

  // The first pixel row of a row of tiles.
  S* slot(int64_t tile_row) const {
    return values + tile_row % kSlots * kTile * row;
  }

  const S* zeros() const {
    return values + (kRows - 1) * row;
  }

  // Where a column of the image's pixels lies in a row.
  int64_t column(const Panel& panel, int64_t x) const {
    return (x - (panel.begin - 1) * kTile) * channels;
  }

  // Zeros in all columns outside the image: no result is written there.
  void clear_margins(const Panel& panel, int64_t width) const {
    const int64_t left = std::max<int64_t>(column(panel, 0), 0);
    const int64_t right = std::min(column(panel, width), row);
    for (int64_t i = 0; i + 1 < kRows; ++i) {
      std::fill_n(values + i * row, left, S(0));
      std::fill(values + i * row + right, values + (i + 1) * row, S(0));
    }
  }
};

// grad (n, height, width, out): of the result.
template <class S>
struct GradientProblem : Images {
  int64_t in, out;
  const S *x, *grad;
};

// From one row of channels to the next in work space: as many values as fill vectors of AVX2.
template <class T>
int64_t whole_vectors(int64_t channels) {
  constexpr int64_t kCount = 32 / sizeof(T);
  return (channels + kCount - 1) / kCount * kCount;
}

// Of one thread: v, a row of channels for each tile and point; m, in the forward pass their products, in the backward
// pass the same of the gradient; padded, a tile that leaves the image.
template <class S>
struct Work {
  using T = Wide<S>;
  int64_t tiles;             // at a time
  int64_t v_pitch, m_pitch;  // from point to point
  T *v, *m;
  S* padded;

  Work(int64_t tiles, int64_t in, int64_t out) : tiles(tiles) {
    // Points a multiple of 4 KB apart would compete for the same places of the first-level cache.
    constexpr int64_t kApart = 64 / sizeof(T);
    v_pitch = tiles * whole_vectors<T>(in) + kApart;
    m_pitch = tiles * whole_vectors<T>(out) + kApart;
    v = static_cast<T*>(scratch<Work>(kPoints * (v_pitch + m_pitch + std::max(in, out)) * sizeof(T)));
    m = v + kPoints * v_pitch;
    padded = reinterpret_cast<S*>(m + kPoints * m_pitch);
  }
};

}  // namespace lorun::winograd_conv2d
