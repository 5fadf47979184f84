// The matrix product of block CS on CUDA: C (rows, cols) = sum over depth of a(row, k) b(col, k), whose factors lie
// anywhere and whose values an ending takes (block_cs.cu has both).
//
// A block of eight warps computes a tile of C. Pieces of both factors, all of the tile's rows or columns by kDepth of
// the depth, travel through a ring in shared memory: asynchronous copies, as they lie in memory and in their own type.
// What they must become (transposed, fp32 as two numbers) they become in registers. The warps share out the tile
// and, in kGroups, each piece's depth; at the end groups are added, in their order, in the ring's memory. So every
// value is summed in the same order whatever tile it is in, and tiles may follow the device and the batch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/cuda.cuh"
#include "common/mma.cuh"
#include "common/tensor.h"

namespace lorun::block_cs {

constexpr int kThreads = 256;
constexpr int kRing = 96 << 10;  // bytes: kMostShared but for a table of rows

// What a line of a factor, neighbours in memory, is: a row (of b: a column) of C, or one depth for all of them.
enum class Lines { kOuter, kDepth };

__device__ inline int lane_id() {
  return static_cast<int>(threadIdx.x) % 32;
}

__device__ inline int warp_id() {
  return static_cast<int>(threadIdx.x) / 32;
}

__device__ inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

__device__ inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// A piece of a factor in shared memory: Count lines of Length values, in chunks of 16 bytes. Turned: chunks change
// places within their line, so that the eight that a quarter of a warp reads at once lie in different banks, be they
// four of each of two lines, two of each of four or one of each of eight (lines that follow each other).
template <class V, int Count, int Length, bool Turned>
struct Tile {
  static constexpr int kCount = Count, kLength = Length, kBytes = Count * Length * static_cast<int>(sizeof(V));
  static constexpr int kEach = 16 / static_cast<int>(sizeof(V));  // values of a chunk
  static_assert(Length / kEach >= 8);

  __device__ static constexpr int turn(int line) {
    return Turned ? (line & 1) << 2 | (line & 2) | (line & 4) >> 2 : 0;
  }

  // Where value `at` of a line lies. The line is lane + fixed, the second a multiple of a power of two that the first
  // stays below: nothing but constants is left to compute in a loop over `fixed`.
  __device__ static int offset(int lane, int fixed, int at) {
    return (lane + fixed) * Length + (at / kEach ^ turn(lane) ^ turn(fixed)) * kEach + at % kEach;
  }
};

// A thread's part in copying pieces of a factor: it takes the same place in every kAtOnce-th line. What does not change
// from piece to piece, lines that are rows of C or a place in lines that are depths, is found once.
template <class Piece, Lines L, class Source>
class Reader {
 public:
  using V = typename Source::Value;

  // The factor's rows (columns) from `outer` on, of which those below `outers` exist.
  __device__ Reader(const Source& source, int outer, int outers) : source_(source), outer_(outer), outers_(outers) {
    if constexpr (L == Lines::kOuter) {
#pragma unroll
      for (int q = 0; q < kRounds; ++q) {
        lines_[q] = source.line(outer + line_of<kEach>() + q * kAtOnce<kEach>);
        Source::keep(lines_[q]);
      }
    } else {
      place_ = source.position(outer + place_of<kEach>());
    }
  }

  // Depths from k on; zeros from `until` on.
  __device__ void copy(V* to, int k, int until) const {
    if (source_.whole) {
      copy_chunks(to, k, until);
    } else {
      copy_values(to, k, until);
    }
  }

 private:
  static constexpr int kEach = Piece::kEach, kValueBytes = static_cast<int>(sizeof(V));
  // Threads across a line and lines at once, if each takes Run values of it.
  template <int Run>
  static constexpr int kAcross = Piece::kLength / Run;
  template <int Run>
  static constexpr int kAtOnce = kThreads / kAcross<Run>;
  static constexpr int kRounds = Piece::kCount / kAtOnce<kEach>;
  static_assert(Piece::kCount % kAtOnce<kEach> == 0 && Piece::kCount % kAtOnce<1> == 0);

