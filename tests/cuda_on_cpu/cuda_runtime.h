// CUDA's language on the CPU, as far as csrc/ uses it: a .cu file compiles as C++ and its kernels run as they are
// written (tests/test_cuda_kernels.py). The threads of a block are fibers, one block after the other. Between two
// barriers the threads run in turn, in an order that changes from barrier to barrier and from block to block, so that
// a barrier that is missing shows in the result.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes)
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;

using std::max;
using std::min;

namespace cuda_on_cpu {

inline uint3 thread_index, block_index, block_size, grid_size;

constexpr std::size_t kStack = 128 << 10;
constexpr std::size_t kMostShared = 99 << 10;         // what a launch may ask for on every device since sm_80
constexpr std::size_t kMostSharedHopper = 227 << 10;  // and on sm_90

enum class State { kReady, kAtBlock, kAtWarp, kPolling, kDone };

// An asynchronous copy, from null of zeros: it happens when its thread waits for it, the latest that it may.
struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kDone;
  int line = 0;  // of the barrier it waits at
  unsigned char exchanged[32];
  std::vector<Copy> open;                       // since the last commit
  std::vector<std::vector<Copy>> groups;        // committed, not waited for
  std::function<bool()> goes_on;                // what a polling thread waits for
  std::vector<std::function<void()>> products;  // asynchronous ones: they happen when their thread waits for them
};

struct Machine {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  unsigned current = 0;
  std::function<void()> body;
  std::size_t shared_bytes = 0;
  std::exception_ptr error;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline unsigned char* shared_memory() {
  alignas(128) static unsigned char memory[kMostSharedHopper];
  return memory;
}

inline void run_fiber() {
  Machine& m = machine();
  try {
    m.body();
  } catch (...) {  // an exception must not leave the fiber's stack
    m.error = std::current_exception();
  }
  m.fibers[m.current].state = State::kDone;
}

inline void wait(State state, int line) {
  Machine& m = machine();
  const unsigned self = m.current;
  m.fibers[self].state = state;
  m.fibers[self].line = line;
  swapcontext(&m.fibers[self].context, &m.scheduler);
}

inline void poll(std::function<bool()> goes_on, int line) {
  Machine& m = machine();
  m.fibers[m.current].goes_on = std::move(goes_on);
  wait(State::kPolling, line);
}

// Lets those go on that all have reached the same barrier; true if anybody did.
inline bool release(unsigned begin, unsigned end, State state) {
  Machine& m = machine();
  int line = 0;
  for (unsigned t = begin; t < end; ++t) {
    const Fiber& f = m.fibers[t];
    if (f.state == State::kDone) {
      continue;
    }
    if (f.state != state) {
      return false;
    }
    if (line != 0 && line != f.line) {
      throw std::logic_error("threads wait at different barriers, lines " + std::to_string(line) + " and " +
                             std::to_string(f.line));
    }
    line = f.line;
  }
  for (unsigned t = begin; line != 0 && t < end; ++t) {
    if (m.fibers[t].state == state) {
      m.fibers[t].state = State::kReady;
    }
  }
  return line != 0;
}

inline void run_block(unsigned threads, unsigned seed) {
  Machine& m = machine();
  std::memset(shared_memory(), 0xff, m.shared_bytes);  // NaN in every floating-point type
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& f = m.fibers[t];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = &m.scheduler;
    makecontext(&f.context, &run_fiber, 0);
    f.state = State::kReady;
    f.open.clear();
    f.groups.clear();
    f.products.clear();
  }
  for (unsigned round = seed;; ++round) {
    const unsigned start = round * 2654435761u % threads;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned t = (start + (round % 2 == 0 ? i : threads - i)) % threads;
      if (m.fibers[t].state == State::kReady) {
        m.current = t;
        thread_index.x = t;
        swapcontext(&m.scheduler, &m.fibers[t].context);
        if (m.error) {
          std::rethrow_exception(std::exchange(m.error, nullptr));
        }
      }
    }
    bool more = release(0, threads, State::kAtBlock);
    for (unsigned warp = 0; warp < threads; warp += 32) {
      more = release(warp, std::min(warp + 32, threads), State::kAtWarp) || more;
    }
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& f = m.fibers[t];
      if (f.state == State::kPolling && f.goes_on()) {
        f.state = State::kReady;
        more = true;
      }
    }
    if (!more) {
      break;
    }
  }
  for (unsigned t = 0; t < threads; ++t) {
    if (m.fibers[t].state != State::kDone) {
      throw std::logic_error("thread " + std::to_string(t) + " waits forever at line " +
                             std::to_string(m.fibers[t].line));
    }
  }
}

