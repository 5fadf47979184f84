// The products by AMX, and the layouts that they want (packed_weight_gradient.h).
#pragma once

#include "common/amx.h"
#include "common/tensor.h"

#ifdef LORUN_AMX

#include <immintrin.h>

#include <algorithm>

#include "packed_weight_gradient/packed_weight_gradient.h"

namespace lorun::packed_weight_gradient {

constexpr int64_t kGroup = 8;  // channels that are turned into lines together

// 32 pixels, of each of which pixel(i) reads 8 channels, as a line of pixels for each channel: store(channel, line).
template <class Pixel, class Store>
LORUN_TARGET_AMX LORUN_INLINE inline void turn(const Pixel& pixel, const Store& store) {
  // Pixels 8 apart in the quarters of a vector, so that turning each quarter by itself leaves whole lines.
  __m512i a[kGroup], b[kGroup];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_castsi128_si512(pixel(i));
    a[i] = _mm512_inserti32x4(a[i], pixel(8 + i), 1);
    a[i] = _mm512_inserti32x4(a[i], pixel(16 + i), 2);
    a[i] = _mm512_inserti32x4(a[i], pixel(24 + i), 3);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
    b[4 + i] = _mm512_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
  }
  // b[i], b[4 + i]: pixels 2 i and 2 i + 1 of channels 0 to 3, 4 to 7.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int from = i / 2 * 4 + i % 2 * 2;
    a[from] = _mm512_unpacklo_epi32(b[from], b[from + 1]);
    a[from + 1] = _mm512_unpackhi_epi32(b[from], b[from + 1]);
  }
  // a[0], a[2]: pixels 0 to 3, 4 to 7 of channels 0 and 1; a[1], a[3]: of 2 and 3; a[4 ...]: of 4 to 7 likewise.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int from = i / 2 * 4 + i % 2;
    store(2 * i, _mm512_unpacklo_epi64(a[from], a[from + 2]));
    store(2 * i + 1, _mm512_unpackhi_epi64(a[from], a[from + 2]));
  }
}

// Where 32 pixels of the lines `line` and following go, of which `count` are wanted.
struct Lines {
  BFloat16* left;  // of the step
  int64_t block, line, count;

  LORUN_TARGET_AMX LORUN_INLINE void operator()(int64_t i, __m512i pixels) const {
    if (i < count) {
      _mm512_store_si512(at(line + i), pixels);
    }
  }

  LORUN_INLINE BFloat16* at(int64_t number) const {
    return left + number / kLanes * block + number % kLanes * kDepth;
  }
};

// The lines of the kernel's further columns: those of the first, shifted, with what the step before has of them.
LORUN_TARGET_AMX inline void shift_lines(const Lines& lines, int64_t out, int64_t columns, bool first) {
  const __m512i even = _mm512_set_epi32(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32);
  __m512i shifted = _mm512_or_si512(even, _mm512_slli_epi32(_mm512_add_epi32(even, _mm512_set1_epi32(1)), 16));
  for (int64_t column = 1, to = out; column < columns; ++column) {
    shifted = _mm512_sub_epi16(shifted, _mm512_set1_epi16(1));
    for (int64_t c = 0; c < out; ++c, ++to) {
      const BFloat16* from = lines.at(c);
      const __m512i before = first ? _mm512_setzero_si512() : _mm512_load_si512(from - kTileValues);
      _mm512_store_si512(lines.at(to), _mm512_permutex2var_epi16(before, shifted, _mm512_load_si512(from)));
    }
  }
}

// The left side from rows of the gradient, (room, width, channels) in memory, of which the first Shape::out channels
// count: row i lies in place i % room, and rows may come one by one.
class LeftSide {
 public:
  // Places for rows that come one by one. No step that ends in the newest reads the first pixel of the oldest, over
  // which the newest may reach.
  static int64_t room(const Shape& s) {
    return kDepth / s.pitch() + 2;
  }

  // zeros: a pixel's.
  LeftSide(const Shape& s, const BFloat16* rows, int64_t room, int64_t channels, const BFloat16* zeros, BFloat16* left)
      : s_(s),
        rows_(rows),
        zeros_(zeros),
        room_(room),
        channels_(channels),
        columns_(s.columns()),
        last_(rows + room * s.grad_width() * channels - (s.out + kGroup - 1) / kGroup * kGroup),
        at_(rows),
        lines_{left, s.left_block(), 0, 0} {}

  // The steps that the first `rows` rows fill.
  LORUN_TARGET_AMX void add(int64_t rows) {
    lay_out(rows * s_.pitch() / kDepth, rows);
  }

  // Those left: there are no more rows.
  LORUN_TARGET_AMX void end(int64_t rows) {
    lay_out(s_.steps(rows), rows);
  }

