// A few tiles at a time: transformed, multiplied point by point, transformed back. A vector holds neighbouring
// channels. Where they fill no whole number of vectors, the last one ends where they end and overlaps the one before:
// some are computed twice, to the same bits, and nothing of another pixel is read.

namespace lorun::winograd_conv2d::LORUN_VARIANT {

using namespace ::lorun::LORUN_VARIANT;

template <class T>
using Vec = typename Lanes<T>::Vec;

// Images are stored as S; what is made of them is T, or Wide<S>.

// Tiles of a product that stay in registers, two vectors each.
constexpr int64_t kTogether = LORUN_REGISTERS == 32 ? 12 : 6;

// t = B^T d
template <class T, class V>
LORUN_TARGET LORUN_INLINE inline void to_points(const V (&d)[6], V (&t)[6]) {
  const V p = d[4] - T(4) * d[2], q = d[3] - T(4) * d[1];
  const V r = d[4] - d[2], s = T(2) * (d[3] - d[1]);
  t[0] = T(4) * d[0] - T(5) * d[2] + d[4];
  t[1] = p + q;
  t[2] = p - q;
  t[3] = r + s;
  t[4] = r - s;
  t[5] = T(4) * d[1] - T(5) * d[3] + d[5];
}

// y = A^T m
template <class T, class V>
LORUN_TARGET LORUN_INLINE inline void from_points(const V (&m)[6], V (&y)[4]) {
  const V s = m[1] + m[2], d = m[1] - m[2], p = m[3] + m[4], q = m[3] - m[4];
  y[0] = m[0] + s + p;
  y[1] = d + T(2) * q;
  y[2] = s + T(4) * p;
  y[3] = d + T(8) * q + m[5];
}

// d: the first pixel of 6 rows of 6. v: this tile's channels at point 0.
template <class S, class T = Wide<S>>
LORUN_TARGET inline void transform(const S* const (&d)[kSpan], int64_t channels, T* v, int64_t pitch) {
  for (int64_t next = 0; next < channels; next += Lanes<T>::kCount) {
    const int64_t c = std::min(next, channels - Lanes<T>::kCount);
    Vec<T> half[6][6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      Vec<T> from[6], to[6];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        from[i] = load(d[i] + j * channels + c);
      }
      to_points<T>(from, to);
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        half[i][j] = to[i];
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      Vec<T> to[6];
      to_points<T>(half[i], to);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        store(v + (i * 6 + j) * pitch + c, to[j]);
      }
    }
  }
}

// Pixels of one image.
template <class S>
struct Pixels {
  const S* first;
  int64_t row;
};

// span x span pixels from (top, left) on; a copy with zeros outside the image where they leave it.
template <class S>
LORUN_TARGET inline Pixels<S> tile_at(const Images& images, const S* x, int64_t channels, int64_t image, int64_t top,
                                      int64_t left, int64_t span, S* padded) {
  const int64_t height = images.height, width = images.width;
  const S* from = x + image * height * width * channels;
  if (top >= 0 && left >= 0 && top + span <= height && left + span <= width) {
    return {from + (top * width + left) * channels, width * channels};
  }
  std::fill_n(padded, span * span * channels, S(0));
  const int64_t first = std::max<int64_t>(left, 0), stop = std::min(left + span, width);
  for (int64_t row = std::max<int64_t>(top, 0); row < std::min(top + span, height); ++row) {
    std::copy_n(from + (row * width + first) * channels, (stop - first) * channels,
                padded + ((row - top) * span + first - left) * channels);
  }
  return {padded, span * channels};
}

// The points of the image under a tile.
template <class S>
LORUN_TARGET inline void image_points(const Images& images, const S* x, int64_t channels, const Place& place, S* padded,
                                      Wide<S>* v, int64_t pitch) {
  const Pixels<S> d = tile_at(images, x, channels, place.image, place.top - 1, place.left - 1, kSpan, padded);
  const S* const rows[kSpan] = {
      d.first, d.first + d.row, d.first + 2 * d.row, d.first + 3 * d.row, d.first + 4 * d.row, d.first + 5 * d.row};
  transform(rows, channels, v, pitch);
}

