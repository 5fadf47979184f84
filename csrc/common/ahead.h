// Memory that is needed soon.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/simd.h"

namespace lorun {

// A range that is fetched to the second-level cache a few lines at a time, between the instructions of other work.
// Asked for all at once, lines would wait for each other; asked for when they are needed, the work would wait for them.
class Ahead {
 public:
  Ahead() = default;

  // times: that advance() will be called.
  Ahead(const void* at, int64_t bytes, int64_t times)
      : at_(static_cast<const char*>(at)),
        left_((bytes + kLine - 1) / kLine),
        at_once_((left_ + times - 1) / std::max<int64_t>(times, 1)) {}

  bool pending() const {
    return left_ > 0;
  }

  LORUN_INLINE inline void advance() {
    const int64_t count = std::min(at_once_, left_);
    left_ -= count;
    for (int64_t i = 0; i < count; ++i, at_ += kLine) {
      __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  static constexpr int64_t kLine = 64;

  const char* at_ = nullptr;
  int64_t left_ = 0, at_once_ = 0;
};

}  // namespace lorun
