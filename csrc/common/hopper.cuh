// What sm_90a has and others lack: products of a whole warp group that read their factors from shared memory (PTX's
// wgmma), and the barriers in shared memory that such pipelines hang on. tests/cuda_on_cpu/ holds the counterpart.
#pragma once

#include <cstdint>

#include "common/cuda.cuh"

// Defined where the code below compiles to something: elsewhere its kernels are empty, and must not be launched.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LORUN_HOPPER 1
#endif

namespace lorun {

// Shared memory that a block may ask for on sm_90.
constexpr int64_t kMostSharedHopper = 227 << 10;

// Whether the tensor's device is of the one generation that has these instructions.
inline bool is_hopper(const Tensor& t) {
  const int device = t.get_device_index();
  return device_attribute<cudaDevAttrComputeCapabilityMajor>(device) == 9 &&
         device_attribute<cudaDevAttrComputeCapabilityMinor>(device) == 0;
}

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Of four warps each. The compiler must see that a warp's threads agree on it: products in what it takes for diverging
// branches it puts one after the other.
__device__ inline int warp_group() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
}

// A barrier's phase ends when `arrivals` threads have arrived; the next one begins at once.
__device__ inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Whether the phase of this parity (the first one's is 0) has ended.
__device__ inline bool barrier_done(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}

__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!barrier_done(barrier, parity)) {
  }
}

// Arrives once all asynchronous copies that this thread has begun are there.
__device__ inline void barrier_arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Between what was written to shared memory, by this thread or by those that it has waited for, and products that read
// it.
__device__ inline void publish_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A factor in shared memory, 64 rows of A or N columns of B by 16 depths: in pieces of 8 rows by 8 depths (128 bytes,
// row after row), `by_depth` bytes to the piece of the next 8 depths, `by_rows` to that of the next 8 rows. `at` counts
// in 16 bytes; it is all that a loop has to change.
struct Factor {
  uint32_t at, strides;

  __device__ Factor(const void* from, uint32_t by_depth, uint32_t by_rows)
      : at(shared_address(from) >> 4 | by_depth >> 4 << 16), strides(by_rows >> 4) {}
};

// Sums of 64 x N: thread 32 w + 4 g + t of the group holds, of column group j of 8, in sums[j] those of row 16 w + g at
// columns 2t, 2t + 1, then of row 16 w + g + 8.
template <int N>
using GroupSums = float[N / 8][4];

// Between other accesses to the sums and the products that add to them.
__device__ inline void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// After it the sums may be read, and the factors overwritten.
template <int N>
__device__ void products_wait(GroupSums<N>& sums) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      asm volatile("" : "+f"(sums[j][c])::"memory");
    }
  }
}

#define LORUN_SUMS4(j) "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])
#define LORUN_WGMMA(n, type, registers, a, a_strides, b, b_strides, ...)                            \
  asm volatile("{ .reg .b64 a, b; mov.b64 a, {" a ", " a_strides "}; mov.b64 b, {" b ", " b_strides \
               "}; wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers     \
               "}, a, b, 1, 1, 1, 0, 0; }"                                                          \
               : __VA_ARGS__                                                                        \
               : "r"(a_.at + a_on), "r"(a_.strides), "r"(b_.at + b_on), "r"(b_.strides))
#define LORUN_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LORUN_R16 LORUN_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LORUN_R24 LORUN_R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define LORUN_R32 LORUN_R24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define LORUN_WGMMA_SIZES(type)                                                                                    \
  if constexpr (N == 16) {                                                                                         \
    LORUN_WGMMA("16", type, LORUN_R8, "%8", "%9", "%10", "%11", LORUN_SUMS4(0), LORUN_SUMS4(1));                   \
  } else if constexpr (N == 32) {                                                                                  \
    LORUN_WGMMA("32", type, LORUN_R16, "%16", "%17", "%18", "%19", LORUN_SUMS4(0), LORUN_SUMS4(1), LORUN_SUMS4(2), \
                LORUN_SUMS4(3));                                                                                   \
  } else if constexpr (N == 48) {                                                                                  \
    LORUN_WGMMA("48", type, LORUN_R24, "%24", "%25", "%26", "%27", LORUN_SUMS4(0), LORUN_SUMS4(1), LORUN_SUMS4(2), \
                LORUN_SUMS4(3), LORUN_SUMS4(4), LORUN_SUMS4(5));                                                   \
  } else {                                                                                                         \
    LORUN_WGMMA("64", type, LORUN_R32, "%32", "%33", "%34", "%35", LORUN_SUMS4(0), LORUN_SUMS4(1), LORUN_SUMS4(2), \
                LORUN_SUMS4(3), LORUN_SUMS4(4), LORUN_SUMS4(5), LORUN_SUMS4(6), LORUN_SUMS4(7));                   \
  }

// sums += a b^T, asynchronously; T of both factors: bf16 or fp16. They begin so many 16 bytes on.
template <class T, int N>
__device__ void products_add(GroupSums<N>& sums, const Factor& a_, uint32_t a_on, const Factor& b_, uint32_t b_on) {
#if defined(LORUN_HOPPER)
  static_assert(N == 16 || N == 32 || N == 48 || N == 64);
  if constexpr (std::is_same_v<T, BFloat16>) {
    LORUN_WGMMA_SIZES("bf16")
  } else {
    LORUN_WGMMA_SIZES("f16")
  }
#endif
}

#undef LORUN_WGMMA_SIZES
#undef LORUN_R32
#undef LORUN_R24
#undef LORUN_R16
#undef LORUN_R8
#undef LORUN_WGMMA
#undef LORUN_SUMS4

}  // namespace lorun