 private:
  LORUN_TARGET_AMX LORUN_INLINE void lay_out(int64_t end, int64_t rows) {
    const int64_t width = s_.grad_width(), channels = channels_;
    for (; step_ < end; ++step_, lines_.left += kTileValues) {
      const BFloat16* first = at_ + w_ * channels;
      if (row_ < rows && w_ + kDepth <= width && first + (kDepth - 1) * channels <= last_) {
        turn_all([=](int i, int64_t c) LORUN_TARGET_AMX LORUN_INLINE {
          return _mm_loadu_si128(reinterpret_cast<const __m128i*>(first + i * channels + c));
        });
        move(kDepth);
        continue;
      }
      const BFloat16* pixels[kDepth];
      for (const BFloat16*& pixel : pixels) {
        pixel = row_ < rows && w_ < width ? at_ + w_ * channels : zeros_;
        move(1);
      }
      turn_all([&](int i, int64_t c) LORUN_TARGET_AMX LORUN_INLINE {
        const BFloat16* at = pixels[i] + c;
        if (s_.out - c >= kGroup) {
          return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
        }
        return _mm_maskz_loadu_epi16((1u << (s_.out - c)) - 1, at);
      });
    }
  }

  template <class Pixel>
  LORUN_TARGET_AMX LORUN_INLINE void turn_all(const Pixel& pixel) {
    for (int64_t c = 0; c < s_.out; c += kGroup) {
      lines_.line = c;
      lines_.count = s_.out - c;
      turn([&](int i) LORUN_TARGET_AMX LORUN_INLINE { return pixel(i, c); }, lines_);
    }
    if (columns_ > 1) {
      shift_lines(lines_, s_.out, columns_, step_ == 0);
    }
  }

  LORUN_INLINE void move(int64_t pixels) {
    w_ += pixels;
    if (w_ == s_.pitch()) {
      w_ = 0;
      at_ = rows_ + ++row_ % room_ * s_.grad_width() * channels_;
    }
  }

  const Shape& s_;
  const BFloat16 *rows_, *zeros_;
  int64_t room_, channels_, columns_;
  const BFloat16* last_;  // from where all channels of a pixel may be read
  const BFloat16* at_;    // the next row
  Lines lines_;
  int64_t step_ = 0, row_ = 0, w_ = 0;  // of the next pixel
};

// All channels of a vector, as a mask of them.
struct All {};

LORUN_TARGET_AMX LORUN_INLINE inline __m512i load(const BFloat16* at, All) {
  return _mm512_loadu_si512(at);
}

LORUN_TARGET_AMX LORUN_INLINE inline __m512i load(const BFloat16* at, __mmask32 lanes) {
  return _mm512_maskz_loadu_epi16(lanes, at);
}

// `rows` rows of x from `first` on, of an image (height, width, channels) whose rows are `apart` values apart; rows
// outside it are zeros. right: where the first of them lies in the first block. Twice: with the second kind of pairs.
template <bool Twice>
LORUN_TARGET_AMX inline void lay_out_pairs(const Shape& s, const BFloat16* image, int64_t apart, int64_t first,
                                           int64_t rows, BFloat16* right) {
  const int64_t block = s.right_block(), second = s.right_blocks() * block, in = s.in, whole = in / kDepth * kDepth;
  const __mmask32 rest = (__mmask32{1} << in % kDepth) - 1;
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const auto interleave = [&](__m512i a, __m512i b, bool both, BFloat16* to) LORUN_TARGET_AMX LORUN_INLINE {
    _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low, b));
    if (both) {
      _mm512_store_si512(to + block, _mm512_permutex2var_epi16(a, high, b));
    }
  };
  // Two blocks at a time from a whole vector of either pixel, all blocks of a pair of pixels before the next pair: a
  // row is read once, from end to end. pixel(i, c, lanes): channels of the pair's first and following.
  const auto pair = [&](const auto& pixel) LORUN_TARGET_AMX LORUN_INLINE {
    BFloat16* to = right;
    const auto blocks = [&](int64_t c, auto lanes, bool both) LORUN_TARGET_AMX LORUN_INLINE {
      const __m512i b = pixel(1, c, lanes);
      interleave(pixel(0, c, lanes), b, both, to);
      if constexpr (Twice) {
        interleave(b, pixel(2, c, lanes), both, to + second);
      }
    };
    for (int64_t c = 0; c < whole; c += kDepth, to += 2 * block) {
      blocks(c, All{}, true);
    }
    if (whole < in) {
      blocks(whole, rest, in - whole > kLanes);
    }
  };
  const int64_t end = s.pitch() - s.padding;
  for (int64_t row = first; row < first + rows; ++row) {
    const int64_t width = row >= 0 && row < s.height ? s.width : 0;
    const BFloat16* x = image + row * apart - s.padding * in;
    const auto next = [&] {
      x += 2 * in;
      right += 2 * kLanes;
    };
    for (int64_t w = -s.padding; w < end; w += 2, next()) {
      for (; w >= 0 && w + 2 < width; w += 2, next()) {
        pair([&](int64_t i, int64_t c, auto lanes)
                 LORUN_TARGET_AMX LORUN_INLINE { return load(x + i * in + c, lanes); });
      }
      pair([&](int64_t i, int64_t c, auto lanes) LORUN_TARGET_AMX LORUN_INLINE {
        const bool inside = w + i >= 0 && w + i < width;
        return inside ? load(x + i * in + c, lanes) : _mm512_setzero_si512();
      });
    }
  }
}

