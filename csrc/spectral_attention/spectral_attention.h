// Attention across the channels of an image. Of a pixel's values [q, k, v, h]:
//
//   y = [A v, relu(h)],  A[i, j] = softmax over j of t * G[i, j] / (|q_i| |k_j|),  G = sum over pixels of q_i k_j
//
// i and j are channels of one head, d of them; the norms are over all pixels. Backward, with g the gradient for A v:
//
//   dA = sum over pixels of g_i v_j,  dL = A (dA - sum over j of A dA),  dG = dL t / (|q_i| |k_j|)
//   dq_i = sum over j of dG[i, j] k_j - q_i (sum over j of dG G) / |q_i|^2,  dk likewise,  dv_j = sum over i of A g_i
//
// Two passes over the pixels with a small matrix between them: sums, then products. The first reads q and k, the second
// v and h, and writes y: all of it once, and 4 C d operations a pixel (C channels). With twice as many hidden values as
// channels and d = 28 that is 3.5 operations a byte in fp32, 7 in 16 bits: memory and arithmetic are both near. The
// channels of a head and 64 pixels are laid out in the first-level cache, where products take vectors of channels.
#pragma once

#include <cstdint>

namespace lorun::spectral_attention {

constexpr int64_t kPixels = 64;  // laid out at a time
constexpr int64_t kPad = 16;     // a head's channels are laid out in multiples of it, zeros after them

struct Shape {
  int64_t n, pixels, heads, d, hidden;

  int64_t channels() const {
    return heads * d;
  }
  // Values of a pixel before and after.
  int64_t width() const {
    return 3 * channels() + hidden;
  }
  int64_t out_width() const {
    return channels() + hidden;
  }
  int64_t pitch() const {
    return (d + kPad - 1) / kPad * kPad;
  }
  int64_t matrix() const {
    return pitch() * pitch();
  }
};

// What is summed over pixels for one head: G and the squared norms of q and k; backward also dA.
struct Sums {
  int64_t pitch;
  bool backward;

  int64_t values() const {
    return (1 + backward) * pitch * pitch + 2 * pitch;
  }
  int64_t of_q() const {
    return (1 + backward) * pitch * pitch;
  }
  int64_t of_k() const {
    return of_q() + pitch;
  }
};

}  // namespace lorun::spectral_attention
