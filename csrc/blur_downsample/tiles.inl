// The inner loops of blur and downsample, on tiles packed into unit-stride rows (see blur_downsample.cpp).
//
// blur: out[r][j] = sum over passes, taps (t, v):  w[v][t] in[r + t][offset[v] + j]. kRows output rows are computed
//   together: an input vector, whose loads straddle cache lines, then feeds up to kRows of them.
// correlate: out[t][v] = sum_ij g[i][j] in[i + t][offset[v] + j], the same products summed the other way.
// split, join: a run of pixels <-> its phases.

namespace lorun::blur_downsample::LORUN_VARIANT {

template <class W>
struct Tile {
  typedef W Vec __attribute__((vector_size(LORUN_VECTOR_BYTES)));
  // As it lies in memory: any alignment, and the same bytes as W.
  typedef W Loose __attribute__((vector_size(LORUN_VECTOR_BYTES), aligned(alignof(W)), may_alias));
  static constexpr int kLanes = LORUN_VECTOR_BYTES / sizeof(W);
  static constexpr bool kManyRegisters = LORUN_REGISTERS == 32;
  static constexpr int kVecs = kManyRegisters ? 5 : 3;
  static constexpr int kColumns = kManyRegisters ? 5 : 2;

  static LORUN_TARGET LORUN_INLINE inline Vec load(const W* at) {
    return *reinterpret_cast<const Loose*>(at);
  }
};

template <class W>
LORUN_TARGET int lanes() {
  return Tile<W>::kLanes;
}

// One input row into output rows First to Last: taps weight[-First] to weight[-Last] of every column of the kernel.
template <int C, int First, int Last, class W>
LORUN_TARGET LORUN_INLINE inline void add_row(typename Tile<W>::Vec (&acc)[kRows][C], const W* in,
                                              const int64_t* offset, int64_t columns, const W* weight, int64_t taps) {
  using T = Tile<W>;
  for (int64_t v = 0; v < columns; ++v, weight += taps) {
    typename T::Vec x[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      x[c] = T::load(in + offset[v] + c * T::kLanes);
    }
#pragma GCC unroll 8
    for (int r = First; r <= Last; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        acc[r][c] += weight[-r] * x[c];
      }
    }
  }
}

// `rows` (at most kRows) output rows from row i, by C vectors from column `at`.
template <int C, class W>
LORUN_TARGET void blur_block(const Blur<W>& b, int64_t i, int64_t rows, int64_t at, W* out, int64_t out_stride) {
  using T = Tile<W>;
  typename T::Vec acc[kRows][C] = {};
  for (int64_t p = 0; p < b.count; ++p) {
    const Pass<W>& pass = b.passes[p];
    for (int64_t m = 0; m < pass.taps + rows - 1; ++m) {
      const int64_t first = m < pass.taps ? 0 : m - pass.taps + 1, last = m < rows ? m : rows - 1;
      const W* in = pass.in + (i + m) * b.in_stride + at;
      const W* weight = pass.weights + m;
#define LORUN_ROWS(FIRST, LAST)                                                           \
  case FIRST * kRows + LAST:                                                              \
    add_row<C, FIRST, LAST>(acc, in, b.offset, b.columns, weight, pass.taps);             \
    break;
      switch (first * kRows + last) {
        LORUN_ROWS(0, 0)
        LORUN_ROWS(0, 1)
        LORUN_ROWS(0, 2)
        LORUN_ROWS(0, 3)
        LORUN_ROWS(1, 1)
        LORUN_ROWS(1, 2)
        LORUN_ROWS(1, 3)
        LORUN_ROWS(2, 2)
        LORUN_ROWS(2, 3)
        LORUN_ROWS(3, 3)
      }
#undef LORUN_ROWS
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (r < rows) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        *reinterpret_cast<typename T::Loose*>(out + r * out_stride + c * T::kLanes) = acc[r][c];
      }
    }
  }
}

