// Products of a weight's gradient G (rows, cols) with its factors: sums in registers, in one fixed order.

namespace lorun::lora_merge::LORUN_VARIANT {

using namespace ::lorun::LORUN_VARIANT;

// to[r * cols + c] = scale * sum over m of up[m * rank + r] * g[m * cols + c], for `Rank` rows and `Vecs` vectors of
// columns.
template <class W, int Rank, int Vecs>
LORUN_TARGET void down_sums(const Shape& s, const W* g, const W* up, W scale, W* to) {
  using L = Lanes<W>;
  typename L::Vec acc[Rank][Vecs] = {};
  for (int64_t m = 0; m < s.rows; ++m, g += s.cols, up += s.rank) {
    typename L::Vec row[Vecs];
#pragma GCC unroll 8
    for (int i = 0; i < Vecs; ++i) {
      row[i] = load(g + i * L::kCount);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rank; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < Vecs; ++i) {
        acc[r][i] += up[r] * row[i];
      }
    }
  }
  for (int r = 0; r < Rank; ++r) {
    for (int i = 0; i < Vecs; ++i) {
      store(to + r * s.cols + i * L::kCount, scale * acc[r][i]);
    }
  }
}

template <class W, int Vecs>
LORUN_TARGET void down_columns(const Shape& s, const W* g, const W* up, W scale, W* to) {
  static_assert(kRanks == 4);
  int64_t r = 0;
  for (; r + kRanks <= s.rank; r += kRanks) {
    down_sums<W, kRanks, Vecs>(s, g, up + r, scale, to + r * s.cols);
  }
  switch (s.rank - r) {
    case 3:
      return down_sums<W, 3, Vecs>(s, g, up + r, scale, to + r * s.cols);
    case 2:
      return down_sums<W, 2, Vecs>(s, g, up + r, scale, to + r * s.cols);
    case 1:
      return down_sums<W, 1, Vecs>(s, g, up + r, scale, to + r * s.cols);
    default:
      return;
  }
}

// The gradient of columns [begin, end) of one of the batch's down (rank, cols).
template <class W>
LORUN_TARGET void down_gradient(const Shape& s, const W* g, const W* up, W scale, int64_t begin, int64_t end, W* to) {
  constexpr int64_t kLanes = Lanes<W>::kCount;
  int64_t c = begin;
  for (; c + 3 * kLanes <= end; c += 3 * kLanes) {
    down_columns<W, 3>(s, g + c, up, scale, to + c);
  }
  for (; c + kLanes <= end; c += kLanes) {
    down_columns<W, 1>(s, g + c, up, scale, to + c);
  }
  for (; c < end; ++c) {
    for (int64_t r = 0; r < s.rank; ++r) {
      W sum = 0;
      for (int64_t m = 0; m < s.rows; ++m) {
        sum += up[m * s.rank + r] * g[m * s.cols + c];
      }
      to[r * s.cols + c] = scale * sum;
    }
  }
}

// sums[m] += sum over n of g[m * cols + n] * across[n], `Vecs` vectors each, for `Rows` rows.
template <class W, int Rows, int Vecs>
LORUN_TARGET inline void up_sums(const W* g, int64_t cols, const W* across, int64_t n, W* sums) {
  using L = Lanes<W>;
  typename L::Vec acc[Rows][Vecs];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 8
    for (int i = 0; i < Vecs; ++i) {
      acc[m][i] = load(sums + m * kAcross + i * L::kCount);
    }
  }
  for (int64_t c = 0; c < n; ++c, across += kAcross) {
    typename L::Vec factors[Vecs];
#pragma GCC unroll 8
    for (int i = 0; i < Vecs; ++i) {
      factors[i] = load(across + i * L::kCount);
    }
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 8
      for (int i = 0; i < Vecs; ++i) {
        acc[m][i] += g[m * cols + c] * factors[i];
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 8
    for (int i = 0; i < Vecs; ++i) {
      store(sums + m * kAcross + i * L::kCount, acc[m][i]);
    }
  }
}

template <class W, int Vecs>
LORUN_TARGET void up_rows(const W* g, int64_t cols, const W* across, int64_t n, int64_t rows, W* sums) {
  constexpr int kTogether = Vecs == 1 ? 8 : 4;
  int64_t m = 0;
  for (; m + kTogether <= rows; m += kTogether) {
    up_sums<W, kTogether, Vecs>(g + m * cols, cols, across, n, sums + m * kAcross);
  }
  for (; m < rows; ++m) {
    up_sums<W, 1, Vecs>(g + m * cols, cols, across, n, sums + m * kAcross);
  }
}

// The gradient of `rows` rows, at most kRows, of up (rows, rank), from the first of them in g and in the result.
// across, sums: work space for kDeep and kRows times kAcross values.
template <class W>
LORUN_TARGET void up_gradient(const Shape& s, const W* g, const W* down, W scale, int64_t rows, W* across, W* sums,
                              W* to) {
  constexpr int64_t kLanes = Lanes<W>::kCount;
  static_assert(kAcross % (2 * kLanes) == 0);
  for (int64_t r = 0; r < s.rank; r += kAcross) {
    const int64_t ranks = std::min(kAcross, s.rank - r);
    std::fill_n(sums, rows * kAcross, W{});
    std::fill_n(across, kDeep * kAcross, W{});
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t c = 0; c < s.cols; c += kDeep) {
        const int64_t n = std::min(kDeep, s.cols - c);
        const W* from = down + (b * s.rank + r) * s.cols + c;
        for (int64_t i = 0; i < ranks; ++i) {
          for (int64_t j = 0; j < n; ++j) {
            across[j * kAcross + i] = from[i * s.cols + j];
          }
        }
        const W* values = g + b * s.rows * s.cols + c;
        if (ranks <= kLanes) {
          up_rows<W, 1>(values, s.cols, across, n, rows, sums);
          continue;
        }
        for (int64_t i = 0; i < ranks; i += 2 * kLanes) {
          up_rows<W, 2>(values, s.cols, across + i, n, rows, sums + i);
        }
      }
    }
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t i = 0; i < ranks; ++i) {
        to[m * s.rank + r + i] = scale * sums[m * kAcross + i];
      }
    }
  }
}

}  // namespace lorun::lora_merge::LORUN_VARIANT
