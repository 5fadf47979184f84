// A few rows of an image through CASSI, band by band (formulas in cassi.h).
//
// gather: a[j] += m[j] x[j];  spread: z[j] = x[j] - k m[j] r[j];  adjoint: z[j] = k m[j] r[j].
// r and a begin at the band's shift, which makes their accesses straddle cache lines. Bands whose shifts differ by
// whole vectors share them: such a pair loads r, or loads and stores a, once for two bands.

namespace lorun::cassi::LORUN_VARIANT {

using namespace ::lorun::LORUN_VARIANT;

// Past the caches if Stream: `at` is then aligned to what is stored.
template <bool Stream, class T, class V>
LORUN_TARGET LORUN_INLINE inline void stream(T* at, V v) {
#ifdef LORUN_X86
  if constexpr (Stream && sizeof(V) == 16) {
    return _mm_stream_si128(reinterpret_cast<__m128i*>(at), reinterpret_cast<__m128i>(v));
  }
#if LORUN_VECTOR_BYTES >= 32
  if constexpr (Stream && sizeof(V) == 32) {
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(at), reinterpret_cast<__m256i>(v));
  }
#endif
#if LORUN_VECTOR_BYTES >= 64
  if constexpr (Stream && sizeof(V) == 64) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(at), reinterpret_cast<__m512i>(v));
  }
#endif
#endif
  store(at, v);
}

// Columns [j, j + lanes) of a band and, if Pair, what lies under them of its partner. Lanes outside `keep` are not
// gathered; spreading them once more writes the same values once more.
template <class T, Part P, bool Pair, bool Stream, bool Masked>
LORUN_TARGET LORUN_INLINE inline void columns(const Band<T>& b, int64_t j, typename Lanes<Wide<T>>::Bits keep) {
  using Vec = typename Lanes<Wide<T>>::Vec;
  using Bits = typename Lanes<Wide<T>>::Bits;
  if constexpr (P != Part::kGather) {
    const Vec r = load(b.r + j);
    const auto spread = [&](Wide<T> k, int64_t z, int64_t x, int64_t m) LORUN_TARGET LORUN_INLINE {
      const Vec back = k * r * load(b.m + m);
      if constexpr (P == Part::kAdjoint) {
        stream<Stream && !Masked>(b.z + z, narrowed<T>(back));
      } else {
        stream<Stream && !Masked>(b.z + z, narrowed<T>(load(b.x + x) - back));
      }
    };
    spread(b.k, j, j, j);
    if constexpr (Pair) {
      spread(b.partner_k, j + b.partner_z, j + b.partner_x, j + b.partner_m);
    }
  }
  if constexpr (P == Part::kGather) {
    const auto coded = [&](int64_t x, int64_t m, Vec sum) LORUN_TARGET LORUN_INLINE {
      Vec in = load(b.x + x), mask = load(b.m + m);
      if constexpr (Masked) {
        in = reinterpret_cast<Vec>(reinterpret_cast<Bits>(in) & keep);
        mask = reinterpret_cast<Vec>(reinterpret_cast<Bits>(mask) & keep);
      }
      return sum + in * mask;
    };
    Vec sum = coded(j, j, load(b.a + j));
    if constexpr (Pair) {
      sum = coded(j + b.partner_x, j + b.partner_m, sum);
    }
    store(b.a + j, sum);
  }
}

// Columns [begin, end), at least a vector's lanes. The stores to z, or where there are none the loads of x, are
// aligned; the ragged ends are whole vectors that overlap the rest.
// The band comes by value: through a reference, its pointers would be loaded again after every store.
template <class T, Part P, bool Pair, bool Stream>
LORUN_TARGET LORUN_INLINE inline void range(const Band<T> b, int64_t begin, int64_t end) {
  using L = Lanes<Wide<T>>;
  using Bit = typename L::Bit;
  constexpr int64_t kCount = L::kCount, kBytes = kCount * sizeof(T);
  typename L::Bits lane;
  for (int l = 0; l < kCount; ++l) {
    lane[l] = l;
  }
  const auto address = reinterpret_cast<uintptr_t>((P == Part::kGather ? b.x : b.z) + begin);
  const int64_t head = static_cast<int64_t>(-address % kBytes / sizeof(T));
  int64_t j = begin + head;
  if (head != 0) {
    columns<T, P, Pair, Stream, true>(b, begin, lane < static_cast<Bit>(head));
  }
  for (; j + kCount <= end; j += kCount) {
    columns<T, P, Pair, Stream, false>(b, j, lane);
  }
  if (j < end) {
    const int64_t last = end - kCount;
    columns<T, P, Pair, Stream, true>(b, last, lane >= static_cast<Bit>(j - last));
  }
}