  const Source& source_;
  const int outer_, outers_;
  typename Source::Line lines_[L == Lines::kOuter ? kRounds : 1];
  typename Source::Place place_;

  template <int Run>
  __device__ static int line_of() {
    return static_cast<int>(threadIdx.x) / kAcross<Run>;
  }

  template <int Run>
  __device__ static int place_of() {
    return static_cast<int>(threadIdx.x) % kAcross<Run> * Run;
  }

  __device__ void copy_chunks(V* to, int k, int until) const {
    const int first = line_of<kEach>(), at = place_of<kEach>();
    if constexpr (L == Lines::kOuter) {
      const auto place = source_.position(k + at);
      const int lines = k + at < until ? outers_ - outer_ - first : 0;
#pragma unroll
      for (int q = 0; q < kRounds; ++q) {
        copy_async<16>(to + Piece::offset(first, q * kAtOnce<kEach>, at), source_.at(lines_[q], place),
                       q * kAtOnce<kEach> < lines && source_.inside(lines_[q], place));
      }
    } else {
      const int lines = outer_ + at < outers_ ? until - k - first : 0;
#pragma unroll
      for (int q = 0; q < kRounds; ++q) {
        const auto line = source_.line(k + first + q * kAtOnce<kEach>);
        copy_async<16>(to + Piece::offset(first, q * kAtOnce<kEach>, at), source_.at(line, place_),
                       q * kAtOnce<kEach> < lines && source_.inside(line, place_));
      }
    }
  }

  // Value by value. Two bytes are no asynchronous copy: some loads are under way at once.
  __device__ void copy_values(V* to, int k, int until) const {
    constexpr int kAll = Piece::kCount / kAtOnce<1>, kBatch = kValueBytes >= 4 ? 1 : 4;
    const int first = line_of<1>(), at = place_of<1>();
    const int line0 = L == Lines::kOuter ? outer_ : k, lines = L == Lines::kOuter ? outers_ : until;
    const int place0 = L == Lines::kOuter ? k : outer_, places = L == Lines::kOuter ? until : outers_;
    const auto place = source_.position(place0 + at);
#pragma unroll 1  // what lines have in common with the next piece's would fill all registers
    for (int round = 0; round < kAll; round += kBatch) {
      [[maybe_unused]] V values[kBatch];
#pragma unroll
      for (int q = 0; q < kBatch; ++q) {
        const int l = first + (round + q) * kAtOnce<1>;
        const auto line = source_.line(line0 + l);
        const bool inside = line0 + l < lines && place0 + at < places && source_.inside(line, place);
        if constexpr (kValueBytes >= 4) {
          copy_async<kValueBytes>(to + Piece::offset(l, 0, at), source_.at(line, place), inside);
        } else {
          values[q] = inside ? *source_.at(line, place) : V(0.0f);
        }
      }
      if constexpr (kValueBytes < 4) {
#pragma unroll
        for (int q = 0; q < kBatch; ++q) {
          to[Piece::offset(first + (round + q) * kAtOnce<1>, 0, at)] = values[q];
        }
      }
    }
  }
};

// Engines: what warps do with a piece. C's tile is kRows x kCols, a piece kDepth deep. add() takes this warp's part of
// a piece, finish() follows the last; each(f) calls f(row, column, sum), in the tile, for every sum of this thread.

// Ordinary multiply-adds, Side x Side sums a thread, threads of a warp 4 x 8, warps of a group WarpRows x WarpCols.
template <class W, int Side, int WarpRows, int WarpCols, int Groups, int Depth>
class Simt {
 public:
  using Sum = W;
  static constexpr int kRows = WarpRows * 4 * Side, kCols = WarpCols * 8 * Side, kDepth = Depth, kGroups = Groups;
  // All threads of a warp read the same depth: of a line that is a depth, neighbouring chunks.
  static constexpr bool turned(Lines lines) {
    return lines == Lines::kOuter;
  }

