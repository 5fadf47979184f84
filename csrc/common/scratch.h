// Work space that outlives a call, so that a large buffer is not mapped, zeroed and returned at every one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace lorun {

// One 64-byte aligned piece per thread that calls an operator and per Slot. It only grows: keep the size that an
// operator asks for bounded, whatever its tensors' size.
template <class Slot>
void* scratch(std::size_t bytes) {
  struct Free {
    void operator()(void* p) const {
      ::operator delete(p, std::align_val_t{64});
    }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local std::size_t capacity = 0;
#ifdef __SANITIZE_ADDRESS__
  capacity = 0;  // a piece of its own for every call: what leaves it is seen
#endif
  if (bytes > capacity) {
    memory.reset();
    capacity = 0;
    memory.reset(::operator new(bytes, std::align_val_t{64}));
    capacity = bytes;
  }
  return memory.get();
}

}  // namespace lorun
