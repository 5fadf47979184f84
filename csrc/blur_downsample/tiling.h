// How blur and downsample cuts planes into tiles, and lays kernels out for them (CPU).
#pragma once

#include <algorithm>
#include <cstdint>

#include "blur_downsample/blur_downsample.h"

namespace lorun::blur_downsample {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int64_t round_up(int64_t a, int64_t step) {
  return ceil_div(a, step) * step;
}

struct Piece {
  int64_t plane, top, left, height, width;
};

// Measurements of planes first to first + planes, cut into pieces of at most rows x cols.
struct Tiling {
  int64_t first, planes, all_rows, all_cols, rows, cols;

  int64_t down() const {
    return ceil_div(all_rows, rows);
  }

  int64_t across() const {
    return ceil_div(all_cols, cols);
  }

  int64_t pieces() const {
    return planes * down() * across();
  }

  Piece piece(int64_t i) const {
    const int64_t top = i / across() % down() * rows, left = i % across() * cols;
    return {first + i / across() / down(), top, left, std::min(rows, all_rows - top), std::min(cols, all_cols - left)};
  }
};

// Packed rows of a tile, in values. Widths are whole vectors, because those are computed.
struct Layout {
  int64_t width;    // measurements across
  int64_t segment;  // measurements across that one phase of a row holds, with what the kernel reaches beyond
  int64_t line;     // all phases

  Layout(const Axis& cols, int64_t tile_cols, int64_t lanes)
      : width(round_up(tile_cols, lanes)),
        segment(width + round_up(cols.most_steps(), lanes)),
        line(cols.scale * segment) {}
};

// Tiles whose packed image fits `bytes`, narrow enough for `max_cols`, and enough of them to occupy all threads alike.
// The results do not depend on the choice.
inline Tiling choose_tiling(const Shape& shape, int64_t first, int64_t planes, int64_t lanes, int64_t value_bytes,
                            int64_t bytes, int64_t max_cols, int64_t step, int64_t threads) {
  const int64_t across = ceil_div(shape.cols.count, max_cols);
  const int64_t cols = std::min(shape.cols.count, round_up(ceil_div(shape.cols.count, across), lanes));
  const int64_t lines = bytes / (Layout(shape.cols, cols, lanes).line * value_bytes);
  const int64_t most = std::max(step, (lines - shape.rows.taps) / shape.rows.scale + 1);
  int64_t down = ceil_div(shape.rows.count, most);
  const auto busy = [&](int64_t count) {
    const int64_t pieces = planes * across * count;
    return static_cast<double>(pieces) / static_cast<double>(round_up(pieces, threads));
  };
  const int64_t limit = std::min(ceil_div(shape.rows.count, 2 * step), down + 4 * threads);
  for (int64_t more = down; more <= limit && busy(down) < 0.9; ++more) {
    down = busy(more) > busy(down) ? more : down;
  }
  const int64_t rows = std::min(shape.rows.count, round_up(ceil_div(shape.rows.count, down), step));
  return {first, planes, shape.rows.count, shape.cols.count, rows, cols};
}

// The kernel reversed, as the forward op reads it: for each row phase, [column][taps down].
template <class W>
void lay_out_forward(const Shape& shape, const W* kernel, W* out) {
  const int64_t kh = shape.rows.taps, kw = shape.cols.taps, s = shape.rows.scale;
  for (int64_t a = 0; a < s; ++a) {
    for (int64_t f = 0; f < kw; ++f) {
      for (int64_t e = a; e < kh; e += s) {
        *out++ = kernel[(kh - 1 - e) * kw + kw - 1 - f];
      }
    }
  }
}

// The kernel as the adjoint reads it: for each row phase, for each column phase, [column][taps down].
template <class W>
void lay_out_adjoint(const Shape& shape, const W* kernel, W* out) {
  const int64_t kh = shape.rows.taps, kw = shape.cols.taps, s = shape.rows.scale;
  for (int64_t p = 0; p < s; ++p) {
    for (int64_t q = 0; q < s; ++q) {
      for (int64_t v = shape.cols.first(q); v < kw; v += s) {
        for (int64_t u = shape.rows.first(p); u < kh; u += s) {
          *out++ = kernel[u * kw + v];
        }
      }
    }
  }
}

}  // namespace lorun::blur_downsample