LORUN_TARGET_AMX inline void lay_out_right(const Shape& s, const BFloat16* image, int64_t apart, int64_t first,
                                           int64_t rows, BFloat16* right) {
  (s.phases() > 1 ? lay_out_pairs<true> : lay_out_pairs<false>)(s, image, apart, first, rows, right);
}

// Zeros after `rows` rows.
inline void end_right(const Shape& s, int64_t rows, BFloat16* right) {
  for (int64_t block = 0; block < s.phases() * s.right_blocks(); ++block) {
    std::fill_n(right + block * s.right_block() + rows * s.pitch() * kLanes, s.right_end() * kLanes, BFloat16{});
  }
}

// sums (A, B, 16, 16), `next` from one A to the next, of left . right over some steps, of A and B neighbouring blocks:
// 2 and 2, or up to 4 beside one. Four sums at a time where there are as many: the tiles multiply four times as fast as
// one product is ready. more: added to what is there.
template <int A, int B>
LORUN_TARGET_AMX inline void multiply(const BFloat16* left, int64_t left_block, const BFloat16* right,
                                      int64_t right_block, int64_t steps, float* sums, int64_t next, bool more) {
  static_assert(A * B <= 4);
  const auto sum = [&](int i) LORUN_INLINE { return sums + i / B * next + i % B * kSums; };
  tile_fence();
  if (more) {
    unrolled<A * B>([&]<int I>() LORUN_INLINE { tile_load<I>(sum(I), 64); });
  } else {
    unrolled<A * B>([&]<int I>() LORUN_INLINE { tile_zero<I>(); });
  }
  for (int64_t i = 0; i < steps * kTileValues; i += kTileValues) {
    unrolled<A>([&]<int a>() LORUN_INLINE {
      tile_load<4 + a % 2>(left + a * left_block + i, 64);
      unrolled<B>([&]<int b>() LORUN_INLINE {
        if constexpr (a == 0) {
          tile_load<6 + b % 2>(right + b * right_block + i, 64);
        }
        tile_multiply_add<a * B + b, 4 + a % 2, 6 + b % 2>();
      });
    });
  }
  unrolled<A * B>([&]<int I>() LORUN_INLINE { tile_store<I>(sum(I), 64); });
}

// The product of `a` left and `b` right blocks.
inline auto product_of(int64_t a, int64_t b) {
  constexpr decltype(&multiply<1, 1>) kOfLeft[] = {&multiply<1, 1>, &multiply<2, 1>, &multiply<3, 1>, &multiply<4, 1>};
  constexpr decltype(&multiply<1, 1>) kOfRight[] = {&multiply<1, 1>, &multiply<1, 2>, &multiply<1, 3>, &multiply<1, 4>};
  return a == 2 && b == 2 ? &multiply<2, 2> : b == 1 ? kOfLeft[a - 1] : kOfRight[b - 1];
}

// The sums of all taps over `rows` rows that are laid out. more: added to what is there. (Parts of the line that the
// first-level cache holds, one after the other, would save less than loading and storing the sums for each costs.)
LORUN_TARGET_AMX inline void multiply_all(const Shape& s, const BFloat16* left, const BFloat16* right, int64_t rows,
                                          float* sums, bool more) {
  const int64_t steps = s.steps(rows), lefts = s.left_blocks(), rights = s.right_blocks();
  const int64_t by_left = rights == 1 ? 4 : lefts == 1 ? 1 : 2, by_right = lefts == 1 ? 4 : rights == 1 ? 1 : 2;
  const int64_t columns = s.kernel / s.columns();
  for (int64_t i = 0; i < s.products(); ++i) {
    const int64_t column = i % columns, odd = column % 2;
    const BFloat16* r = right + odd * rights * s.right_block() + (i / columns * s.pitch() + column - odd) * kLanes;
    for (int64_t a = 0; a < lefts; a += by_left) {
      const BFloat16* l = left + a * s.left_block();
      float* to = sums + (i * lefts + a) * rights * kSums;
      for (int64_t b = 0; b < rights; b += by_right) {
        const auto product = product_of(std::min(by_left, lefts - a), std::min(by_right, rights - b));
        product(l, s.left_block(), r + b * s.right_block(), s.right_block(), steps, to + b * kSums, rights * kSums,
                more);
      }
    }
  }
}

}  // namespace lorun::packed_weight_gradient

#endif
