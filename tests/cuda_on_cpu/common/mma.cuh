// Takes the place of csrc/common/mma.cuh: the lanes of a warp show each other what they hold, and each computes its
// sums.
#pragma once

#include <cuda_runtime.h>

namespace lorun {

inline float float_of_bf16(uint32_t bits) {
  return std::bit_cast<float>(bits << 16);
}

inline uint32_t pack_bf16(float first, float second) {
  const auto round = [](float v) {
    const uint32_t bits = std::bit_cast<uint32_t>(v);
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  };
  return round(first) | round(second) << 16;
}

// What a lane holds of both factors.
struct Held {
  uint32_t a[4], b[2];
};

// use(of), where of(lane) is what that lane holds.
template <class F>
void show_factors(const uint32_t (&a)[4], const uint32_t (&b)[2], const F& use, int line) {
  Held held;
  std::memcpy(held.a, a, sizeof(a));
  std::memcpy(held.b, b, sizeof(b));
  cuda_on_cpu::exchange_all(held, use, line);
}

inline void mma_bf16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  show_factors(
      a, b,
      [&](const auto& of) {
        const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        for (unsigned pair = 0; pair < 8; ++pair) {  // of depths
          const Held rows = of(4 * g + pair % 4);
          for (unsigned column = 0; column < 2; ++column) {
            const uint32_t right = of(4 * (2 * t + column) + pair % 4).b[pair / 4];
            for (unsigned half = 0; half < 2; ++half) {
              const uint32_t left = rows.a[pair / 4 * 2 + half];
              float& sum = sums[2 * half + column];
              sum += float_of_bf16(left) * float_of_bf16(right);
              sum += float_of_bf16(left >> 16) * float_of_bf16(right >> 16);
            }
          }
        }
      },
      __LINE__);
}

// Takes the upper 19 bits of each factor, as the device does, and cuts off the sum: no worse than any device.
inline void mma_tf32(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  show_factors(
      a, b,
      [&](const auto& of) {
        const auto value = [](uint32_t bits) { return double{std::bit_cast<float>(bits & 0xffffe000u)}; };
        const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        for (unsigned half = 0; half < 2; ++half) {
          for (unsigned column = 0; column < 2; ++column) {
            float& sum = sums[2 * half + column];
            double exact = sum;
            for (unsigned k = 0; k < 8; ++k) {
              const uint32_t right = of(4 * (2 * t + column) + k % 4).b[k / 4];
              exact += value(of(4 * g + k % 4).a[k / 4 * 2 + half]) * value(right);
            }
            sum = static_cast<float>(exact);
            if (std::isfinite(sum) && std::abs(double{sum}) > std::abs(exact)) {
              sum = std::nextafter(sum, 0.0f);
            }
          }
        }
      },
      __LINE__);
}

}  // namespace lorun
