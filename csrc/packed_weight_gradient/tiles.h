// The products by AMX, and the layouts that they want (packed_weight_gradient.h).
#pragma once

#include "common/ahead.h"
#include "common/amx.h"
#include "common/tensor.h"

#ifdef LORUN_AMX

#include <immintrin.h>

#include <algorithm>
#include <utility>

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

// Memory that is needed soon: rows of both images.
struct Soon {
  const BFloat16 *grad = nullptr, *x = nullptr;
  int64_t grad_values = 0, x_values = 0;
};

struct Fetch {
  Ahead x, grad;

  LORUN_INLINE inline void advance() {
    x.advance();
    grad.advance();
  }
};

// What a sum takes of the right side, and where that of the first left block lies.
struct Right {
  const BFloat16* at;
  float* sum;
};

// Sums of `Lefts` neighbouring left blocks with `Rights` others over some steps; those of the next left block lie
// `next` further. more: added to what is there. Six at most, beside one tile of either side: a right one meets all left
// ones, the last of which stays for the next.
template <int Lefts, int Rights>
LORUN_TARGET_AMX inline void multiply(const BFloat16* left, int64_t left_block, const Right* rights, int64_t steps,
                                      int64_t next, bool more, Fetch& fetch) {
  static_assert(Lefts * Rights <= 6);
  const auto sum = [&](int i) LORUN_INLINE { return rights[i / Lefts].sum + i % Lefts * next; };
  tile_fence();
  if (more) {
    unrolled<Lefts * Rights>([&]<int I>() LORUN_INLINE { tile_load<I>(sum(I), 64); });
  } else {
    unrolled<Lefts * Rights>([&]<int I>() LORUN_INLINE { tile_zero<I>(); });
  }
  const BFloat16* at[Rights];
  for (int i = 0; i < Rights; ++i) {
    at[i] = rights[i].at;
  }
  Fetch soon = fetch;  // in registers
  for (int64_t i = 0; i < steps * kTileValues; i += kTileValues) {
    unrolled<Rights>([&]<int R>() LORUN_INLINE {
      tile_load<7>(at[R] + i, 64);
      unrolled<Lefts>([&]<int J>() LORUN_INLINE {
        constexpr int kLeft = R % 2 == 0 ? J : Lefts - 1 - J;
        if constexpr (R == 0 || J > 0) {
          tile_load<6>(left + kLeft * left_block + i, 64);
        }
        tile_multiply_add<R * Lefts + kLeft, 6, 7>();
      });
    });
    soon.advance();
  }
  fetch = soon;
  unrolled<Lefts * Rights>([&]<int I>() LORUN_INLINE { tile_store<I>(sum(I), 64); });
}

// The product of so many left blocks and others.
inline auto product_of(int64_t lefts, int64_t rights) {
  using Product = decltype(&multiply<1, 1>);
  constexpr Product kOfOne[] = {&multiply<1, 1>, &multiply<1, 2>, &multiply<1, 3>,
                                &multiply<1, 4>, &multiply<1, 5>, &multiply<1, 6>};
  constexpr Product kOfTwo[] = {&multiply<2, 1>, &multiply<2, 2>, &multiply<2, 3>};
  return lefts == 1   ? kOfOne[rights - 1]
         : lefts == 2 ? kOfTwo[rights - 1]
         : lefts == 3 ? &multiply<3, 1>
                      : &multiply<4, 1>;
}

// A number of things in as few groups of at most `most` as it takes, all about as large.
struct Groups {
  int64_t things, count;

  Groups(int64_t number, int64_t most) : things(number), count((number + most - 1) / most) {}

  int64_t begin(int64_t group) const {
    return group * things / count;
  }

  int64_t size(int64_t group) const {
    return begin(group + 1) - begin(group);
  }
};

// The sums of all taps over `rows` rows that are laid out. more: added to what is there. soon: fetched meanwhile.
//
// A tile of the second-level cache, where both sides lie, takes about as long to load as to multiply. What stands side
// by side are therefore rows of the kernel: the first of them loads a row of x from there, and the others, some steps
// later, from the first-level cache. (Parts of the line that the first-level cache holds, one after the other, would
// save less than loading and storing the sums for each costs.)
LORUN_TARGET_AMX inline void multiply_all(const Shape& s, const BFloat16* left, const BFloat16* right, int64_t rows,
                                          float* sums, bool more, const Soon& soon = {}) {
  const int64_t steps = s.steps(rows), lefts = s.left_blocks(), rights = s.right_blocks();
  const int64_t columns = s.kernel / s.columns();
  // Of even or of odd columns, by block, column and row.
  const auto of_block = [&](int64_t odd) { return (columns + 1 - odd) / 2 * s.kernel; };
  const auto right_at = [&](int64_t odd, int64_t i) {
    const int64_t block = i / of_block(odd), row = i % s.kernel, column = i % of_block(odd) / s.kernel * 2 + odd;
    return Right{right + (odd * rights + block) * s.right_block() + (row * s.pitch() + column - odd) * kLanes,
                 sums + ((row * columns + column) * lefts * rights + block) * kSums};
  };
  const auto groups = [&](int64_t odd) {
    const int64_t count = rights * of_block(odd), by_left = count == 1 ? 4 : std::min<int64_t>(lefts, 2);
    return std::pair(Groups(lefts, by_left), Groups(count, count == 1 ? 1 : 6 / by_left));
  };
  int64_t times = 0;
  for (int64_t odd = 0; odd < s.phases(); ++odd) {
    const auto [of_left, of_right] = groups(odd);
    times += of_left.count * of_right.count * steps;
  }
  Fetch fetch{Ahead(soon.x, soon.x_values * sizeof(BFloat16), times),
              Ahead(soon.grad, soon.grad_values * sizeof(BFloat16), times)};
  for (int64_t odd = 0; odd < s.phases(); ++odd) {
    const auto [of_left, of_right] = groups(odd);
    for (int64_t i = 0; i < of_right.count; ++i) {
      Right side[6];
      for (int64_t j = 0; j < of_right.size(i); ++j) {
        side[j] = right_at(odd, of_right.begin(i) + j);
      }
      for (int64_t a = 0; a < of_left.count; ++a) {
        const auto product = product_of(of_left.size(a), of_right.size(i));
        product(left + of_left.begin(a) * s.left_block(), s.left_block(), side, steps, rights * kSums, more, fetch);
        for (int64_t j = 0; j < of_right.size(i); ++j) {
          side[j].sum += of_left.size(a) * rights * kSums;
        }
      }
    }
  }
}

}  // namespace lorun::packed_weight_gradient

#endif
