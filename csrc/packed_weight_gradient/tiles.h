// The products by AMX, and the layouts that they want (packed_weight_gradient.h).
#pragma once

#include "common/amx.h"
#include "common/tensor.h"

#ifdef LORUN_AMX

#include <immintrin.h>

#include <cstring>

#include "packed_weight_gradient/packed_weight_gradient.h"

namespace lorun::packed_weight_gradient {

// Pixels w and w + 1 of a row (width, channels), `lanes` of their channels, interleaved; zeros after the row.
LORUN_TARGET_AMX LORUN_INLINE inline __m512i pair_of(const BFloat16* row, int64_t w, int64_t width, int64_t channels,
                                                     __mmask16 lanes) {
  const BFloat16* at = row + w * channels;
  const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(w < width ? lanes : __mmask16{0}, at));
  const __mmask16 last = w + 1 < width ? lanes : __mmask16{0};
  const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(last, at + channels));
  return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
}

// Lines of 16 words, rows for columns.
LORUN_TARGET_AMX LORUN_INLINE inline void transpose(__m512i (&a)[16]) {
  __m512i b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
  // a[4 * i + j]: words of rows 4 i ... 4 i + 3, of columns j, j + 4, j + 8, j + 12.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    b[j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
    b[4 + j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    b[8 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    b[12 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    a[j] = _mm512_shuffle_i32x4(b[j], b[8 + j], 0x88);
    a[8 + j] = _mm512_shuffle_i32x4(b[j], b[8 + j], 0xdd);
    a[4 + j] = _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0x88);
    a[12 + j] = _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0xdd);
  }
}

// `rows` rows of x from `first` on, of an image (height, width, channels); rows outside it are zeros. right: where the
// first block begins.
LORUN_TARGET_AMX inline void lay_out_right(const Shape& s, const BFloat16* image, int64_t first, int64_t rows,
                                           BFloat16* right) {
  const int64_t apart = s.right_block(), blocks = s.right_blocks(), pitch = s.pitch();
  // Two blocks at a time from a whole vector of either pixel, all blocks of a pair of pixels before the next pair: a
  // row is read once, from end to end.
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t row = first; row < first + rows; ++row) {
    const int64_t width = row >= 0 && row < s.height ? s.width : 0;
    const BFloat16* x = image + row * s.width * s.in;
    for (int64_t w = 0; w < pitch; w += 2, x += 2 * s.in, right += 2 * kLanes) {
      for (int64_t block = 0; block < blocks; block += 2) {
        const __mmask32 lanes = (uint64_t{1} << std::min<int64_t>(s.in - block * kLanes, 32)) - 1;
        const __m512i a = _mm512_maskz_loadu_epi16(w < width ? lanes : __mmask32{0}, x + block * kLanes);
        const __m512i b = _mm512_maskz_loadu_epi16(w + 1 < width ? lanes : __mmask32{0}, x + block * kLanes + s.in);
        _mm512_store_si512(right + block * apart, _mm512_permutex2var_epi16(a, low, b));
        if (block + 1 < blocks) {
          _mm512_store_si512(right + (block + 1) * apart, _mm512_permutex2var_epi16(a, high, b));
        }
      }
    }
  }
}

// What the last step of a line reaches after `rows` rows.
inline void end_right(const Shape& s, int64_t rows, BFloat16* right) {
  for (int64_t block = 0; block < s.right_blocks(); ++block) {
    std::fill_n(right + block * s.right_block() + rows * s.pitch() * kLanes, kDepth * kLanes, BFloat16{});
  }
}

// Up to 16 channels of the gradient, `channel` and following, a line of pixels each, of which the part at hand lies in
// `memory`, Shape::line() values for each line. Rows come one by one and leave in whole steps.
class GradientLines {
 public:
  GradientLines(const Shape& s, BFloat16* memory, int64_t channel, int64_t count)
      : s_(s), memory_(memory), channel_(channel), count_(count) {
    for (int64_t c = 0; c < count; ++c) {
      std::fill_n(memory + c * s.line(), s.front(), BFloat16{});
    }
  }

  // The next row. pairs(w): pixels w and w + 1, 16 channels interleaved, zeros from the row's end on. left: where the
  // first block begins.
  template <class Pairs>
  LORUN_TARGET_AMX LORUN_INLINE inline void add(const Pairs& pairs, BFloat16* left) {
    const int64_t line = s_.line();
    BFloat16* to = next();
    int64_t first = 0;
    for (; first < s_.grad_width(); first += kDepth) {
      __m512i a[16];
      for (int64_t i = 0; i < 16; ++i) {
        a[i] = pairs(first + 2 * i);
      }
      transpose(a);
      for (int64_t c = 0; c < count_; ++c) {
        _mm512_storeu_si512(to + c * line + first, a[c]);
      }
    }
    // Zeros up to the next row; what lies beyond is written over by it.
    for (; first < s_.pitch(); first += kDepth) {
      for (int64_t c = 0; c < count_; ++c) {
        _mm512_storeu_si512(to + c * line + first, _mm512_setzero_si512());
      }
    }
    ++rows_;
    if (next() + s_.pitch() + kDepth > memory_ + line) {
      leave((rows_ * s_.pitch() - s_.padding) / kDepth, left);
    }
  }