  __device__ static int group() {
    return warp_id() / (WarpRows * WarpCols);
  }

  template <class TileA, Lines LinesA, class TileB, Lines LinesB>
  __device__ void add(const W* a, const W* b) {
#pragma unroll
    for (int k = 0; k < Depth / Groups; k += kEach) {
      W left[kEach][Side], right[kEach][Side];
      load<TileA, LinesA, 4>(a, row0(), lane_id() / 8, group() * (Depth / Groups) + k, left);
      load<TileB, LinesB, 8>(b, col0(), lane_id() % 8, group() * (Depth / Groups) + k, right);
#pragma unroll
      for (int d = 0; d < kEach; ++d) {
#pragma unroll
        for (int i = 0; i < Side; ++i) {
#pragma unroll
          for (int j = 0; j < Side; ++j) {
            sums_[i][j] += left[d][i] * right[d][j];
          }
        }
      }
    }
  }

  template <class, class>
  __device__ void finish() {}

  template <Lines LinesA, Lines LinesB, class F>
  __device__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < Side; ++i) {
#pragma unroll
      for (int j = 0; j < Side; ++j) {
        f(row0() + outer<LinesA, 4>(lane_id() / 8, i), col0() + outer<LinesB, 8>(lane_id() % 8, j), sums_[i][j]);
      }
    }
  }

 private:
  static constexpr int kEach = 16 / static_cast<int>(sizeof(W));
  static_assert(WarpRows * WarpCols * Groups * 32 == kThreads && Depth / Groups % kEach == 0);

  struct Chunk {
    W at[kEach];
  };

  W sums_[Side][Side] = {};

  __device__ static int row0() {
    return warp_id() / WarpCols % WarpRows * (4 * Side);
  }

  __device__ static int col0() {
    return warp_id() % WarpCols * (8 * Side);
  }

  // A thread's i-th row or column: lines side by side, or chunks of a line.
  template <Lines L, int Lanes>
  __device__ static int outer(int lane, int i) {
    return L == Lines::kOuter ? lane + Lanes * i : (lane + i / kEach * Lanes) * kEach + i % kEach;
  }

  // values[d][i]: the i-th row or column at depth k + d.
  template <class T, Lines L, int Lanes>
  __device__ static void load(const W* tile, int origin, int lane, int k, W (&values)[kEach][Side]) {
    if constexpr (L == Lines::kOuter) {
#pragma unroll
      for (int i = 0; i < Side; ++i) {
        const Chunk chunk = load16<Chunk>(tile + origin * T::kLength + T::offset(lane, Lanes * i, k));
#pragma unroll
        for (int d = 0; d < kEach; ++d) {
          values[d][i] = chunk.at[d];
        }
      }
    } else {
#pragma unroll
      for (int d = 0; d < kEach; ++d) {
#pragma unroll
        for (int i = 0; i < Side; i += kEach) {
          const Chunk chunk = load16<Chunk>(tile + T::offset(0, k + d, origin + outer<L, Lanes>(lane, i)));
#pragma unroll
          for (int e = 0; e < kEach; ++e) {
            values[d][i + e] = chunk.at[e];
          }
        }
      }
    }
  }
};

// An fp32 number as the sum of two bf16 numbers, as far as these go: all but the last eight bits.
struct Split {
  uint16_t high, low;
};

// Two such numbers, each register a pair of bf16, the first in its lower half.
struct SplitPair {
  uint32_t high, low;
};

__device__ inline SplitPair split(float first, float second) {
  const uint32_t high = pack_bf16(first, second);
  return {high, pack_bf16(first - float_of(high << 16), second - float_of(high & 0xffff0000u))};
}

