// Storage type <-> accumulation type on the CPU, written so that loops over them vectorise for every target.
#pragma once

#include <bit>
#include <cstdint>

#include "common/simd.h"
#include "common/tensor.h"

namespace lorun {

LORUN_INLINE inline float widen(float v) {
  return v;
}

LORUN_INLINE inline double widen(double v) {
  return v;
}

LORUN_INLINE inline float widen(BFloat16 v) {
  return std::bit_cast<float>(static_cast<uint32_t>(v.x) << 16);
}

LORUN_INLINE inline float widen(Half v) {
  // Exponent and fraction move to fp32's places; a product with 2^112 corrects the bias, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(v.x & 0x7fff) << 13;
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
  return std::bit_cast<float>(bits | static_cast<uint32_t>(v.x & 0x8000) << 16);
}

template <class T>
T narrow(Wide<T> v);

template <>
LORUN_INLINE inline float narrow<float>(float v) {
  return v;
}

template <>
LORUN_INLINE inline double narrow<double>(double v) {
  return v;
}

template <>
LORUN_INLINE inline BFloat16 narrow<BFloat16>(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BFloat16(static_cast<uint16_t>(nan ? 0x7fc0u : rounded), BFloat16::from_bits());
}

template <>
LORUN_INLINE inline Half narrow<Half>(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // fp16's subnormals have the spacing of fp32 numbers next to 0.5: the addition rounds for us.
  const uint32_t tiny = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? tiny : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return Half(static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u)), Half::from_bits());
}

}  // namespace lorun
