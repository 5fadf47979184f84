// Strips of results by AMX (formulas in packed_conv2d.h): the products of one strip, and between them the results of
// the strip before it, rounded and stored. One after the other they would leave the tiles idle, for both take more
// instructions than the processor looks ahead.
#pragma once

#include "common/ahead.h"
#include "common/amx.h"

#ifdef LORUN_AMX

#include <immintrin.h>

#include <algorithm>

#include "packed_conv2d/packed_conv2d.h"

namespace lorun::packed_conv2d {

// Sums of a strip that wait to be finished: (blocks, room, 16), of which the first `pixels` of each block count.
struct Waiting {
  const float* sums;
  int64_t room, pixels;
  Finish<BFloat16> to;
};

constexpr int kGated = -1;  // zeros where the gate is not positive, nothing is added

// act(sums + bias) + added, rounded: a few vectors at a time, pixel by pixel, then the next block of channels.
template <bool Relu, int Count>  // Count: of images that are added, or kGated
class Finisher {
 public:
  LORUN_TARGET_AMX LORUN_INLINE inline explicit Finisher(const Waiting& w) : w_(w), pitch_(w.to.pitch) {
    begin(0);
  }

  int64_t vectors() const {
    return (w_.to.channels + kChannels - 1) / kChannels * w_.pixels;
  }

  // The next `count` vectors, or those left of a block.
  LORUN_TARGET_AMX LORUN_INLINE inline void advance(int64_t count) {
    count = std::min(count, left_);
    left_ -= count;
    for (; count > 0; --count) {
      one();
    }
    if (left_ == 0) [[unlikely]] {
      begin(channel_ + kChannels);
    }
  }

  LORUN_TARGET_AMX LORUN_INLINE inline void rest() {
    while (left_ > 0) {
      advance(left_);
    }
  }

 private:
  LORUN_TARGET_AMX LORUN_INLINE inline void begin(int64_t channel) {
    const Finish<BFloat16>& to = w_.to;
    const int64_t channels = std::min(to.channels - channel, kChannels);
    if (channels <= 0) {
      return;
    }
    channel_ = channel;
    left_ = w_.pixels;
    lanes_ = (1u << channels) - 1;
    bias_ = to.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(lanes_, to.bias + channel);
    sums_ = w_.sums + channel * w_.room;
    y_ = to.y + channel;
    if constexpr (Count == kGated) {
      first_ = to.gate + channel;
    }
    if constexpr (Count >= 1) {
      first_ = to.added.first + channel;
    }
    if constexpr (Count >= 2) {
      second_ = to.added.second + channel;
    }
  }

  LORUN_TARGET_AMX LORUN_INLINE inline __m512 widened(const BFloat16* at) const {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes_, at)), 16));
  }

  LORUN_TARGET_AMX LORUN_INLINE inline void one() {
    __m512 v = _mm512_add_ps(_mm512_load_ps(sums_), bias_);
    if constexpr (Relu) {
      v = _mm512_max_ps(_mm512_setzero_ps(), v);  // of a NaN and another, the second
    }
    if constexpr (Count == kGated) {
      v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(widened(first_), _mm512_setzero_ps(), _CMP_NLE_UQ), v);
      first_ += pitch_;
    }
    if constexpr (Count >= 1) {
      v = _mm512_add_ps(v, widened(first_));
      first_ += pitch_;
    }
    if constexpr (Count >= 2) {
      v = _mm512_add_ps(v, widened(second_));
      second_ += pitch_;
    }
    _mm256_mask_storeu_epi16(y_, lanes_, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
    y_ += pitch_;
    sums_ += kChannels;
  }

  const Waiting& w_;
  int64_t pitch_, channel_ = 0, left_ = 0;
  const float* sums_ = nullptr;
  BFloat16* y_ = nullptr;
  const BFloat16 *first_ = nullptr, *second_ = nullptr;
  __mmask16 lanes_ = 0;
  __m512 bias_{};
};

// f<Relu, Count>() as these sums need a Finisher.
template <class F>
void as_needed(const Waiting& w, const F& f) {
  if (w.to.gate != nullptr) {
    return f.template operator()<false, kGated>();
  }
  const int count = w.to.added.second != nullptr ? 2 : w.to.added.first != nullptr ? 1 : 0;
  if (w.to.relu) {
    return count == 0   ? f.template operator()<true, 0>()
           : count == 1 ? f.template operator()<true, 1>()
                        : f.template operator()<true, 2>();
  }
  return count == 0   ? f.template operator()<false, 0>()
         : count == 1 ? f.template operator()<false, 1>()
                      : f.template operator()<false, 2>();
}