// Numbers: what tensor cores take a factor as, high + low. A thread's four depths of a row or column fill kRegisters of
// each part, two an instruction. take() makes the parts; the low one of what is kExact is 0, and left unset. kShort:
// sums of 16 depths, which ordinary additions add.

// Two bf16 numbers; bf16 images are one.
struct AsBf16 {
  static constexpr int kRegisters = 2;
  static constexpr bool kShort = false;
  template <class V>
  static constexpr bool kExact = std::is_same_v<V, BFloat16>;

  template <class V>
  __device__ static void take(const V (&from)[4], uint32_t (&high)[2], [[maybe_unused]] uint32_t (&low)[2]) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const V first = from[2 * q], second = from[2 * q + 1];
      if constexpr (kExact<V>) {
        high[q] = static_cast<uint32_t>(second.x) << 16 | first.x;
      } else if constexpr (std::is_same_v<V, Split>) {
        high[q] = static_cast<uint32_t>(second.high) << 16 | first.high;
        low[q] = static_cast<uint32_t>(second.low) << 16 | first.low;
      } else {
        const SplitPair both = split(static_cast<float>(first), static_cast<float>(second));
        high[q] = both.high, low[q] = both.low;
      }
    }
  }

  __device__ static void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bf16(sums, a, b);
  }
};

// Two tf32 numbers of 11 bits each: the fp32 number rounded, and the rest, at most 12 bits and a sign, of which the
// instruction drops the last. What is left out of a product is 2^-21 of it or less, as often too much as too little; an
// unrounded high part would leave out more, always of the same sign. Tensor cores cut sums off instead of rounding
// them, always towards zero: hence short sums. An infinite number has no rest: inf - inf, all that it is part of is
// NaN. So is a finite one from 3.402e38 on, which rounds up to infinity.
struct AsTf32 {
  static constexpr int kRegisters = 4;
  static constexpr bool kShort = true;
  template <class V>
  static constexpr bool kExact = false;

  __device__ static void take(const float (&from)[4], uint32_t (&high)[4], uint32_t (&low)[4]) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      high[q] = (bits_of(from[q]) + 0x1000u) & 0xffffe000u;
      low[q] = bits_of(from[q] - float_of(high[q]));
    }
  }

  __device__ static void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_tf32(sums, a, b);
  }
};

// Tensor cores, Rows x Cols sums a warp, warps of a group WarpRows x WarpCols. Of the four products of two factors'
// parts low times low is left out. A warp multiplies the parts that it has while the next values are on their way from
// shared memory.
template <class Number, int Rows, int Cols, int WarpRows, int WarpCols, int Groups, int Depth>
class TensorCores {
 public:
  using Sum = float;
  static constexpr int kRows = WarpRows * Rows, kCols = WarpCols * Cols, kDepth = Depth, kGroups = Groups;
  static constexpr bool turned(Lines) {
    return true;
  }

  __device__ static int group() {
    return warp_id() / (WarpRows * WarpCols);
  }

  template <class TileA, Lines LinesA, class TileB, Lines LinesB, class TA, class TB>
  __device__ void add(const TA* a, const TB* b) {
    // 16 depths at once, four a thread: which ones is free, if the same for both factors. Neighbours, a chunk, where
    // both factors' lines run along the depth; else every fourth, so that a warp reads four lines at once.
    constexpr bool kNeighbours = LinesA == Lines::kOuter && LinesB == Lines::kOuter;
#pragma unroll
    for (int k = 0; k < Depth / Groups; k += 16) {
      const int from = group() * (Depth / Groups) + k;
      Values<TA, LinesA, kNeighbours, kLeft> left;
      Values<TB, LinesB, kNeighbours, kRight> right;
      load<TileA, LinesA, kNeighbours>(a, row0(), from, left);
      load<TileB, LinesB, kNeighbours>(b, col0(), from, right);
      finish<TA, TB>();
      take(left, left_);
      take(right, right_);
      waiting_ = true;
    }
  }