inline void run_grid(unsigned blocks, unsigned threads, std::size_t shared, std::function<void()> body) {
  Machine& m = machine();
  if (blocks == 0 || threads == 0 || threads > 1024 || shared > kMostSharedHopper) {
    throw std::logic_error("a launch that a device would refuse: " + std::to_string(blocks) + " blocks of " +
                           std::to_string(threads) + " threads, " + std::to_string(shared) + " bytes");
  }
  while (m.fibers.size() < threads) {
    m.fibers.emplace_back();
  }
  m.body = std::move(body);
  m.shared_bytes = shared;
  ASAN_UNPOISON_MEMORY_REGION(shared_memory(), shared);
  ASAN_POISON_MEMORY_REGION(shared_memory() + shared, kMostSharedHopper - shared);
  block_size.x = threads;
  grid_size.x = blocks;
  for (unsigned b = 0; b < blocks; ++b) {
    block_index.x = b;
    run_block(threads, b);
  }
}

// Shows every thread of the warp each one's value: use(of), where of(lane) is that lane's.
template <class V, class F>
void exchange_all(const V& value, const F& use, int line) {
  static_assert(sizeof(V) <= sizeof(Fiber::exchanged));
  Machine& m = machine();
  const unsigned self = m.current, warp = self / 32 * 32;
  std::memcpy(m.fibers[self].exchanged, &value, sizeof(V));
  wait(State::kAtWarp, line);
  use([&](unsigned lane) {
    V out;
    std::memcpy(&out, m.fibers[warp + lane].exchanged, sizeof(V));
    return out;
  });
  wait(State::kAtWarp, line);
}

template <class V>
V exchange(V value, unsigned from, int line) {
  V out;
  exchange_all(value, [&](const auto& of) { out = of(from % 32); }, line);
  return out;
}

inline void copy_later(void* to, const void* from, std::size_t bytes) {
  if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % bytes != 0) {
    throw std::logic_error("an asynchronous copy that is not aligned to its size");
  }
  Machine& m = machine();
  m.fibers[m.current].open.push_back({to, from, bytes});
}

inline void commit_copies() {
  Machine& m = machine();
  Fiber& f = m.fibers[m.current];
  f.groups.push_back(std::exchange(f.open, {}));
}

inline void wait_for_copies(std::size_t but_the_last) {
  Machine& m = machine();
  auto& groups = m.fibers[m.current].groups;
  while (groups.size() > but_the_last) {
    for (const Copy& copy : groups.front()) {
      if (copy.from != nullptr) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    }
    groups.erase(groups.begin());
  }
}

}  // namespace cuda_on_cpu

#define threadIdx ::cuda_on_cpu::thread_index
#define blockIdx ::cuda_on_cpu::block_index
#define blockDim ::cuda_on_cpu::block_size
#define gridDim ::cuda_on_cpu::grid_size

#define __syncthreads() ::cuda_on_cpu::wait(::cuda_on_cpu::State::kAtBlock, __LINE__)
#define __syncwarp() ::cuda_on_cpu::wait(::cuda_on_cpu::State::kAtWarp, __LINE__)
#define __shfl_sync(mask, value, lane) ::cuda_on_cpu::exchange(value, static_cast<unsigned>(lane), __LINE__)
#define __shfl_xor_sync(mask, value, lanes) \
  ::cuda_on_cpu::exchange(value, (threadIdx.x % 32) ^ static_cast<unsigned>(lanes), __LINE__)

template <class V>
V __ldg(const V* at) {
  if (reinterpret_cast<std::uintptr_t>(at) % alignof(V) != 0) {
    throw std::logic_error("a load that is not aligned to its size");
  }
  return *at;
}

inline void __pipeline_commit() {
  ::cuda_on_cpu::commit_copies();
}

inline void __pipeline_wait_prior(int but_the_last) {
  ::cuda_on_cpu::wait_for_copies(but_the_last);
}
