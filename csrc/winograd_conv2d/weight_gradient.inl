// The sums over tiles of one part, and the weight's gradient from those of all parts. The image's transform is the
// forward pass's: for_each_variant.h takes one file.

#include "winograd_conv2d/tiles.inl"

namespace lorun::winograd_conv2d::LORUN_VARIANT {

// Sums that stay in registers.
constexpr int kSums = LORUN_REGISTERS == 32 ? 16 : 8;

// t = A g
template <class T, class V>
LORUN_TARGET LORUN_INLINE inline void spread(const V (&g)[4], V (&t)[6]) {
  const V s = g[0] + g[2], d = g[1] + g[3], p = g[0] + T(4) * g[2], q = T(2) * g[1] + T(8) * g[3];
  t[0] = g[0];
  t[1] = s + d;
  t[2] = s - d;
  t[3] = p + q;
  t[4] = p - q;
  t[5] = g[3];
}

// y = G^T u
template <class T, class V>
LORUN_TARGET LORUN_INLINE inline void gather(const V (&u)[6], V (&y)[3]) {
  const V s = T(1. / 6) * (u[1] + u[2]), p = u[3] + u[4];
  y[0] = T(1. / 4) * u[0] - s + T(1. / 24) * p;
  y[1] = T(1. / 6) * (u[2] - u[1]) + T(1. / 12) * (u[3] - u[4]);
  y[2] = T(1. / 6) * p - s + u[5];
}

// g: the first of 4 x 4 pixels. m: this tile's channels at point 0, in whole vectors: what two have of g is twice in m,
// and in the sums, for nothing is to be added to one twice.
template <class S, class T = Wide<S>>
LORUN_TARGET inline void transform_gradient(const Pixels<S>& g, int64_t channels, T* m, int64_t pitch) {
  for (int64_t next = 0; next < channels; next += Lanes<T>::kCount) {
    const int64_t c = std::min(next, channels - Lanes<T>::kCount);
    Vec<T> half[6][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Vec<T> from[4], to[6];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        from[i] = load(g.first + i * g.row + j * channels + c);
      }
      spread<T>(from, to);
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        half[i][j] = to[i];
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      Vec<T> to[6];
      spread<T>(half[i], to);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        store(m + (i * 6 + j) * pitch + next, to[j]);
      }
    }
  }
}

// Rows [i, in) of the sums: `Rows` at a time, then half as many.
template <class T, int Rows, int Vecs>
LORUN_TARGET inline void add_rows(const T* v, int64_t i, int64_t in, const T* m, int64_t m_row, int64_t tiles,
                                  T* sums) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  for (; i + Rows <= in; i += Rows) {
    product<T, Rows, Vecs, true>(v + i, whole_vectors<T>(in), m, m_row, kCount, tiles, sums + i * m_row, m_row);
  }
  if constexpr (Rows > 1) {
    if (i < in) {
      add_rows<T, Rows / 2, Vecs>(v, i, in, m, m_row, tiles, sums);
    }
  }
}

template <class T, int Vecs>
LORUN_TARGET inline void add_columns(const T* v, int64_t in, const T* m, int64_t m_row, int64_t tiles, T* sums) {
  constexpr int kRows = std::min<int>(kSums / Vecs, Lanes<T>::kCount > 8 ? Lanes<T>::kCount : 8);
  add_rows<T, kRows, Vecs>(v, 0, in, m, m_row, tiles, sums);
}

// sums (36, in, out as in m) += those of tiles [begin, end).
template <class S, class T = Wide<S>>
LORUN_TARGET void sum_tiles(const GradientProblem<S>& p, const Work<S>& w, int64_t begin, int64_t end, T* sums) {
  const int64_t v_row = whole_vectors<T>(p.in), m_row = whole_vectors<T>(p.out);
  for (int64_t t = begin; t < end; ++t) {
    const Place place(p, t);
    image_points(p, p.x, p.in, place, w.padded, w.v + (t - begin) * v_row, w.v_pitch);
    const Pixels<S> g = tile_at(p, p.grad, p.out, place.image, place.top, place.left, kTile, w.padded);
    transform_gradient(g, p.out, w.m + (t - begin) * m_row, w.m_pitch);
  }
  constexpr int64_t kCount = Lanes<T>::kCount;
  for (int64_t point = 0; point < kPoints; ++point) {
    const T *v = w.v + point * w.v_pitch, *m = w.m + point * w.m_pitch;
    T* to = sums + point * p.in * m_row;
    int64_t j = 0;
    for (; j + kCount < p.out; j += 2 * kCount) {
      add_columns<T, 2>(v, p.in, m + j, m_row, end - begin, to + j);
    }
    if (j < p.out) {
      add_columns<T, 1>(v, p.in, m + j, m_row, end - begin, to + j);
    }
  }
}

// grad (3, 3, in, out) of input channels [begin, end), from the sums of `parts`.
template <class S, class T = Wide<S>>
LORUN_TARGET void to_weight(const GradientProblem<S>& p, const T* sums, int64_t parts, int64_t begin, int64_t end,
                            T* grad) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  const int64_t row = whole_vectors<T>(p.out), point = p.in * row, tap = p.in * p.out;
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t next = 0; next < p.out; next += kCount) {
      Vec<T> half[3][6];
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        Vec<T> from[6], to[3];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) {
          const T* first = sums + (i * 6 + j) * point + k * row + next;
          from[i] = load(first);
          for (int64_t part = 1; part < parts; ++part) {
            from[i] += load(first + part * kPoints * point);
          }
        }
        gather<T>(from, to);
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          half[i][j] = to[i];
        }
      }
      T* at = grad + k * p.out + std::min(next, p.out - kCount);
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        Vec<T> to[3];
        gather<T>(half[i], to);
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          store(at + (i * 3 + j) * tap, to[j]);
        }
      }
    }
  }
}

}  // namespace lorun::winograd_conv2d::LORUN_VARIANT
