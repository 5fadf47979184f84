// What every CUDA launcher needs: the tensor's device, torch's current stream, a launch that reports its error; and
// what kernels need beyond the language. tests/cuda_on_cpu/ holds its counterpart, with which the kernels run on a CPU.
#pragma once

#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <type_traits>
#include <utility>

#include "common/tensor.h"

namespace lorun {

// The driver is asked once for each device.
template <cudaDeviceAttr kWhich>
int device_attribute(int device) {
  static std::array<std::atomic<int>, 64> known{};  // 0: not asked yet, or nothing to remember
  const bool remembered = device >= 0 && device < static_cast<int>(known.size());
  int value = remembered ? known[device].load(std::memory_order_relaxed) : 0;
  if (value == 0) {
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, kWhich, device));
    if (remembered) {
      known[device].store(value, std::memory_order_relaxed);
    }
  }
  return value;
}

// Makes the tensor's device current while it lives, and knows that device's current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : index_(t.get_device_index()) {
    int current = -1;
    STD_CUDA_CHECK(cudaGetDevice(&current));
    if (current != index_) {
      guard_.emplace(index_);
    }
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int index() const {
    return index_;
  }

  cudaStream_t stream() const {
    return stream_;
  }

  int64_t multiprocessors() const {
    return device_attribute<cudaDevAttrMultiProcessorCount>(index_);
  }

 private:
  const int index_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

// Shared memory that a block may ask for on every device since sm_80, static and dynamic.
constexpr int64_t kMostShared = 99 << 10;

// Lets a kernel have this much dynamic shared memory on a device. The driver is told once, for it takes its time; a
// limit above what a launch uses changes nothing.
inline void allow_shared(const OnDeviceOf& device, const void* kernel, int64_t shared) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int64_t> allowed;
  const std::lock_guard lock(mutex);
  int64_t& limit = allowed[{kernel, device.index()}];
  if (limit < shared) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    limit = shared;
  }
}

// `blocks` blocks of `threads` threads on the tensors' stream, with `shared` bytes of dynamic shared memory.
template <class... Parameters, class... Arguments>
void launch(const OnDeviceOf& device, void (*kernel)(Parameters...), int64_t blocks, int64_t threads, int64_t shared,
            const Arguments&... arguments) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "expected at most 2^31 - 1 thread blocks, got ", blocks);
  if (shared > 48 << 10) {
    allow_shared(device, reinterpret_cast<const void*>(kernel), shared);
  }
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared, device.stream()>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// 16 aligned bytes at once.
template <class V>
__device__ V load16(const void* at) {
  static_assert(sizeof(V) == 16);
  const uint4 bits = *static_cast<const uint4*>(at);
  V out;
  memcpy(&out, &bits, 16);
  return out;
}

// 2, 4 or 8 bytes of values, aligned to their size, as they wait in registers: bf16 and fp16 in pairs.
template <class V>
using WordsOf = std::conditional_t<sizeof(V) == 8, uint2, std::conditional_t<sizeof(V) == 4, unsigned, unsigned short>>;

// For what no kernel writes meanwhile.
template <class V>
__device__ WordsOf<V> load_words(const V* at) {
  static_assert(sizeof(V) == sizeof(WordsOf<V>));
  return __ldg(reinterpret_cast<const WordsOf<V>*>(at));
}

template <class V>
__device__ V from_words(const WordsOf<V>& words) {
  V out;
  memcpy(&out, &words, sizeof(V));
  return out;
}

template <class V>
__device__ V load(const V* at) {
  return from_words<V>(load_words(at));
}

// To global memory, in one access, or not at all. Pairs of words in PTX: nvcc makes their assignment two stores, and a
// branch of the condition.
template <class V>
__device__ void store(V* at, const V& value, bool really = true) {
  WordsOf<V> words;
  memcpy(&words, &value, sizeof(V));
  if constexpr (sizeof(V) == 8) {
    asm volatile("{ .reg .pred really; setp.ne.u32 really, %3, 0; @really st.global.v2.b32 [%0], {%1, %2}; }" ::"l"(
                     __cvta_generic_to_global(at)),
                 "r"(words.x), "r"(words.y), "r"(unsigned{really})
                 : "memory");
  } else if (really) {
    *reinterpret_cast<WordsOf<V>*>(at) = words;
  }
}

// Hides where the words came from: what was computed from them before is computed again, not kept in registers.
__device__ inline void recompute(unsigned short& words) {
  asm volatile("" : "+h"(words));
}

__device__ inline void recompute(unsigned& words) {
  asm volatile("" : "+r"(words));
}

__device__ inline void recompute(uint2& words) {
  asm volatile("" : "+r"(words.x), "+r"(words.y));
}

// kBytes (4, 8 or 16, to which both are aligned) from global to shared memory, zeros unless `inside`. Ends with
// __pipeline_commit() and __pipeline_wait_prior(). In PTX, because CUDA's own function knows `inside` at compile time.
template <int kBytes>
__device__ void copy_async(void* to, const void* from, bool inside) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const size_t source = __cvta_generic_to_global(from);
  const int bytes = inside ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(source), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(source), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

// Takes the pointer for given: otherwise nvcc multiplies again, wherever it is used, what it was made of.
template <class V>
__device__ void keep(const V*& pointer) {
  asm volatile("" : "+l"(pointer));
}

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char lorun_dynamic_shared[];
  return lorun_dynamic_shared;
}

// The same place in shared memory, taken for given: otherwise nvcc asks the device where its shared memory lies before
// every use in a loop, and waits 20 cycles or more for the answer.
__device__ inline unsigned char* found_once(unsigned char* shared) {
  size_t at = __cvta_generic_to_shared(shared);
  asm volatile("" : "+l"(at));
  return static_cast<unsigned char*>(__cvta_shared_to_generic(at));
}

}  // namespace lorun
