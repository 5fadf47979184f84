// Takes the place of csrc/common/hopper.cuh: a product happens when its thread waits for it, the latest that it may,
// and is then computed from shared memory, each thread its own sums.
#pragma once

#include "common/cuda.cuh"

#define LORUN_HOPPER 1

namespace lorun {

constexpr int64_t kMostSharedHopper = cuda_on_cpu::kMostSharedHopper;

inline bool is_hopper(const Tensor&) {
  return true;
}

inline int warp_group() {
  return static_cast<int>(threadIdx.x) / 128;
}

inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(at) - cuda_on_cpu::shared_memory());
}

// How many arrivals end a phase, how many are missing, how many phases have ended.
struct BarrierState {
  uint16_t arrivals, missing;
  uint32_t phases;
};
static_assert(sizeof(BarrierState) == sizeof(uint64_t));

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  *barrier = std::bit_cast<uint64_t>(BarrierState{static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0});
}

inline void barrier_arrive(uint64_t* barrier) {
  auto state = std::bit_cast<BarrierState>(*barrier);
  if (--state.missing == 0) {
    state.missing = state.arrivals;
    ++state.phases;
  }
  *barrier = std::bit_cast<uint64_t>(state);
}

inline bool barrier_done(uint64_t* barrier, uint32_t parity) {
  return (std::bit_cast<BarrierState>(*barrier).phases & 1) != parity;
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  if (!barrier_done(barrier, parity)) {
    cuda_on_cpu::poll([=] { return barrier_done(barrier, parity); }, __LINE__);
  }
}

inline void barrier_arrive_after_copies(uint64_t* barrier) {
  cuda_on_cpu::commit_copies();
  cuda_on_cpu::wait_for_copies(0);
  barrier_arrive(barrier);
}

inline void publish_shared() {}

struct Factor {
  uint32_t at, strides;

  Factor(const void* from, uint32_t by_depth, uint32_t by_rows)
      : at(shared_address(from) >> 4 | by_depth >> 4 << 16), strides(by_rows >> 4) {
    if (shared_address(from) % 16 != 0 || by_depth % 16 != 0 || by_rows % 16 != 0 || (by_depth | by_rows) >> 18 != 0) {
      throw std::logic_error("a factor that no product can address");
    }
  }
};

template <class T>
float factor_value(const Factor& factor, uint32_t on, unsigned row, unsigned depth) {
  const uint64_t bits = factor.at + on;
  const uint64_t piece = (bits & 0x3fff) + (bits >> 16 & 0x3fff) * (depth / 8) + factor.strides * (row / 8);
  T value;
  std::memcpy(&value, cuda_on_cpu::shared_memory() + (piece + row % 8) * 16 + depth % 8 * sizeof(T), sizeof(T));
  return static_cast<float>(value);
}

template <int N>
using GroupSums = float[N / 8][4];

inline void products_begin() {}
inline void products_commit() {}

template <int N>
void products_wait(GroupSums<N>&) {
  auto& m = cuda_on_cpu::machine();
  for (const auto& product : std::exchange(m.fibers[m.current].products, {})) {
    product();
  }
}

template <class T, int N>
void products_add(GroupSums<N>& sums, const Factor& a, uint32_t a_on, const Factor& b, uint32_t b_on) {
  auto& m = cuda_on_cpu::machine();
  const unsigned lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4, column = lane % 4 * 2;
  m.fibers[m.current].products.push_back([=, &sums] {
    for (unsigned depth = 0; depth < 16; ++depth) {
      const float left[2] = {factor_value<T>(a, a_on, row, depth), factor_value<T>(a, a_on, row + 8, depth)};
      for (unsigned j = 0; j < N / 8; ++j) {
        for (unsigned c = 0; c < 4; ++c) {
          sums[j][c] += left[c / 2] * factor_value<T>(b, b_on, 8 * j + column + c % 2, depth);
        }
      }
    }
  });
}

}  // namespace lorun
