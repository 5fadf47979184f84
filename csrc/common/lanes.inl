// Vectors of one instruction set, for the kernel files of for_each_variant.h, which includes this before them:
//
//   using namespace ::lorun::LORUN_VARIANT;
//
// Images stored as T, loaded and stored as vectors of Wide<T>, rounded as convert.h does.

namespace lorun::LORUN_VARIANT {

template <class W>
struct Lanes {
  static constexpr int64_t kCount = LORUN_VECTOR_BYTES / sizeof(W);
  typedef W Vec __attribute__((vector_size(LORUN_VECTOR_BYTES)));
  using Bit = std::conditional_t<sizeof(W) == 4, uint32_t, uint64_t>;
  typedef Bit Bits __attribute__((vector_size(LORUN_VECTOR_BYTES)));
  // As they lie in memory: any alignment, and the same bytes as their elements.
  typedef W Loose __attribute__((vector_size(LORUN_VECTOR_BYTES), aligned(alignof(W)), may_alias));
  typedef uint16_t Short __attribute__((vector_size(LORUN_VECTOR_BYTES / 2), may_alias));
  typedef uint16_t LooseShort __attribute__((vector_size(LORUN_VECTOR_BYTES / 2), aligned(2), may_alias));
};

template <class T>
LORUN_TARGET LORUN_INLINE inline typename Lanes<Wide<T>>::Vec load(const T* at) {
  using L = Lanes<Wide<T>>;
  if constexpr (sizeof(T) == sizeof(Wide<T>)) {
    return *reinterpret_cast<const typename L::Loose*>(at);
  } else {
    using Vec = typename L::Vec;
    using Bits = typename L::Bits;
    const Bits bits = __builtin_convertvector(*reinterpret_cast<const typename L::LooseShort*>(at), Bits);
    if constexpr (std::is_same_v<T, BFloat16>) {
      return reinterpret_cast<Vec>(bits << 16);
    } else {  // as widen(Half) of convert.h
      const Bits magnitude = (bits & 0x7fffu) << 13;
      const Bits finite = reinterpret_cast<Bits>(reinterpret_cast<Vec>(magnitude) * 0x1p112f);
      const Bits value = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
      return reinterpret_cast<Vec>(value | (bits & 0x8000u) << 16);
    }
  }
}

// In storage, as narrow() of convert.h rounds; by one instruction numbers below bf16's normal ones become zero.
template <class T>
LORUN_TARGET LORUN_INLINE inline auto narrowed(typename Lanes<Wide<T>>::Vec v) {
  using L = Lanes<Wide<T>>;
  if constexpr (sizeof(T) == sizeof(Wide<T>)) {
    return v;
  } else {
#ifdef LORUN_ROUNDS_BF16
    if constexpr (std::is_same_v<T, BFloat16>) {
      return reinterpret_cast<typename L::Short>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
    }
#endif
    using Vec = typename L::Vec;
    using Bits = typename L::Bits;
    const Bits bits = reinterpret_cast<Bits>(v), magnitude = bits & 0x7fffffffu;
    Bits out;
    if constexpr (std::is_same_v<T, BFloat16>) {
      const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      const Bits quiet = Bits{} + 0x7fc0u;
      out = magnitude > 0x7f800000u ? quiet : rounded;
    } else {
      const Bits tiny = reinterpret_cast<Bits>(reinterpret_cast<Vec>(magnitude) + 0.5f) - 0x3f000000u;
      const Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
      const Bits infinite = Bits{} + 0x7c00u, quiet = Bits{} + 0x7e00u;
      out = magnitude < 0x38800000u ? tiny : normal;
      out = magnitude >= 0x477ff000u ? infinite : out;
      out = magnitude > 0x7f800000u ? quiet : out;
      out |= (bits >> 16) & 0x8000u;
    }
    return __builtin_convertvector(out, typename L::Short);
  }
}

template <class T, class V>
LORUN_TARGET LORUN_INLINE inline void store(T* at, V v) {
  typedef V Loose __attribute__((aligned(alignof(T)), may_alias));
  *reinterpret_cast<Loose*>(at) = v;
}

}  // namespace lorun::LORUN_VARIANT