// What is fetched during the products: rows of the image that are needed next, and where the strip's results will go.
struct Fetch {
  Ahead image, results;

  bool pending() const {
    return image.pending() || results.pending();
  }

  LORUN_INLINE inline void advance() {
    image.advance();
    results.advance();
  }
};

// Sums of a strip, 16 * Tiles pixels of Blocks blocks of channels, and the results of another that waits.
template <int Tiles, int Blocks, bool Relu, int Count, bool Fetching>
LORUN_TARGET_AMX void multiply_tiles(const Filter<BFloat16>& f, const BFloat16* const* rows, int64_t offset,
                                     int64_t block, float* sums, const Waiting& waiting, Fetch& fetch) {
  static_assert(Tiles * Blocks <= 4 && (Tiles <= 2 || Blocks == 1));
  Finisher<Relu, Count> meanwhile(waiting);
  Fetch soon = fetch;  // in registers
  const int64_t kernel = f.kernel, steps = f.steps(), next = kPixels * f.stride * f.in, pitch = 2 * f.stride * f.in;
  const int64_t other = f.block_values(), at_once = (meanwhile.vectors() + kernel * steps - 1) / (kernel * steps);
  const BFloat16* weight = f.w + block * other;
  tile_fence();
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int64_t row = 0; row < kernel; ++row) {
    const BFloat16* x = rows[row] + offset;
    for (int64_t j = 0; j < steps; ++j, weight += kTileValues, x += kDepth) {
      // Sum b * Tiles + t is that of tile t and block b.
      tile_load<6>(weight, 64);
      tile_load<4>(x, pitch);
      tile_multiply_add<0, 4, 6>();
      if constexpr (Tiles >= 2) {
        tile_load<5>(x + next, pitch);
        tile_multiply_add<1, 5, 6>();
      }
      if constexpr (Tiles >= 3) {
        tile_load<4>(x + 2 * next, pitch);
        tile_multiply_add<2, 4, 6>();
      }
      if constexpr (Tiles >= 4) {
        tile_load<5>(x + 3 * next, pitch);
        tile_multiply_add<3, 5, 6>();
      }
      if constexpr (Blocks >= 2) {
        tile_load<7>(weight + other, 64);
        tile_multiply_add<Tiles, 4, 7>();
      }
      if constexpr (Blocks >= 2 && Tiles >= 2) {
        tile_multiply_add<Tiles + 1, 5, 7>();
      }
      if constexpr (Blocks >= 3) {
        tile_load<6>(weight + 2 * other, 64);
        tile_multiply_add<2, 4, 6>();
      }
      if constexpr (Blocks >= 4) {
        tile_load<7>(weight + 3 * other, 64);
        tile_multiply_add<3, 4, 7>();
      }
      meanwhile.advance(at_once);
      if constexpr (Fetching) {
        soon.advance();
      }
    }
  }
  meanwhile.rest();
  fetch = soon;
  constexpr int64_t kSums = kPixels * kChannels;
  tile_store<0>(sums, 64);
  if constexpr (Tiles * Blocks >= 2) {
    tile_store<1>(sums + kSums, 64);
  }
  if constexpr (Tiles * Blocks >= 3) {
    tile_store<2>(sums + 2 * kSums, 64);
  }
  if constexpr (Tiles * Blocks >= 4) {
    tile_store<3>(sums + 3 * kSums, 64);
  }
}

// 16 channels are half a cache line, and every second row of a tile would straddle two. Instead, a tile takes whole
// lines: 16 pairs of pixels. Of the two results of a pair, the first meets the lines (0, 1) and (2, 3) of its
// pixels with the weights (w0, w1) and (w2, 0) of a kernel's row, and the second, one pixel further, meets the same
// lines with (0, w0) and (w1, w2): the weight shifted by a pixel.
constexpr int64_t kPaired = 16;

inline bool takes_pairs(const Filter<BFloat16>& f) {
  return f.in == kPaired && f.kernel == 3 && f.stride == 1;
}

// The shifted weight, as many values as the weight.
inline void shift_weight(const Filter<BFloat16>& f, BFloat16* to) {
  constexpr int64_t kHalf = kTileValues / 2;
  for (const BFloat16* w = f.w; w < f.w + f.blocks() * f.block_values(); w += 2 * kTileValues, to += 2 * kTileValues) {
    std::fill_n(to, kHalf, BFloat16{});
    std::copy_n(w, 3 * kHalf, to + kHalf);
  }
}

