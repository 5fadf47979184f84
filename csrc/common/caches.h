// What fits the processor's caches.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace lorun {

// Of one core.
inline int64_t second_level_cache() {
  static const int64_t bytes = [] {
    int64_t size = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return size > 0 ? size : int64_t{512} << 10;
  }();
  return bytes;
}

inline int64_t last_level_cache() {
  static const int64_t bytes = [] {
    int64_t size = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    size = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return size > 0 ? size : int64_t{32} << 20;
  }();
  return bytes;
}

}  // namespace lorun
