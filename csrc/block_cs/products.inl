// The two matrix products of block compressive sensing, on tiles that stay in registers.
//
// measure: T[l, k] = sum_p P[l, p] Phi[k, p]. Both factors lie with p contiguous, so the vector runs along p, each
//   (l, k) of a tile has its own vector of partial sums, and nothing is packed or transposed.
// spread: C[l, p] += sum_k A[l, k] B[k, p]. The vector runs along p, A's elements are broadcast. A comes in tiles
//   [l / kRows][k][kRows]; a panel of B is copied once, so that its rows, pages apart, become neighbours in L1.

namespace lorun::block_cs::LORUN_VARIANT {

template <class W>
struct Tile {
  typedef W Vec __attribute__((vector_size(LORUN_VECTOR_BYTES)));
  // As it lies in memory: any alignment, and the same bytes as W.
  typedef W Loose __attribute__((vector_size(LORUN_VECTOR_BYTES), aligned(alignof(W)), may_alias));
  static constexpr int kLanes = LORUN_VECTOR_BYTES / sizeof(W);
  static constexpr bool kManyRegisters = LORUN_REGISTERS == 32;
  static constexpr int kDotBlocks = 4;
  static constexpr int kDotRows = kManyRegisters ? 6 : 3;
  static constexpr int kRows = kManyRegisters ? 8 : 4;
  static constexpr int kVecs = kManyRegisters ? 2 : 3;
  static constexpr int kCols = kVecs * kLanes;
};

template <class W>
LORUN_TARGET int spread_rows() {
  return Tile<W>::kRows;
}

// The sum of a vector's lanes: halves are added until 16 bytes are left.
template <class W, int Bytes>
LORUN_TARGET inline W sum(const W* lanes) {
  if constexpr (Bytes > 16) {
    typedef W Half __attribute__((vector_size(Bytes / 2)));
    Half low, high;
    __builtin_memcpy(&low, lanes, sizeof(low));
    __builtin_memcpy(&high, lanes + Bytes / 2 / sizeof(W), sizeof(high));
    low += high;
    return sum<W, Bytes / 2>(reinterpret_cast<const W*>(&low));
  } else if constexpr (sizeof(W) == 4) {
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  } else {
    return lanes[0] + lanes[1];
  }
}

// Adds the products at [begin, end), fewer than a vector's lanes.
template <class W>
LORUN_TARGET __attribute__((noinline)) void add_tail(const W* const* p, const W* const* q, int64_t begin, int64_t end,
                                                     W* out) {
  using T = Tile<W>;
  for (int l = 0; l < T::kDotBlocks; ++l) {
    for (int k = 0; k < T::kDotRows; ++k) {
      for (int64_t j = begin; j < end; ++j) {
        out[l * T::kDotRows + k] += p[l][j] * q[k][j];
      }
    }
  }
}

// Partial sums of <p[l], q[k]>, a vector for each pair, over the whole vectors before `pixels`.
// Not inlined: with anything else around it, the compiler no longer keeps all sums in registers.
template <class W>
LORUN_TARGET __attribute__((noinline)) void dot_vectors(const W* const* p, const W* const* q, int64_t pixels, W* sums) {
  using T = Tile<W>;
  using Vec = typename T::Vec;
  using Loose = typename T::Loose;
  const W *a_at[T::kDotBlocks], *b_at[T::kDotRows];
  for (int l = 0; l < T::kDotBlocks; ++l) {
    a_at[l] = p[l];
  }
  for (int k = 0; k < T::kDotRows; ++k) {
    b_at[k] = q[k];
  }
  Vec acc[T::kDotBlocks][T::kDotRows] = {};
  for (int64_t i = 0; i + T::kLanes <= pixels; i += T::kLanes) {
    Vec a[T::kDotBlocks];
#pragma GCC unroll 8
    for (int l = 0; l < T::kDotBlocks; ++l) {
      a[l] = *reinterpret_cast<const Loose*>(a_at[l] + i);
    }
#pragma GCC unroll 8
    for (int k = 0; k < T::kDotRows; ++k) {
      const Vec b = *reinterpret_cast<const Loose*>(b_at[k] + i);
#pragma GCC unroll 8
      for (int l = 0; l < T::kDotBlocks; ++l) {
        acc[l][k] += a[l] * b;
      }
    }
  }
#pragma GCC unroll 8
  for (int l = 0; l < T::kDotBlocks; ++l) {
#pragma GCC unroll 8
    for (int k = 0; k < T::kDotRows; ++k) {
      *reinterpret_cast<Loose*>(sums + (l * T::kDotRows + k) * T::kLanes) = acc[l][k];
    }
  }
}

// out[l * kDotRows + k] = <P[l], Phi[k]> for `blocks` rows of P and `rows` rows of Phi; both are at least 1, and rows
// past them repeat the last.
template <class W>
LORUN_TARGET void dot_tile(const W* packed, const W* phi, int64_t pixels, int64_t blocks, int64_t rows, W* out) {
  using T = Tile<W>;
  const W *p[T::kDotBlocks], *q[T::kDotRows];
  for (int l = 0; l < T::kDotBlocks; ++l) {
    p[l] = packed + (l < blocks ? l : blocks - 1) * pixels;
  }
  for (int k = 0; k < T::kDotRows; ++k) {
    q[k] = phi + (k < rows ? k : rows - 1) * pixels;
  }
  alignas(LORUN_VECTOR_BYTES) W sums[T::kDotBlocks * T::kDotRows * T::kLanes];
  dot_vectors<W>(p, q, pixels, sums);
  for (int i = 0; i < T::kDotBlocks * T::kDotRows; ++i) {
    out[i] = sum<W, LORUN_VECTOR_BYTES>(sums + i * T::kLanes);
  }
  if (pixels % T::kLanes != 0) {
    add_tail<W>(p, q, pixels / T::kLanes * T::kLanes, pixels, out);
  }
}

// T[l, k] for blocks [block_begin, block_end) and rows [row_begin, row_end), handed over as store(l, k, value).
template <class W, class Store>
LORUN_TARGET void measure(const W* packed, const W* phi, int64_t pixels, int64_t block_begin, int64_t block_end,
                          int64_t row_begin, int64_t row_end, const Store& store) {
  using T = Tile<W>;
  W out[T::kDotBlocks * T::kDotRows];
  for (int64_t k = row_begin; k < row_end; k += T::kDotRows) {
    const int64_t rows = k + T::kDotRows <= row_end ? T::kDotRows : row_end - k;
    for (int64_t l = block_begin; l < block_end; l += T::kDotBlocks) {
      const int64_t blocks = l + T::kDotBlocks <= block_end ? T::kDotBlocks : block_end - l;
      dot_tile(packed + l * pixels, phi + k * pixels, pixels, blocks, rows, out);
      for (int64_t dk = 0; dk < rows; ++dk) {
        for (int64_t dl = 0; dl < blocks; ++dl) {
          store(l + dl, k + dk, out[dl * T::kDotRows + dk]);
        }
      }
    }
  }
}

// acc = A B over `depth` for one tile of A and one panel of B, added onto (or written to) C's rows.
template <class W, bool Add>
LORUN_TARGET inline void outer_tile(const W* a, const W* panel, int64_t depth, W* c, int64_t c_stride, int64_t rows,
                                    int64_t cols) {
  using T = Tile<W>;
  using Vec = typename T::Vec;
  using Loose = typename T::Loose;
  Vec acc[T::kRows][T::kVecs] = {};
  for (int64_t k = 0; k < depth; ++k, a += T::kRows, panel += T::kCols) {
    Vec b[T::kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < T::kVecs; ++v) {
      b[v] = *reinterpret_cast<const Loose*>(panel + v * T::kLanes);
    }
#pragma GCC unroll 8
    for (int l = 0; l < T::kRows; ++l) {
#pragma GCC unroll 8
      for (int v = 0; v < T::kVecs; ++v) {
        acc[l][v] += a[l] * b[v];
      }
    }
  }
  if (rows == T::kRows && cols == T::kCols) {
#pragma GCC unroll 8
    for (int l = 0; l < T::kRows; ++l) {
#pragma GCC unroll 8
      for (int v = 0; v < T::kVecs; ++v) {
        Loose* at = reinterpret_cast<Loose*>(c + l * c_stride + v * T::kLanes);
        *at = Add ? *at + acc[l][v] : acc[l][v];
      }
    }
    return;
  }
  W out[T::kRows][T::kCols];
  __builtin_memcpy(out, acc, sizeof(out));
  for (int64_t l = 0; l < rows; ++l) {
    for (int64_t j = 0; j < cols; ++j) {
      c[l * c_stride + j] = Add ? c[l * c_stride + j] + out[l][j] : out[l][j];
    }
  }
}

// C[l, p] (+)= sum_k A[l, k] B[k, p] for l in [0, rows), p in [col_begin, col_end), k in [0, depth).
// a: tiles of kRows, each (depth, kRows). panel: room for kDepth x kCols. Sums over at most kDepth go to C at a time,
// which keeps the panel in L1 and the rounding error of long sums down.
template <class W>
LORUN_TARGET void spread(const W* a, const W* b, int64_t b_stride, int64_t depth, int64_t rows, int64_t col_begin,
                         int64_t col_end, bool add, W* c, int64_t c_stride, W* panel) {
  using T = Tile<W>;
  for (int64_t p = col_begin; p < col_end; p += T::kCols) {
    const int64_t cols = p + T::kCols <= col_end ? T::kCols : col_end - p;
    for (int64_t k0 = 0; k0 < depth || k0 == 0; k0 += kDepth) {
      const int64_t part = depth - k0 < kDepth ? depth - k0 : kDepth;
      for (int64_t k = 0; k < part; ++k) {
        const W* from = b + (k0 + k) * b_stride + p;
        W* to = panel + k * T::kCols;
        for (int64_t j = 0; j < cols; ++j) {
          to[j] = from[j];
        }
        for (int64_t j = cols; j < T::kCols; ++j) {
          to[j] = 0;
        }
      }
      for (int64_t l = 0; l < rows; l += T::kRows) {
        const int64_t height = l + T::kRows <= rows ? T::kRows : rows - l;
        const W* tile = a + l * depth + k0 * T::kRows;
        W* out = c + l * c_stride + p;
        if (add || k0 > 0) {
          outer_tile<W, true>(tile, panel, part, out, c_stride, height, cols);
        } else {
          outer_tile<W, false>(tile, panel, part, out, c_stride, height, cols);
        }
      }
    }
  }
}

}  // namespace lorun::block_cs::LORUN_VARIANT