// Sums of a strip of 64 pixels by pairs of pixels.
template <bool Relu, int Count, bool Fetching>
LORUN_TARGET_AMX void multiply_pairs(const Filter<BFloat16>& f, const BFloat16* const* rows, int64_t offset,
                                     int64_t block, float* sums, const Waiting& waiting, Fetch& fetch) {
  Finisher<Relu, Count> meanwhile(waiting);
  Fetch soon = fetch;  // in registers
  const int64_t at_once = (meanwhile.vectors() + 5) / 6, next = kPixels * 2 * kPaired;
  const BFloat16 *first = f.w + block * f.block_values(), *second = f.shifted + block * f.block_values();
  tile_fence();
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int64_t row = 0; row < 3; ++row) {
    const BFloat16* x = rows[row] + offset;
    for (int64_t j = 0; j < 2; ++j, first += kTileValues, second += kTileValues, x += kDepth) {
      tile_load<6>(first, 64);
      tile_load<4>(x, 64);
      tile_multiply_add<0, 4, 6>();
      tile_load<5>(x + next, 64);
      tile_multiply_add<1, 5, 6>();
      tile_load<7>(second, 64);
      tile_multiply_add<2, 4, 7>();
      tile_multiply_add<3, 5, 7>();
      meanwhile.advance(at_once);
      if constexpr (Fetching) {
        soon.advance();
      }
    }
  }
  meanwhile.rest();
  fetch = soon;
  // Pixel by pixel again.
  constexpr int64_t kSums = 2 * kPixels * kChannels;
  tile_store<0>(sums, 128);
  tile_store<1>(sums + kSums, 128);
  tile_store<2>(sums + kChannels, 128);
  tile_store<3>(sums + kSums + kChannels, 128);
}

// Computes strips with the tiles of the thread that made it.
class TileStrips {
 public:
  static constexpr int64_t kSums = 2 * kStrip * kChannels;

  explicit TileStrips(float* sums) : sums_(sums) {}

  // `pixels` results from `first` on of some blocks of channels, at most 4 tiles in all. They are in memory after the
  // next call, or flush().
  void compute(const Filter<BFloat16>& f, const BFloat16* const* rows, int64_t first, int64_t pixels, int64_t block,
               int64_t blocks, const Finish<BFloat16>& to) {
    float* sums = sums_ + (second_ ? kSums / 2 : 0);
    const int64_t offset = first * f.stride * f.in;
    if (to.far && block * kChannels % to.pitch == 0) {  // the first of a pixel's channels
      fetch_.results = Ahead(to.y, pixels * to.pitch * sizeof(BFloat16), f.kernel * f.steps());
    }
    int64_t tiles = (pixels + kPixels - 1) / kPixels;
    const auto products = [&]<bool Relu, int Count, bool Fetching>() {
      const auto with = [&](auto kernel) { kernel(f, rows, offset, block, sums, waiting_, fetch_); };
      if (tiles >= 3 && f.shifted != nullptr) {
        tiles = 4;
        with(&multiply_pairs<Relu, Count, Fetching>);
      } else if (tiles >= 3) {
        with(tiles == 4 ? &multiply_tiles<4, 1, Relu, Count, Fetching> : &multiply_tiles<3, 1, Relu, Count, Fetching>);
      } else if (tiles == 2) {
        with(blocks == 2 ? &multiply_tiles<2, 2, Relu, Count, Fetching> : &multiply_tiles<2, 1, Relu, Count, Fetching>);
      } else if (blocks >= 3) {
        with(blocks == 4 ? &multiply_tiles<1, 4, Relu, Count, Fetching> : &multiply_tiles<1, 3, Relu, Count, Fetching>);
      } else {
        with(blocks == 2 ? &multiply_tiles<1, 2, Relu, Count, Fetching> : &multiply_tiles<1, 1, Relu, Count, Fetching>);
      }
    };
    as_needed(waiting_, [&]<bool Relu, int Count>() {
      fetch_.pending() ? products.template operator()<Relu, Count, true>()
                       : products.template operator()<Relu, Count, false>();
    });
    waiting_ = {sums, tiles * kPixels, pixels, to};
    second_ = !second_;
  }

  // During the row that follows, of `width` results: the values that the next row needs.
  void fetch(const Filter<BFloat16>& f, int64_t width, const BFloat16* at, int64_t values) {
    const int64_t strips = (width + kStrip - 1) / kStrip;
    fetch_.image = Ahead(at, values * sizeof(BFloat16), strips * f.blocks() * f.kernel * f.steps());
  }

  void flush() {
    as_needed(waiting_, [&]<bool Relu, int Count>() LORUN_TARGET_AMX { Finisher<Relu, Count>(waiting_).rest(); });
    waiting_ = {};
  }

 private:
  Tiles tiles_;
  float* sums_;
  bool second_ = false;  // half of the sums is the next strip's
  Waiting waiting_{};
  Fetch fetch_;
};

}  // namespace lorun::packed_conv2d

#endif
