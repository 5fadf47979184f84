// Takes the place of csrc/common/cuda.cuh: launches run on the CPU, and the operators are registered for CPU tensors
// in a namespace of their own, beside the library's.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <mutex>
#include <type_traits>

#include "common/tensor.h"

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m)                                                                   \
  static void cuda_on_cpu_register(torch::stable::detail::StableLibrary&);                                      \
  static const torch::stable::detail::StableTorchLibraryInit cuda_on_cpu_init(                                  \
      torch::stable::detail::StableLibrary::Kind::IMPL, &cuda_on_cpu_register, "lorun_fast_cuda_on_cpu", "CPU", \
      __FILE__, __LINE__);                                                                                      \
  void cuda_on_cpu_register(torch::stable::detail::StableLibrary& m)

namespace lorun {

constexpr int64_t kMostShared = cuda_on_cpu::kMostShared;

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor&) {}

  cudaStream_t stream() const {
    return nullptr;
  }

  int64_t multiprocessors() const {
    return 4;
  }
};

inline std::mutex one_launch_at_a_time;

template <class... Parameters, class... Arguments>
void launch(const OnDeviceOf&, void (*kernel)(Parameters...), int64_t blocks, int64_t threads, int64_t shared,
            const Arguments&... arguments) {
  const std::lock_guard lock(one_launch_at_a_time);
  cuda_on_cpu::run_grid(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared,
                        [&] { kernel(arguments...); });
}

template <class V>
V load16(const void* at) {
  static_assert(sizeof(V) == 16);
  if (reinterpret_cast<std::uintptr_t>(at) % 16 != 0) {
    throw std::logic_error("a 16-byte load that is not aligned");
  }
  V out;
  std::memcpy(&out, at, 16);
  return out;
}

template <class V>
using WordsOf = std::conditional_t<sizeof(V) == 8, uint2, std::conditional_t<sizeof(V) == 4, unsigned, unsigned short>>;

template <class V>
WordsOf<V> load_words(const V* at) {
  static_assert(sizeof(V) == sizeof(WordsOf<V>));
  return __ldg(reinterpret_cast<const WordsOf<V>*>(at));
}

template <int kBytes>
void copy_async(void* to, const void* from, bool inside) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  cuda_on_cpu::copy_later(to, inside ? from : nullptr, kBytes);
}

template <class V>
void keep(const V*&) {}

template <class V>
V from_words(const WordsOf<V>& words) {
  V out;
  std::memcpy(&out, &words, sizeof(V));
  return out;
}

template <class V>
V load(const V* at) {
  return from_words<V>(load_words(at));
}

template <class V>
void store(V* at, const V& value, bool really = true) {
  if (!really) {
    return;
  }
  if (reinterpret_cast<std::uintptr_t>(at) % sizeof(V) != 0) {
    throw std::logic_error("a store that is not aligned to its size");
  }
  std::memcpy(at, &value, sizeof(V));
}

template <class Words>
void recompute(Words&) {}

inline unsigned char* dynamic_shared() {
  return cuda_on_cpu::shared_memory();
}

inline unsigned char* found_once(unsigned char* shared) {
  return shared;
}

}  // namespace lorun
