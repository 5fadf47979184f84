#pragma once

#include <algorithm>
#include <cstdint>

namespace lorun {

// n / by for 0 <= n < 2^31, without the many instructions of a division.
class Divisor {
 public:
  explicit Divisor(int64_t by) : by_(static_cast<int>(std::max<int64_t>(by, 1))) {  // 0 of an empty image, unused
    while (int64_t{1} << shift_ < by_) {
      ++shift_;
    }
    multiplier_ = static_cast<uint32_t>(((uint64_t{1} << (31 + shift_)) + by_ - 1) / by_);
  }

  __device__ int quotient(int n) const {
    return static_cast<int>(static_cast<uint32_t>(uint64_t{2u * static_cast<uint32_t>(n)} * multiplier_ >> 32) >>
                            shift_);
  }

  __device__ int value() const {
    return by_;
  }

 private:
  int by_, shift_ = 0;
  uint32_t multiplier_;
};

}  // namespace lorun