// `rows` output rows of `width` values, written in whole vectors. Column by column of tiles, so that the input rows that
// neighbouring tiles share stay in L1.
template <class W>
LORUN_TARGET void blur(const Blur<W>& b, int64_t rows, int64_t width, W* out, int64_t out_stride) {
  using T = Tile<W>;
  const int64_t vecs = (width + T::kLanes - 1) / T::kLanes, groups = (vecs + T::kVecs - 1) / T::kVecs;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = vecs * g / groups, size = vecs * (g + 1) / groups - begin, at = begin * T::kLanes;
    for (int64_t i = 0; i < rows; i += kRows) {
      const int64_t height = i + kRows <= rows ? kRows : rows - i;
      W* const to = out + i * out_stride + at;
      switch (size) {
        case 1:
          blur_block<1>(b, i, height, at, to, out_stride);
          break;
        case 2:
          blur_block<2>(b, i, height, at, to, out_stride);
          break;
        case 3:
          blur_block<3>(b, i, height, at, to, out_stride);
          break;
        case 4:
          if constexpr (T::kVecs >= 4) {
            blur_block<4>(b, i, height, at, to, out_stride);
          }
          break;
        case 5:
          if constexpr (T::kVecs >= 5) {
            blur_block<5>(b, i, height, at, to, out_stride);
          }
          break;
      }
    }
  }
}

// R taps by C columns of the kernel's gradient, added onto out. g has R - 1 rows of zeros above and below, and zeros
// from `width` to a whole vector.
template <int R, int C, class W>
LORUN_TARGET void correlate_block(const W* in, int64_t in_stride, const int64_t* offset, const W* g, int64_t g_stride,
                                  int64_t rows, int64_t width, W* out, int64_t out_stride) {
  using T = Tile<W>;
  typename T::Vec acc[R][C] = {};
  for (int64_t m = 0; m < rows + R - 1; ++m, in += in_stride, g += g_stride) {
    for (int64_t j = 0; j < width; j += T::kLanes) {
      typename T::Vec line[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        line[r] = T::load(g - r * g_stride + j);
      }
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const typename T::Vec x = T::load(in + offset[c] + j);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          acc[r][c] += line[r] * x;
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      W lane[T::kLanes];
      __builtin_memcpy(lane, &acc[r][c], sizeof(lane));
      for (int half = T::kLanes / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) {
          lane[l] += lane[l + half];
        }
      }
      out[r * out_stride + c] += lane[0];
    }
  }
}

template <int R, class W>
LORUN_TARGET void correlate_rows(const W* in, int64_t in_stride, const int64_t* offset, int64_t columns, const W* g,
                                 int64_t g_stride, int64_t rows, int64_t width, W* out, int64_t out_stride) {
  constexpr int kColumns = Tile<W>::kColumns;
  int64_t v = 0;
  for (; v + kColumns <= columns; v += kColumns) {
    correlate_block<R, kColumns>(in, in_stride, offset + v, g, g_stride, rows, width, out + v, out_stride);
  }
  for (; v < columns; ++v) {
    correlate_block<R, 1>(in, in_stride, offset + v, g, g_stride, rows, width, out + v, out_stride);
  }
}

// out[t * out_stride + v] += the correlation at taps t in [0, taps), v in [0, columns), kRows taps at a time.
template <class W>
LORUN_TARGET void correlate(const W* in, int64_t in_stride, const int64_t* offset, int64_t taps, int64_t columns,
                            const W* g, int64_t g_stride, int64_t rows, int64_t width, W* out, int64_t out_stride) {
  const int64_t groups = (taps + kRows - 1) / kRows;
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t t = taps * i / groups, size = taps * (i + 1) / groups - t;
    const W* from = in + t * in_stride;
    W* to = out + t * out_stride;
    switch (size) {
      case 1:
        correlate_rows<1>(from, in_stride, offset, columns, g, g_stride, rows, width, to, out_stride);
        break;
      case 2:
        correlate_rows<2>(from, in_stride, offset, columns, g, g_stride, rows, width, to, out_stride);
        break;
      case 3:
        correlate_rows<3>(from, in_stride, offset, columns, g, g_stride, rows, width, to, out_stride);
        break;
      case 4:
        correlate_rows<4>(from, in_stride, offset, columns, g, g_stride, rows, width, to, out_stride);
        break;
    }
  }
}