// m (Rows, m_row) = v (Rows, v_row) u over `length` columns of v, or m += v^T u over as many rows (length, v_row);
// `Vecs` vectors of the columns of m and u (length, u_row), the second one `apart` after the first.
template <class T, int Rows, int Vecs, bool Transposed>
LORUN_TARGET inline void product(const T* v, int64_t v_row, const T* u, int64_t u_row, int64_t apart, int64_t length,
                                 T* m, int64_t m_row) {
  Vec<T> sum[Rows][Vecs] = {};
  if constexpr (Transposed) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vecs; ++j) {
        sum[i][j] = load(m + i * m_row + j * apart);
      }
    }
  }
  for (int64_t k = 0; k < length; ++k) {
    Vec<T> right[Vecs];
#pragma GCC unroll 2
    for (int j = 0; j < Vecs; ++j) {
      right[j] = load(u + k * u_row + j * apart);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const T value = Transposed ? v[k * v_row + i] : v[i * v_row + k];
#pragma GCC unroll 2
      for (int j = 0; j < Vecs; ++j) {
        sum[i][j] += value * right[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Vecs; ++j) {
      store(m + i * m_row + j * apart, sum[i][j]);
    }
  }
}

template <class T, int Vecs>
LORUN_TARGET inline void columns(const Filter<T>& f, const T* v, int64_t tiles, const T* u, int64_t apart, T* m) {
  constexpr int kFew = 4;  // as many sums as hide a multiply-add's latency
  const int64_t v_row = whole_vectors<T>(f.in), m_row = whole_vectors<T>(f.out);
  int64_t i = 0;
  for (; i + kTogether <= tiles; i += kTogether) {
    product<T, kTogether, Vecs, false>(v + i * v_row, v_row, u, f.out, apart, f.in, m + i * m_row, m_row);
  }
  for (; i + kFew <= tiles; i += kFew) {
    product<T, kFew, Vecs, false>(v + i * v_row, v_row, u, f.out, apart, f.in, m + i * m_row, m_row);
  }
  for (; i < tiles; ++i) {
    product<T, 1, Vecs, false>(v + i * v_row, v_row, u, f.out, apart, f.in, m + i * m_row, m_row);
  }
}

// The products of `tiles` tiles' points with a filter's.
template <class S, class T = Wide<S>>
LORUN_TARGET inline void multiply(const Filter<T>& f, const Work<S>& w, int64_t tiles) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  for (int64_t point = 0; point < kPoints; ++point) {
    const T *v = w.v + point * w.v_pitch, *u = f.u + point * f.in * f.out;
    T* m = w.m + point * w.m_pitch;
    int64_t j = 0;
    for (; j + kCount < f.out; j += 2 * kCount) {
      columns<T, 2>(f, v, tiles, u + j, std::min(kCount, f.out - kCount - j), m + j);
    }
    if (j < f.out) {
      columns<T, 1>(f, v, tiles, u + f.out - kCount, kCount, m + f.out - kCount);
    }
  }
}

// m: the products of a tile that ends inside the image if Whole; `at` is its first value in the result, `rows` and
// `width` what it has of both.
template <class S, bool Whole>
LORUN_TARGET inline void finish(const Finish<S>& to, const Wide<S>* m, int64_t pitch, int64_t at, int64_t rows,
                                int64_t width) {
  using T = Wide<S>;
  for (int64_t next = 0; next < to.channels; next += Lanes<T>::kCount) {
    const int64_t c = std::min(next, to.channels - Lanes<T>::kCount);
    Vec<T> half[4][6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      Vec<T> from[6], to_half[4];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        from[i] = load(m + (i * 6 + j) * pitch + c);
      }
      from_points<T>(from, to_half);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        half[i][j] = to_half[i];
      }
    }
    const Vec<T> bias = to.bias ? load(to.bias + c) : Vec<T>{};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (!Whole && i >= rows) {
        break;
      }
      Vec<T> found[4];
      from_points<T>(half[i], found);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        if (!Whole && j >= width) {
          break;
        }
        const int64_t o = at + i * to.row + j * to.channels + c;
        Vec<T> y = found[j] + bias;
        if (to.relu) {
          y = y < T(0) ? Vec<T>{} : y;  // NaN stays
        }
        if (to.added) {
          y += load(to.added + o);
        }
        if (to.more) {
          y += load(to.more + o);
        }
        store(to.y + o, narrowed<S>(y));
      }
    }
  }
}