  // Multiplies the parts taken last. At first these are zeros, cheaper than a branch that keeps the products apart from
  // what follows. Where more follows in the piece the branch is wanted: nvcc would load all of it at once, and spill.
  template <class TA, class TB>
  __device__ void finish() {
    if (Depth / Groups == 16 || waiting_) {
      multiply<TA, TB>();
    }
  }

  template <Lines LinesA, Lines LinesB, class F>
  __device__ void each(const F& f) const {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
#pragma unroll
      for (int j = 0; j < kRight; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          f(row0() + outer<LinesA, kLeft>(g, i), col0() + outer<LinesB, kRight>(2 * t + c, j),
            sums_[i / 2][j][i % 2 * 2 + c]);
        }
      }
    }
  }

 private:
  static constexpr int kLeft = Rows / 8, kRight = Cols / 8;  // groups of rows and columns, one of each a thread's
  static_assert(WarpRows * WarpCols * Groups * 32 == kThreads && Depth / Groups % 16 == 0 && kLeft % 2 == 0);

  // A thread's rows or columns at its four depths.
  template <int Count>
  struct Factor {
    uint32_t high[Count][Number::kRegisters], low[Count][Number::kRegisters];
  };
  using Sums = float[kLeft / 2][kRight][4];  // of two row groups and a column group each

  // These as they come from shared memory. Pairs of bf16 that lie there as they are wanted remain pairs.
  template <class V, Lines L, bool Neighbours>
  static constexpr bool kPairs = Number::template kExact<V> && L == Lines::kOuter && Neighbours;
  template <class V, Lines L, bool Neighbours, int Count>
  using Values = std::conditional_t<kPairs<V, L, Neighbours>, uint32_t[Count][2], V[Count][4]>;

  Sums sums_ = {};
  Factor<kLeft> left_ = {};
  Factor<kRight> right_ = {};
  bool waiting_ = false;  // whether there are parts to multiply

  __device__ static int row0() {
    return warp_id() / WarpCols % WarpRows * Rows;
  }

  __device__ static int col0() {
    return warp_id() % WarpCols * Cols;
  }

  // How many neighbours of a line that is a depth a thread takes at once.
  template <int Count>
  static constexpr int kRun = Count < 4 ? Count : 4;

  // The i-th row or column of lane g of eight.
  template <Lines L, int Count>
  __device__ static int outer(int g, int i) {
    constexpr int run = kRun<Count>;
    return L == Lines::kOuter ? g + 8 * i : (g + i / run * 8) * run + i % run;
  }

  template <class T, Lines L, bool Neighbours, class V, class To, int Count, int Four>
  __device__ static void load(const V* tile, int origin, int k, To (&to)[Count][Four]) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    if constexpr (L == Lines::kDepth) {
#pragma unroll
      for (int d = 0; d < 4; ++d) {
#pragma unroll
        for (int i = 0; i < Count; i += kRun<Count>) {
          V some[kRun<Count>];
          load_some(tile + T::offset(t, k + 4 * d, origin + outer<L, Count>(g, i)), some);
#pragma unroll
          for (int j = 0; j < kRun<Count>; ++j) {
            to[i + j][d] = some[j];
          }
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        if constexpr (Neighbours) {
          load_some(tile + origin * T::kLength + T::offset(g, 8 * i, k + 4 * t), to[i]);
        } else {
#pragma unroll
          for (int d = 0; d < 4; ++d) {
            to[i][d] = tile[origin * T::kLength + T::offset(g, 8 * i, k + 4 * d + t)];
          }
        }
      }
    }
  }

  // As many neighbours as fill `to`, in whatever type they are wanted.
  template <class V, class To>
  __device__ static void load_some(const V* from, To& to) {
    using Words = std::conditional_t<sizeof(to) == 16, uint4, std::conditional_t<sizeof(to) == 8, uint64_t, uint32_t>>;
    static_assert(sizeof(to) == sizeof(Words));
    const Words words = *reinterpret_cast<const Words*>(from);
    memcpy(&to, &words, sizeof(to));
  }

  template <class V, int Count, int Four>
  __device__ static void take(const V (&from)[Count][Four], Factor<Count>& to) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      if constexpr (Four == 4) {
        Number::take(from[i], to.high[i], to.low[i]);
      } else {
        to.high[i][0] = from[i][0], to.high[i][1] = from[i][1];
      }
    }
  }

  template <class TA, class TB>
  __device__ void multiply() {
    if constexpr (Number::kShort) {
      Sums sums = {};
      multiply_into<TA, TB>(sums);
#pragma unroll
      for (int i = 0; i < kLeft / 2; ++i) {
#pragma unroll
        for (int j = 0; j < kRight; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            sums_[i][j][c] += sums[i][j][c];
          }
        }
      }
    } else {
      multiply_into<TA, TB>(sums_);
    }
  }

  template <class TA, class TB>
  __device__ void multiply_into(Sums& sums) const {
#pragma unroll
    for (int q = 0; q < Number::kRegisters; q += 2) {
      if constexpr (!Number::template kExact<TB>) {
        multiply_parts(left_.high, right_.low, q, sums);
      }
      if constexpr (!Number::template kExact<TA>) {
        multiply_parts(left_.low, right_.high, q, sums);
      }
      multiply_parts(left_.high, right_.high, q, sums);
    }
  }

  __device__ static void multiply_parts(const uint32_t (&left)[kLeft][Number::kRegisters],
                                        const uint32_t (&right)[kRight][Number::kRegisters], int q, Sums& sums) {
#pragma unroll
    for (int i = 0; i < kLeft / 2; ++i) {
      const uint32_t rows[4] = {left[2 * i][q], left[2 * i + 1][q], left[2 * i][q + 1], left[2 * i + 1][q + 1]};
#pragma unroll
      for (int j = 0; j < kRight; ++j) {
        const uint32_t columns[2] = {right[j][q], right[j][q + 1]};
        Number::multiply(sums[i][j], rows, columns);
      }
    }
  }
};

