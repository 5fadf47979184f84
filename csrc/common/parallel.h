// Loops over torch's own thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace lorun {

// f(begin, end) over [0, count). `work` is the number of elements that one iteration touches: a thread gets at
// least some 16,000 of them, less does not pay for waking it.
template <class F>
void parallel(int64_t count, int64_t work, const F& f) {
  if (count > 0) {
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work)), f);
  }
}

}  // namespace lorun
