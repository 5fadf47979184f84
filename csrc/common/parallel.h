// Loops over torch's own thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
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

// [0, total) cut into `count` ranges whose bounds are multiples of `step`.
struct Slices {
  int64_t total, size, count;

  Slices(int64_t total, int64_t wanted, int64_t step) : total(total) {
    const int64_t steps = (total + step - 1) / step;
    size = std::max<int64_t>(1, (steps + wanted - 1) / std::max<int64_t>(1, wanted)) * step;
    count = (total + size - 1) / size;
  }

  int64_t begin(int64_t i) const {
    return i * size;
  }

  int64_t end(int64_t i) const {
    return std::min(total, (i + 1) * size);
  }
};

// f(i, j) over all pairs of a slice of each: enough pieces for all threads where one dimension alone has too few.
template <class F>
void parallel_pairs(const Slices& outer, const Slices& inner, const F& f) {
  if (outer.count * inner.count > 0) {
    torch::stable::parallel_for(0, outer.count * inner.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        f(i / inner.count, i % inner.count);
      }
    });
  }
}

// f(i) for i in [0, count), each taken by the next free thread: one that another program slows, or a slower core, takes
// fewer instead of keeping the others waiting. For long pieces of arithmetic; where memory is what limits, a fixed
// share keeps it in the same core's cache from call to call.
template <class F>
void parallel_turns(int64_t count, const F& f) {
  const int64_t crew = std::min<int64_t>(count, torch::stable::get_num_threads());
  std::atomic<int64_t> next = 0;
  if (crew > 0) {
    torch::stable::parallel_for(0, crew, 1, [&](int64_t, int64_t) {
      for (int64_t i = next++; i < count; i = next++) {
        f(i);
      }
    });
  }
}

}  // namespace lorun