  // That was the last row.
  LORUN_TARGET_AMX void end(BFloat16* left) {
    for (int64_t c = 0; c < count_; ++c) {
      std::fill(next() + c * s_.line(), memory_ + (c + 1) * s_.line(), BFloat16{});
    }
    leave(s_.steps(rows_), left);
  }

 private:
  // Where the next row's pixels go, those of line c at + c * Shape::line().
  BFloat16* next() const {
    return memory_ + s_.front() + rows_ * s_.pitch() - begin_;
  }

  // Steps before `step` leave, shifted for each column of the kernel; what shifts of the others reach stays.
  LORUN_TARGET_AMX void leave(int64_t step, BFloat16* left) {
    const int64_t line = s_.line();
    for (int64_t column = 0; column < s_.kernel; ++column) {
      for (int64_t c = 0; c < count_; ++c) {
        const int64_t at = column * s_.out + channel_ + c;
        const BFloat16* from = memory_ + c * line + s_.front() + s_.padding - column - begin_;
        BFloat16* to = left + at / kLanes * s_.left_block() + at % kLanes * kDepth;
        for (int64_t i = left_; i < step; ++i) {
          _mm512_store_si512(to + i * kTileValues, _mm512_loadu_si512(from + i * kDepth));
        }
      }
    }
    left_ = step;
    const int64_t gone = step * kDepth - begin_;
    for (int64_t c = 0; c < count_; ++c) {
      std::memmove(memory_ + c * line, memory_ + c * line + gone, (next() - memory_ - gone) * sizeof(BFloat16));
    }
    begin_ += gone;
  }

  const Shape& s_;
  BFloat16* memory_;
  int64_t channel_, count_;
  int64_t rows_ = 0, left_ = 0, begin_ = 0;  // begin_: the pixel whose place is front()
};

// `rows` rows of the gradient, (width, channels) each. left: where the first block begins. lines: work space for 16 of
// Shape::line() values.
LORUN_TARGET_AMX inline void lay_out_left(const Shape& s, const BFloat16* grad, int64_t rows, BFloat16* left,
                                          BFloat16* memory) {
  const int64_t width = s.grad_width();
  for (int64_t channel = 0; channel < s.out; channel += kLanes) {
    const int64_t count = std::min(kLanes, s.out - channel);
    const __mmask16 lanes = (1u << count) - 1;
    GradientLines lines(s, memory, channel, count);
    for (int64_t row = 0; row < rows; ++row) {
      const BFloat16* from = grad + row * width * s.out + channel;
      lines.add([&](int64_t w) LORUN_TARGET_AMX LORUN_INLINE { return pair_of(from, w, width, s.out, lanes); }, left);
    }
    lines.end(left);
  }
}

// sums (A, B, 16, 16) += left . right over some steps, of A and B neighbouring blocks: 2 and 2, or up to 4 beside one.
// Four sums at a time where there are as many: the tiles multiply four times as fast as one product is ready.
template <int A, int B>
LORUN_TARGET_AMX inline void multiply(const BFloat16* left, int64_t left_block, const BFloat16* right,
                                      int64_t right_block, int64_t steps, float* sums, int64_t next) {
  static_assert(A * B <= 4);
  const auto sum = [&](int i) LORUN_INLINE { return sums + i / B * next + i % B * kSums; };
  tile_fence();
  unrolled<A * B>([&]<int I>() LORUN_INLINE { tile_load<I>(sum(I), 64); });
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

// All taps of `rows` rows that are laid out, added to the sums.
LORUN_TARGET_AMX inline void multiply_all(const Shape& s, const BFloat16* left, const BFloat16* right, int64_t rows,
                                          float* sums) {
  const int64_t total = s.steps(rows), lefts = s.left_blocks(), rights = s.right_blocks();
  const int64_t by_left = rights == 1 ? 4 : lefts == 1 ? 1 : 2, by_right = lefts == 1 ? 4 : rights == 1 ? 1 : 2;
  for (int64_t step = 0; step < total; step += kSteps) {
    const int64_t steps = std::min(kSteps, total - step);
    for (int64_t row = 0; row < s.kernel; ++row) {
      for (int64_t b = 0; b < rights; b += by_right) {
        const BFloat16* r = right + b * s.right_block() + (row * s.pitch() + step * kDepth) * kLanes;
        for (int64_t a = 0; a < lefts; a += by_left) {
          const BFloat16* l = left + a * s.left_block() + step * kTileValues;
          float* to = sums + ((row * lefts + a) * rights + b) * kSums;
          const auto product = product_of(std::min(by_left, lefts - a), std::min(by_right, rights - b));
          product(l, s.left_block(), r, s.right_block(), steps, to, rights * kSums);
        }
      }
    }
  }
}

}  // namespace lorun::packed_weight_gradient

#endif
