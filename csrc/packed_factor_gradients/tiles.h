// Both gradients by AMX (packed_factor_gradients.h).
#pragma once

#include "common/ahead.h"
#include "common/amx.h"

#ifdef LORUN_AMX

#include <immintrin.h>

#include <algorithm>

#include "packed_factor_gradients/packed_factor_gradients.h"
#include "packed_weight_gradient/tiles.h"

namespace lorun::packed_factor_gradients {

using packed_weight_gradient::kDepth;
using packed_weight_gradient::kLanes;

constexpr int64_t kMaxRank = kLanes;

// Where the rows of the kernel lie under each of four tiles of 16 results; null: a row of zeros, under all four.
struct Under {
  const BFloat16* rows[packed_conv2d::kMaxKernel][4];
};

// Rows of both images that are needed next.
struct Fetch {
  Ahead x, grad;
};

// sums (16 * Tiles pixels, 16) of a convolution to at most 16 channels.
template <int Tiles>
LORUN_TARGET_AMX inline void narrow_tiles(const Filter<BFloat16>& f, const Under& under, float* sums, Fetch& fetch) {
  const int64_t values = f.steps() * kDepth, pitch = 2 * f.in;
  const BFloat16* weight = f.w;
  tile_fence();
  unrolled<Tiles>([&]<int T>() LORUN_INLINE { tile_zero<T>(); });
  for (int64_t row = 0; row < f.kernel; ++row, weight += values * kLanes) {
    const auto& x = under.rows[row];
    for (int64_t j = 0; x[0] != nullptr && j < values; j += kDepth) {
      tile_load<6>(weight + j * kLanes, 64);
      unrolled<Tiles>([&]<int T>() LORUN_INLINE {
        tile_load<4 + T % 2>(x[T] + j, pitch);
        tile_multiply_add<T, 4 + T % 2, 6>();
      });
      fetch.x.advance();
      fetch.grad.advance();
    }
  }
  unrolled<Tiles>([&]<int T>() LORUN_INLINE { tile_store<T>(sums + T * kLanes * kLanes, 64); });
}

// Values that a tile of 16 results reads from a row.
inline int64_t tile_room(const Filter<BFloat16>& f) {
  return (kLanes - 1) * f.in + f.steps() * kDepth;
}

// Steps of the products that make `width` results.
inline int64_t narrow_steps(const Filter<BFloat16>& f, int64_t width) {
  return (width + 4 * kLanes - 1) / (4 * kLanes) * f.kernel * f.steps();
}

// Row h of a convolution of image (height, width, f.in), stride 1, to at most 16 channels: sums (result's width rounded
// up to 16, 16). edge: work space of 4 * f.kernel * tile_room(f) values, for tiles that would leave the row.
inline void narrow_row(const Filter<BFloat16>& f, const BFloat16* image, int64_t height, int64_t width, int64_t h,
                       BFloat16* edge, float* sums, Fetch fetch = {}) {
  const int64_t results = f.result(width), room = tile_room(f);
  Under under;
  for (int64_t first = 0; first < results; first += 4 * kLanes) {
    const int64_t tiles = std::min<int64_t>((results - first + kLanes - 1) / kLanes, 4);
    for (int64_t row = 0; row < f.kernel; ++row) {
      const int64_t from = h - f.padding + row;
      const BFloat16* line = from >= 0 && from < height ? image + from * width * f.in : nullptr;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t begin = (first + tile * kLanes - f.padding) * f.in, end = begin + room;
        if (line == nullptr || (begin >= 0 && end <= width * f.in)) {
          under.rows[row][tile] = line == nullptr ? nullptr : line + begin;
          continue;
        }
        BFloat16* to = edge + (row * 4 + tile) * room;
        const int64_t filled = std::max<int64_t>(begin, 0), last = std::max(std::min(end, width * f.in), filled);
        std::fill_n(to, room, BFloat16{});
        std::copy(line + filled, line + last, to + filled - begin);
        under.rows[row][tile] = to;
      }
    }
    float* to = sums + first * kLanes;
    if (tiles > 2) {
      tiles == 4 ? narrow_tiles<4>(f, under, to, fetch) : narrow_tiles<3>(f, under, to, fetch);
    } else {
      tiles == 2 ? narrow_tiles<2>(f, under, to, fetch) : narrow_tiles<1>(f, under, to, fetch);
    }
  }
}

// Pixels w and w + 1 of a row of sums (width, 16), rounded and interleaved; zeros after the row.
LORUN_TARGET_AMX LORUN_INLINE inline __m512i rounded_pair(const float* sums, int64_t w, int64_t width) {
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512 one = w < width ? _mm512_load_ps(sums + w * kLanes) : _mm512_setzero_ps();
  const __m512 two = w + 1 < width ? _mm512_load_ps(sums + (w + 1) * kLanes) : _mm512_setzero_ps();
  return _mm512_permutexvar_epi16(interleaved, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(two, one)));
}

// A row of sums as the next row of the gradient's lines. left: where the first block begins.
LORUN_TARGET_AMX inline void add_sums(const float* sums, int64_t width, packed_weight_gradient::GradientLines& lines,
                                      BFloat16* left) {
  lines.add([&](int64_t w) LORUN_TARGET_AMX LORUN_INLINE { return rounded_pair(sums, w, width); }, left);
}

}  // namespace lorun::packed_factor_gradients

#endif