// The one of both that serves this tile.
template <class S>
LORUN_TARGET inline void finish(const Finish<S>& to, const Wide<S>* m, int64_t pitch, int64_t at, int64_t rows,
                                int64_t width) {
  if (rows >= kTile && width >= kTile) {
    finish<S, true>(to, m, pitch, at, rows, width);
  } else {
    finish<S, false>(to, m, pitch, at, rows, width);
  }
}

// Tiles [begin, end) of all images, row by row.
template <class S>
LORUN_TARGET void convolve(const Problem<S>& p, const Work<S>& w, int64_t begin, int64_t end) {
  using T = Wide<S>;
  const int64_t v_row = whole_vectors<T>(p.filter.in), m_row = whole_vectors<T>(p.filter.out);
  for (int64_t t = begin; t < end; ++t) {
    image_points(p, p.x, p.filter.in, Place(p, t), w.padded, w.v + (t - begin) * v_row, w.v_pitch);
  }
  multiply(p.filter, w, end - begin);
  for (int64_t t = begin; t < end; ++t) {
    const Place place(p, t);
    const int64_t at = ((place.image * p.height + place.top) * p.width + place.left) * p.filter.out;
    finish(p.to, w.m + (t - begin) * m_row, w.m_pitch, at, p.height - place.top, p.width - place.left);
  }
}

// One row of tiles of the first convolution, into its slot of the ring.
template <class S>
LORUN_TARGET inline void between(const Block<S>& p, const Work<S>& w, const Ring<S>& ring, const Panel& panel,
                                 int64_t row) {
  using T = Wide<S>;
  const int64_t in = p.first.in, middle = p.first.out, top = row * kTile;
  const int64_t v_row = whole_vectors<T>(in), m_row = whole_vectors<T>(middle);
  const int64_t begin = std::max<int64_t>(panel.begin - 1, 0), end = std::min(panel.end + 1, p.tile_columns());
  const Finish<S> to{middle, ring.slot(row), ring.row, p.first_bias, nullptr, nullptr, true};
  for (int64_t from = begin; from < end; from += w.tiles) {
    const int64_t count = std::min(w.tiles, end - from);
    for (int64_t t = 0; t < count; ++t) {
      const Place place{panel.image, top, (from + t) * kTile};
      image_points(p, p.x, in, place, w.padded, w.v + t * v_row, w.v_pitch);
    }
    multiply(p.first, w, count);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t left = (from + t) * kTile;
      finish(to, w.m + t * m_row, w.m_pitch, ring.column(panel, left), p.height - top, p.width - left);
    }
  }
}

// Rows [begin, end) of tiles of a panel.
template <class S>
LORUN_TARGET void block(const Block<S>& p, const Work<S>& w, const Ring<S>& ring, const Panel& panel, int64_t begin,
                        int64_t end) {
  using T = Wide<S>;
  const int64_t out = p.second.out, middle = p.first.out, last = p.tile_rows() - 1;
  const int64_t v_row = whole_vectors<T>(middle), m_row = whole_vectors<T>(out);
  ring.clear_margins(panel, p.width);
  for (int64_t row = std::max<int64_t>(begin - 1, 0); row <= begin; ++row) {
    between(p, w, ring, panel, row);
  }
  for (int64_t row = begin; row < end; ++row) {
    if (row < last) {
      between(p, w, ring, panel, row + 1);
    }
    const int64_t top = row * kTile;
    const S* rows[kSpan];
    for (int64_t i = 0; i < kSpan; ++i) {
      const int64_t y = top - 1 + i;
      rows[i] = y < 0 || y >= p.height ? ring.zeros() : ring.slot(y / kTile) + y % kTile * ring.row;
    }
    for (int64_t from = panel.begin; from < panel.end; from += w.tiles) {
      const int64_t count = std::min(w.tiles, panel.end - from);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t at = ring.column(panel, (from + t) * kTile - 1);
        const S* const d[kSpan] = {rows[0] + at, rows[1] + at, rows[2] + at, rows[3] + at, rows[4] + at, rows[5] + at};
        transform(d, middle, w.v + t * v_row, w.v_pitch);
      }
      multiply(p.second, w, count);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t left = (from + t) * kTile, at = ((panel.image * p.height + top) * p.width + left) * out;
        finish(p.to, w.m + t * m_row, w.m_pitch, at, p.height - top, p.width - left);
      }
    }
  }
}

}  // namespace lorun::winograd_conv2d::LORUN_VARIANT