// Where everything lies in the ring's memory.
template <class Engine, Lines LinesA, Lines LinesB, class A, class B>
struct Plan {
  template <class Source, Lines L, int Outers>
  using TileOf = Tile<typename Source::Value, L == Lines::kOuter ? Outers : Engine::kDepth,
                      L == Lines::kOuter ? Engine::kDepth : Outers, Engine::turned(L)>;
  using TileA = TileOf<A, LinesA, Engine::kRows>;
  using TileB = TileOf<B, LinesB, Engine::kCols>;

  static constexpr int kPieces = TileA::kBytes + TileB::kBytes;  // of both factors, for one step
  static constexpr int kSteps = kRing / kPieces < 8 ? kRing / kPieces : 8;
  static constexpr int kStride = Engine::kCols + 8;  // between rows of sums, off each other's banks
  static constexpr int kSums =
      Engine::kGroups * Engine::kRows * kStride * static_cast<int>(sizeof(typename Engine::Sum));
  static constexpr int kBytes = kSums > (kSteps * kPieces) ? kSums : (kSteps * kPieces);
  static_assert(kSteps >= 3 && kBytes <= kRing);
};

// Each tile is summed in `parts` of the depth, `span` each, by a block of its own; part q gives its values to the
// ending as rows q * rows, ... .
template <class Engine, Lines LinesA, Lines LinesB, class A, class B, class End>
__global__ void __launch_bounds__(kThreads, 1)
    product(const A a, const B b, const End end, int rows, int cols, int depth, int parts, int span) {
  using Plan = Plan<Engine, LinesA, LinesB, A, B>;
  using TileA = typename Plan::TileA;
  using TileB = typename Plan::TileB;
  using W = typename Engine::Sum;
  constexpr int kRows = Engine::kRows, kCols = Engine::kCols, kDepth = Engine::kDepth;
  __shared__ typename End::Row row_table[kRows];
  static_assert(Plan::kBytes + sizeof(row_table) <= kMostShared);
  unsigned char* const ring = found_once(dynamic_shared());

  const int block = static_cast<int>(blockIdx.x), across = (cols + kCols - 1) / kCols;
  const int part = block % parts, tile = block / parts;
  const int row0 = tile / across * kRows, col0 = tile % across * kCols;
  const int from = part * span, until = min(depth, from + span);
  const int steps = (until - from + kDepth - 1) / kDepth;

  Engine engine;
  const Reader<TileA, LinesA, A> reader_a(a, row0, rows);
  const Reader<TileB, LinesB, B> reader_b(b, col0, cols);
  int filled = 0, used = 0;  // places in the ring
  for (int step = 1 - Plan::kSteps; step < steps; ++step) {
    if (step >= 0) {
      __pipeline_wait_prior(Plan::kSteps - 2);
      __syncthreads();  // copied by all; and all are done with the piece that the next copy overwrites
    }
    const int next = step + Plan::kSteps - 1;
    if (next < steps) {
      unsigned char* const piece = ring + filled * Plan::kPieces;
      reader_a.copy(reinterpret_cast<typename A::Value*>(piece), from + next * kDepth, until);
      reader_b.copy(reinterpret_cast<typename B::Value*>(piece + TileA::kBytes), from + next * kDepth, until);
      filled = filled + 1 == Plan::kSteps ? 0 : filled + 1;
    }
    __pipeline_commit();
    if (step >= 0) {
      const unsigned char* const piece = ring + used * Plan::kPieces;
      engine.template add<TileA, LinesA, TileB, LinesB>(
          reinterpret_cast<const typename A::Value*>(piece),
          reinterpret_cast<const typename B::Value*>(piece + TileA::kBytes));
      used = used + 1 == Plan::kSteps ? 0 : used + 1;
    }
  }
  engine.template finish<typename A::Value, typename B::Value>();

  // Groups' sums side by side; then each thread finishes values of one column, in batches whose loads are under way
  // together.
  W* const sums = reinterpret_cast<W*>(ring);
  __syncthreads();
  engine.template each<LinesA, LinesB>(
      [&](int r, int c, W sum) { sums[(Engine::group() * kRows + r) * Plan::kStride + c] = sum; });
  if (threadIdx.x < kRows) {
    row_table[threadIdx.x] = end.row(static_cast<int64_t>(part) * rows + row0 + threadIdx.x);
  }
  __syncthreads();
  const int c = static_cast<int>(threadIdx.x) % kCols;
  if (col0 + c >= cols) {
    return;
  }
  constexpr int kApart = kThreads / kCols, kMine = kRows / kApart, kBatch = kMine < 16 ? kMine : 16;
  static_assert(kThreads % kCols == 0 && kRows % kApart == 0 && kMine % kBatch == 0);
  const auto column = end.col(col0 + c);
  const int first = static_cast<int>(threadIdx.x) / kCols;
#pragma unroll 1
  for (int q = 0; q < kMine; q += kBatch) {
    typename End::Before before[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int r = first + (q + i) * kApart;
      before[i] = row0 + r < rows ? end.before(row_table[r], column) : typename End::Before{};
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int r = first + (q + i) * kApart;
      W value = sums[r * Plan::kStride + c];
#pragma unroll
      for (int group = 1; group < Engine::kGroups; ++group) {
        value += sums[(group * kRows + r) * Plan::kStride + c];
      }
      if (row0 + r < rows) {
        end.store(row_table[r], column, before[i], value);
      }
    }
  }
}

}  // namespace lorun::block_cs