// A row narrower than a vector.
template <class T, Part P>
LORUN_TARGET void narrow_range(const Band<T>& b, int64_t width) {
  for (int64_t j = 0; j < width; ++j) {
    if constexpr (P == Part::kGather) {
      b.a[j] += widen(b.x[j]) * b.m[j];
    } else if constexpr (P == Part::kAdjoint) {
      b.z[j] = narrow<T>(b.k * b.r[j] * b.m[j]);
    } else {
      b.z[j] = narrow<T>(widen(b.x[j]) - b.k * b.r[j] * b.m[j]);
    }
  }
}

template <class T, Part P, bool Stream>
LORUN_TARGET void lines(const Lines<T>& l) {
  constexpr int64_t kCount = Lanes<Wide<T>>::kCount;
  if (l.width < kCount) {
    for (int64_t c = 0; c < l.bands; ++c) {
      for (int64_t i = 0; i < l.rows; ++i) {
        narrow_range<T, P>(l.band(i, c, c), l.width);
      }
    }
    return;
  }
  // The nearest band whose shift differs by whole vectors, unless its rows are aligned differently.
  const int64_t distance = kCount / std::gcd(kCount, l.step), apart = distance * l.step;
  const bool aligned = distance * (P == Part::kGather ? l.x_band : l.z_band) % kCount == 0;
  const bool pairs = aligned && l.width - apart >= kCount;
  for (int64_t block = 0; block < l.bands; block += 2 * distance) {
    for (int64_t c = block; c < std::min(block + distance, l.bands); ++c) {
      const int64_t partner = c + distance;
      for (int64_t i = 0; i < l.rows; ++i) {
        if (partner >= l.bands) {
          range<T, P, false, Stream>(l.band(i, c, c), 0, l.width);
        } else if (!pairs) {
          range<T, P, false, Stream>(l.band(i, c, c), 0, l.width);
          range<T, P, false, Stream>(l.band(i, partner, partner), 0, l.width);
        } else {
          const Band<T> both = l.band(i, c, partner);
          if (apart != 0) {
            range<T, P, false, Stream>(both, 0, apart);
          }
          range<T, P, true, Stream>(both, apart, l.width);
          if (apart != 0) {
            range<T, P, false, Stream>(l.band(i, partner, partner), l.width - apart, l.width);
          }
        }
      }
    }
  }
}

template <class T>
LORUN_TARGET void widen_row(const T* from, Wide<T>* __restrict to, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    to[j] = widen(from[j]);
  }
}

template <class T>
LORUN_TARGET void narrow_row(const Wide<T>* from, T* __restrict to, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    to[j] = narrow<T>(from[j]);
  }
}

// r <- factor (r - y), with a copy of r - y in `keep`; y, factor and keep may be absent.
template <class W>
LORUN_TARGET void weigh_row(W* __restrict r, const W* y, W* keep, const W* factor, int64_t count) {
  if (y != nullptr) {
    for (int64_t j = 0; j < count; ++j) {
      r[j] -= y[j];
    }
  }
  if (keep != nullptr) {
    std::copy_n(r, count, keep);
  }
  if (factor != nullptr) {
    for (int64_t j = 0; j < count; ++j) {
      r[j] *= factor[j];
    }
  }
}

template <class T>
LORUN_TARGET void add_products(const T* x, const Wide<T>* y, Wide<T>* __restrict sum, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    sum[j] += widen(x[j]) * y[j];
  }
}

}  // namespace lorun::cassi::LORUN_VARIANT
