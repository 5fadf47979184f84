// A few rows of an image through CASSI, band by band (formulas in cassi.h).
//
// gather: a[j] += m[j] x[j];  spread: z[j] = x[j] - k m[j] r[j];  adjoint: z[j] = k m[j] r[j].
// r and a begin at the band's shift, which makes their accesses straddle cache lines. Bands whose shifts differ by
// whole vectors share them: a group of up to four such bands loads r, or loads and stores a, once.

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

// Columns [j, j + lanes) of a group's first band, or what lies under them in the others, of bands [From, To) of it.
// Lanes outside `keep` are not gathered; spreading them once more writes the same values once more.
template <class T, Part P, int From, int To, bool Stream, bool Masked>
LORUN_TARGET LORUN_INLINE inline void columns(const Band<T>& b, int64_t j, typename Lanes<Wide<T>>::Bits keep) {
  using Vec = typename Lanes<Wide<T>>::Vec;
  using Bits = typename Lanes<Wide<T>>::Bits;
  if constexpr (P == Part::kGather) {
    Vec sum = load(b.a + j);
#pragma GCC unroll 4
    for (int n = From; n < To; ++n) {
      Vec in = load(b.x + j + n * b.next_x), mask = load(b.m + j + n * b.next_m);
      if constexpr (Masked) {
        in = reinterpret_cast<Vec>(reinterpret_cast<Bits>(in) & keep);
        mask = reinterpret_cast<Vec>(reinterpret_cast<Bits>(mask) & keep);
      }
      sum += in * mask;
    }
    store(b.a + j, sum);
  } else {
    const Vec r = load(b.r + j);
#pragma GCC unroll 4
    for (int n = From; n < To; ++n) {
      const Vec back = b.k[n] * r * load(b.m + j + n * b.next_m);
      T* to = b.z + j + n * b.next_z;
      if constexpr (P == Part::kAdjoint) {
        stream<Stream && !Masked>(to, narrowed<T>(back));
      } else {
        stream<Stream && !Masked>(to, narrowed<T>(load(b.x + j + n * b.next_x) - back));
      }
    }
  }
}

template <class T, Part P, int From, int To, bool Stream>
LORUN_TARGET LORUN_INLINE inline void range(const Band<T>& b, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j += Lanes<Wide<T>>::kCount) {
    columns<T, P, From, To, Stream, false>(b, j, typename Lanes<Wide<T>>::Bits{});
  }
}

// One row, at least a vector's lanes, of the Count bands of a group, whose shifts are `apart` columns from one to the
// next. The stores to the first band's z are aligned, which leaves two ragged ends: whole vectors that overlap the
// rest. Loads are not, for the order of a sum must not depend on an address. Between them all bands together where they
// all lie over each other, fewer before and after. The group's pointers are made here, to live in registers: put
// together by the caller they would be read from memory that was just written, which waits for all stores to z before.
template <class T, Part P, int Count, bool Stream>
LORUN_TARGET void row(const Lines<T>& l, int64_t i, int64_t c, int64_t distance) {
  using L = Lanes<Wide<T>>;
  using Bit = typename L::Bit;
  constexpr int64_t kLanes = L::kCount, kBytes = kLanes * sizeof(T);
  const Band<T> b = l.template band<Count>(i, c, distance);
  const int64_t width = l.width, apart = distance * l.step;
  const auto address = reinterpret_cast<uintptr_t>(b.z);
  const int64_t head = P == Part::kGather ? 0 : static_cast<int64_t>(-address % kBytes / sizeof(T));
  const int64_t body = (width - head) / kLanes * kLanes, tail = width - head - body;
  const auto each = [&]<int... N>(const auto& f, std::integer_sequence<int, N...>)
                        LORUN_TARGET LORUN_INLINE { (f.template operator()<N>(), ...); };
  if (head + tail != 0) {
    typename L::Bits lane;
    for (int n = 0; n < kLanes; ++n) {
      lane[n] = n;
    }
    each(
        [&]<int N>() LORUN_TARGET LORUN_INLINE {
          columns<T, P, N, N + 1, Stream, true>(b, N * apart, lane < static_cast<Bit>(head));
          columns<T, P, N, N + 1, Stream, true>(b, N * apart + width - kLanes, lane >= static_cast<Bit>(kLanes - tail));
        },
        std::make_integer_sequence<int, Count>());
  }
  const int64_t all = head + (Count - 1) * apart, end = head + body;
  each([&]<int N>()
           LORUN_TARGET LORUN_INLINE { range<T, P, 0, N + 1, Stream>(b, head + N * apart, head + (N + 1) * apart); },
       std::make_integer_sequence<int, Count - 1>());
  range<T, P, 0, Count, Stream>(b, all, end);
  each([&]<int N>()
           LORUN_TARGET LORUN_INLINE { range<T, P, N + 1, Count, Stream>(b, end + N * apart, end + (N + 1) * apart); },
       std::make_integer_sequence<int, Count - 1>());
}

// A row narrower than a vector.
template <class T, Part P>
LORUN_TARGET void narrow_range(const Band<T>& b, int64_t width) {
  for (int64_t j = 0; j < width; ++j) {
    if constexpr (P == Part::kGather) {
      b.a[j] += widen(b.x[j]) * b.m[j];
    } else if constexpr (P == Part::kAdjoint) {
      b.z[j] = narrow<T>(b.k[0] * b.r[j] * b.m[j]);
    } else {
      b.z[j] = narrow<T>(widen(b.x[j]) - b.k[0] * b.r[j] * b.m[j]);
    }
  }
}

template <class T, Part P, bool Stream>
LORUN_TARGET void lines(const Lines<T>& l) {
  constexpr int64_t kLanes = Lanes<Wide<T>>::kCount;
  if (l.width < kLanes) {
    for (int64_t c = 0; c < l.bands; ++c) {
      for (int64_t i = 0; i < l.rows; ++i) {
        narrow_range<T, P>(l.template band<1>(i, c, 0), l.width);
      }
    }
    return;
  }
  // The nearest band whose shift differs by whole vectors. Sums over bands are taken in the order of the groups
  // whatever the layout of x; a store past the caches must be aligned.
  const int64_t distance = kLanes / std::gcd(kLanes, l.step), apart = distance * l.step;
  const bool aligned = P == Part::kGather || !Stream || distance * l.z_band % kLanes == 0;
  int64_t most = aligned ? kTogether : 1;
  while (most > 1 && l.width - (most - 1) * apart < 2 * kLanes) {
    --most;
  }
  for (int64_t block = 0; block < l.bands; block += most * distance) {
    for (int64_t c = block; c < std::min(block + distance, l.bands); ++c) {
      const int count = static_cast<int>(std::min(most, (l.bands - 1 - c) / distance + 1));
      const auto take = count == 4   ? row<T, P, 4, Stream>
                        : count == 3 ? row<T, P, 3, Stream>
                        : count == 2 ? row<T, P, 2, Stream>
                                     : row<T, P, 1, Stream>;
      for (int64_t i = 0; i < l.rows; ++i) {
        take(l, i, c, distance);
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
