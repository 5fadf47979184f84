// A slice of the low-rank update: one row of the product at a time, a run of columns in registers.

namespace lorun::lora_merge::LORUN_VARIANT {

using namespace ::lorun::LORUN_VARIANT;

// sums = sum_r up[r] * down[r * stride], over `Vecs` vectors of neighbouring columns.
template <class W, int Vecs>
LORUN_TARGET inline void run(const W* down, int64_t stride, const W* up, int64_t rank, W* sums) {
  using L = Lanes<W>;
  typename L::Vec acc[Vecs] = {};
  for (int64_t r = 0; r < rank; ++r, down += stride) {
    const W factor = up[r];
#pragma GCC unroll 8
    for (int i = 0; i < Vecs; ++i) {
      acc[i] += factor * load(down + i * L::kCount);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Vecs; ++i) {
    store(sums + i * L::kCount, acc[i]);
  }
}

// sums[v] = the update's values [begin, begin + n) of one stage.
template <class W>
LORUN_TARGET void update(const Shape& s, const W* down, const W* up, int64_t begin, int64_t n, W* sums) {
  constexpr int64_t kLanes = Lanes<W>::kCount;
  for (int64_t v = 0; v < n;) {
    const int64_t row = (begin + v) / s.cols, col = (begin + v) % s.cols;
    const int64_t length = std::min(s.cols - col, n - v);
    const W* u = up + row % s.rows * s.rank;
    const W* d = down + row / s.rows * s.rank * s.cols + col;
    int64_t c = 0;
    for (; c + 8 * kLanes <= length; c += 8 * kLanes) {
      run<W, 8>(d + c, s.cols, u, s.rank, sums + v + c);
    }
    // Of what is left as many together as possible: a sum by itself waits for its last addition.
    if (c + 4 * kLanes <= length) {
      run<W, 4>(d + c, s.cols, u, s.rank, sums + v + c);
      c += 4 * kLanes;
    }
    if (c + 2 * kLanes <= length) {
      run<W, 2>(d + c, s.cols, u, s.rank, sums + v + c);
      c += 2 * kLanes;
    }
    if (c + kLanes <= length) {
      run<W, 1>(d + c, s.cols, u, s.rank, sums + v + c);
      c += kLanes;
    }
    for (; c < length; ++c) {
      W sum = 0;
      for (int64_t r = 0; r < s.rank; ++r) {
        sum += u[r] * d[r * s.cols + c];
      }
      sums[v + c] = sum;
    }
    v += length;
  }
}

}  // namespace lorun::lora_merge::LORUN_VARIANT
