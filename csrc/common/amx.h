// Matrix tiles of x86 (AMX, bf16): whether this machine has them, and the few instructions that the kernels use.
//
// As assembly, because compilers' own macros for them tell nothing of the memory that they read and write.
#pragma once

#include <cstdint>
#include <utility>

#include "common/simd.h"

#if defined(LORUN_X86) && defined(__linux__)
#define LORUN_AMX 1
// For the vector code around the tiles: what every processor that has them runs.
#define LORUN_TARGET_AMX __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma")))
#endif

namespace lorun {

// Whether the processor multiplies bf16 tiles and the system lets this process use them. LORUN_CPU turns it off.
bool has_amx();

#ifdef LORUN_AMX

// Every tile 16 rows of 64 bytes, for the lifetime of this object, on the thread that made it.
class Tiles {
 public:
  Tiles() {
    Layout layout{};
    layout.palette = 1;
    for (int i = 0; i < 8; ++i) {
      layout.bytes[i] = 64;
      layout.rows[i] = 16;
    }
    asm volatile("ldtilecfg %0" : : "m"(layout) : "memory");
  }

  ~Tiles() {
    asm volatile("tilerelease" : : : "memory");
  }

  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Layout {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
};

// f.template operator()<0>(), ..., <Count - 1>(): a tile's number is part of the instruction.
template <int Count, class F>
LORUN_INLINE inline void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      LORUN_INLINE { (f.template operator()<I>(), ...); }(std::make_integer_sequence<int, Count>{});
}

template <int Tile>
LORUN_INLINE inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
}

// Between ordinary stores and tile_load() of what they stored. (Loads that said so themselves would make the compiler
// forget, in the innermost loop, whatever it keeps in registers.)
LORUN_INLINE inline void tile_fence() {
  asm volatile("" : : : "memory");
}

// 16 rows of 64 bytes, `pitch` bytes apart.
template <int Tile>
LORUN_INLINE inline void tile_load(const void* at, int64_t pitch) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(Tile), "r"(at), "r"(pitch));
}

template <int Tile>
LORUN_INLINE inline void tile_store(void* at, int64_t pitch) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(Tile), "r"(at), "r"(pitch) : "memory");
}

// Sum (fp32, 16 x 16) += A (bf16, 16 x 32) . B (bf16, 16 pairs x 16).
template <int Sum, int A, int B>
LORUN_INLINE inline void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(A), "i"(B));
}

#endif

}  // namespace lorun