// Reads `count` values that lie `stride` apart.
template <class T, class W>
LORUN_TARGET void read(const T* in, int64_t stride, int64_t count, W* __restrict__ out) {
  if (stride == 1) {
    for (int64_t j = 0; j < count; ++j) {
      out[j] = widen(in[j]);
    }
  } else {
    for (int64_t j = 0; j < count; ++j) {
      out[j] = widen(in[j * stride]);
    }
  }
}

template <int S, class T, class W>
LORUN_TARGET LORUN_INLINE inline void split_by(const T* __restrict__ in, int64_t count, W* __restrict__ phases,
                                               int64_t stride) {
  for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 4
    for (int b = 0; b < S; ++b) {
      phases[b * stride + j] = widen(in[j * S + b]);
    }
  }
}

// phases[e % scale][e / scale] = in[e - start] for e in [start, start + count); in's values lie `in_stride` apart.
template <class T, class W>
LORUN_TARGET void split(const T* in, int64_t in_stride, int64_t start, int64_t count, int64_t scale, W* phases,
                        int64_t stride) {
  int64_t e = start;
  const int64_t end = start + count;
  for (; e < end && (e % scale != 0 || in_stride != 1 || scale > 4); ++e, in += in_stride) {
    phases[e % scale * stride + e / scale] = widen(*in);
  }
  const int64_t whole = (end - e) / scale;
  W* const at = phases + e / scale;
  switch (scale) {
    case 1:
      split_by<1>(in, whole, at, stride);
      break;
    case 2:
      split_by<2>(in, whole, at, stride);
      break;
    case 3:
      split_by<3>(in, whole, at, stride);
      break;
    case 4:
      split_by<4>(in, whole, at, stride);
      break;
  }
  e += whole * scale;
  for (in += whole * scale; e < end; ++e, ++in) {
    phases[e % scale * stride + e / scale] = widen(*in);
  }
}

template <int S, class W>
LORUN_TARGET LORUN_INLINE inline void join_by(const W* __restrict__ phases, int64_t stride, int64_t count,
                                              W* __restrict__ line) {
  for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 4
    for (int b = 0; b < S; ++b) {
      line[j * S + b] = phases[b * stride + j];
    }
  }
}

// line[j * scale + b] = phases[b][j], `count` of each.
template <class W>
LORUN_TARGET void join(const W* phases, int64_t stride, int64_t scale, int64_t count, W* line) {
  switch (scale) {
    case 1:
      return join_by<1>(phases, stride, count, line);
    case 2:
      return join_by<2>(phases, stride, count, line);
    case 3:
      return join_by<3>(phases, stride, count, line);
    case 4:
      return join_by<4>(phases, stride, count, line);
  }
  for (int64_t b = 0; b < scale; ++b) {
    for (int64_t j = 0; j < count; ++j) {
      line[j * scale + b] = phases[b * stride + j];
    }
  }
}

// out = value
template <class T, class W>
LORUN_TARGET void write(const W* __restrict__ value, int64_t count, T* __restrict__ out) {
  for (int64_t j = 0; j < count; ++j) {
    out[j] = narrow<T>(value[j]);
  }
}

// out = base - factor * value; the base's values lie `stride` apart.
template <class T, class W>
LORUN_TARGET void write_descent(const T* __restrict__ base, int64_t stride, W factor, const W* __restrict__ value,
                                int64_t count, T* __restrict__ out) {
  if (stride == 1) {
    for (int64_t j = 0; j < count; ++j) {
      out[j] = narrow<T>(widen(base[j]) - factor * value[j]);
    }
  } else {
    for (int64_t j = 0; j < count; ++j) {
      out[j] = narrow<T>(widen(base[j * stride]) - factor * value[j]);
    }
  }
}

}  // namespace lorun::blur_downsample::LORUN_VARIANT
