// Both gradients by AMX (packed_factor_gradients.h).
#pragma once

#include "common/amx.h"

#ifdef LORUN_AMX

#include <immintrin.h>

#include <algorithm>

#include "packed_factor_gradients/packed_factor_gradients.h"
#include "packed_weight_gradient/tiles.h"

namespace lorun::packed_factor_gradients {

using packed_weight_gradient::Fetch;
using packed_weight_gradient::kDepth;
using packed_weight_gradient::kLanes;

constexpr int64_t kMaxRank = kLanes;

// Where the rows of the kernel lie under each of four tiles of 16 results; null: a row of zeros, under all four.
struct Under {
  const BFloat16* rows[packed_conv2d::kMaxKernel][4];
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
      fetch.advance();
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

// A row of sums (width, 16), rounded to bf16, and a pixel more where the width is odd.
LORUN_TARGET_AMX inline void round_row(const float* sums, int64_t width, BFloat16* to) {
  for (int64_t w = 0; w < width; w += 2, sums += 2 * kLanes, to += 2 * kLanes) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_load_ps(sums + kLanes), _mm512_load_ps(sums));
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(rounded));
  }
}

}  // namespace lorun::packed_factor_gradients

#endif
