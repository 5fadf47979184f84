// From channels outside to channels innermost and back on the CPU, and to another dtype on the way.
//
//   (n, channels, pixels) <-> (n, pixels, channels)
//
// Bytes: one read and one write. torch copies value by value where strides differ, two to ten times as long. Here a
// thread takes some pixels of some channels at a time: read in the source's order, turned in the first-level cache,
// written in the result's order. Conversions are of whole rows, on the side of (n, channels, pixels), where they
// vectorise.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/convert.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/tensor.h"

namespace lorun::relayout {
namespace {

constexpr int64_t kPixels = 128, kChannels = 32;  // of a tile

template <class To, class From>
LORUN_INLINE inline To converted(From v) {
  if constexpr (std::is_same_v<To, From>) {
    return v;
  } else {
    return narrow<To>(widen(v));
  }
}

// Values of T as bits, in vectors that every machine of the architecture has.
template <class T>
struct Bits {
  using Value = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  static constexpr int kCount = 16 / sizeof(T);
  typedef Value Vec __attribute__((vector_size(16)));
  typedef Value Loose __attribute__((vector_size(16), aligned(alignof(T)), may_alias));
};

// Lanes of the first, or second, halves of both in turns.
template <class T, int Half, int... kLane>
LORUN_INLINE inline typename Bits<T>::Vec zip(typename Bits<T>::Vec a, typename Bits<T>::Vec b,
                                              std::integer_sequence<int, kLane...>) {
  constexpr int kCount = Bits<T>::kCount;
#ifdef __clang__
  return __builtin_shufflevector(a, b, (kLane / 2 + Half * kCount / 2 + kLane % 2 * kCount)...);
#else
  return __builtin_shuffle(a, b, typename Bits<T>::Vec{(kLane / 2 + Half * kCount / 2 + kLane % 2 * kCount)...});
#endif
}

// A square of as many rows as a vector has lanes.
template <class T>
LORUN_INLINE inline void turn_square(const T* from, int64_t from_row, T* to, int64_t to_row) {
  using B = Bits<T>;
  using Lane = std::make_integer_sequence<int, B::kCount>;
  typename B::Vec row[B::kCount], zipped[B::kCount];
#pragma GCC unroll 8
  for (int i = 0; i < B::kCount; ++i) {
    row[i] = *reinterpret_cast<const typename B::Loose*>(from + i * from_row);
  }
#pragma GCC unroll 3
  for (int round = 1; round < B::kCount; round *= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < B::kCount / 2; ++i) {
      zipped[2 * i] = zip<T, 0>(row[i], row[i + B::kCount / 2], Lane{});
      zipped[2 * i + 1] = zip<T, 1>(row[i], row[i + B::kCount / 2], Lane{});
    }
#pragma GCC unroll 8
    for (int i = 0; i < B::kCount; ++i) {
      row[i] = zipped[i];
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < B::kCount; ++j) {
    *reinterpret_cast<typename B::Loose*>(to + j * to_row) = row[j];
  }
}

// to (columns, rows) = from (rows, columns). The last squares overlap the ones before.
template <class T>
LORUN_INLINE inline void turn(const T* from, int64_t from_row, T* to, int64_t to_row, int64_t rows, int64_t columns) {
  constexpr int64_t kCount = Bits<T>::kCount;
  if (rows < kCount || columns < kCount) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = 0; i < rows; ++i) {
        to[j * to_row + i] = from[i * from_row + j];
      }
    }
    return;
  }
  for (int64_t next = 0; next < columns; next += kCount) {
    const int64_t j = std::min(next, columns - kCount);
    for (int64_t after = 0; after < rows; after += kCount) {
      const int64_t i = std::min(after, rows - kCount);
      turn_square(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
    }
  }
}

// Outside has (n, channels, pixels), Inside (n, pixels, channels).
template <bool ToInside, class Outside, class Inside>
void copy(std::conditional_t<ToInside, const Outside, Outside>* outside,
          std::conditional_t<ToInside, Inside, const Inside>* inside, int64_t n, int64_t channels, int64_t pixels) {
  const int64_t blocks = (pixels + kPixels - 1) / kPixels;
  parallel(n * blocks, channels * kPixels, [&](int64_t begin, int64_t end) {
    multiversion([&](auto) LORUN_INLINE {
      alignas(64) Inside tile[kChannels * kPixels];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t image = block / blocks, first = block % blocks * kPixels;
        const int64_t count = std::min(kPixels, pixels - first);
        for (int64_t c = 0; c < channels; c += kChannels) {
          const int64_t some = std::min(kChannels, channels - c);
          auto* rows = outside + (image * channels + c) * pixels + first;
          auto* at = inside + (image * pixels + first) * channels + c;
          if constexpr (ToInside) {
            for (int64_t i = 0; i < some; ++i) {
              for (int64_t j = 0; j < count; ++j) {
                tile[i * kPixels + j] = converted<Inside>(rows[i * pixels + j]);
              }
            }
            turn(tile, kPixels, at, channels, some, count);
          } else {
            turn(at, channels, tile, kPixels, count, some);
            for (int64_t i = 0; i < some; ++i) {
              for (int64_t j = 0; j < count; ++j) {
                rows[i * pixels + j] = converted<Outside>(tile[i * kPixels + j]);
              }
            }
          }
        }
      }
    });
  });
}

// f(TypeTag<From>, TypeTag<To>) for equal dtypes, and for fp32 beside either of 16 bits.
template <class F>
void dispatch_pair(ScalarType from, ScalarType to, const F& f) {
  dispatch_storage(from, "x", [&](auto source) {
    dispatch_storage(to, "dtype", [&](auto target) {
      using From = typename decltype(source)::type;
      using To = typename decltype(target)::type;
      constexpr bool kFloat = std::is_same_v<From, float> || std::is_same_v<To, float>;
      constexpr bool kDouble = std::is_same_v<From, double> || std::is_same_v<To, double>;
      if constexpr (std::is_same_v<From, To> || (kFloat && !kDouble)) {
        f(source, target);
      } else {
        STD_TORCH_CHECK(false, "dtype: expected x's own, or float32 beside bfloat16 or float16");
      }
    });
  });
}

Tensor relayout(Tensor x, bool channels_last, ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected 4 dimensions, got ", shape_of(x));
  const int64_t n = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3), pixels = height * width;
  const Tensor in = channels_last ? dense(x) : channels_inside(x);
  const Tensor out = channels_last ? empty_channels_last(x, n, channels, height, width, dtype)
                                   : empty_beside(x, {n, channels, height, width}, dtype);
  dispatch_pair(x.scalar_type(), dtype, [&](auto source, auto target) {
    using From = typename decltype(source)::type;
    using To = typename decltype(target)::type;
    if (channels_last) {
      copy<true, From, To>(in.const_data_ptr<From>(), out.mutable_data_ptr<To>(), n, channels, pixels);
    } else {
      copy<false, To, From>(out.mutable_data_ptr<To>(), in.const_data_ptr<From>(), n, channels, pixels);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("relayout", TORCH_BOX(&relayout));
}

}  // namespace lorun::relayout
