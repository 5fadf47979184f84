// What fits the processor's caches.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace lorun {

namespace detail {

// As the C library knows it by this name.
inline int64_t cache_bytes([[maybe_unused]] int name, int64_t otherwise) {
  int64_t size = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
  size = sysconf(name);
#endif
  return size > 0 ? size : otherwise;
}

#ifdef _SC_LEVEL2_CACHE_SIZE
constexpr int kSecondLevel = _SC_LEVEL2_CACHE_SIZE, kLastLevel = _SC_LEVEL3_CACHE_SIZE;
#else
constexpr int kSecondLevel = 0, kLastLevel = 0;
#endif

}  // namespace detail

// Of one core.
inline int64_t second_level_cache() {
  static const int64_t bytes = detail::cache_bytes(detail::kSecondLevel, int64_t{512} << 10);
  return bytes;
}

inline int64_t last_level_cache() {
  static const int64_t bytes = detail::cache_bytes(detail::kLastLevel, int64_t{32} << 20);
  return bytes;
}

}  // namespace lorun
