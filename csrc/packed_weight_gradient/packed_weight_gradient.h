// The weight gradient of a convolution of stride 1, by matrix tiles:
//
//   G[o, c, i, j] = sum over n, h, w of grad[n, o, h, w] * x[n, c, h - padding + i, w - padding + j].
//
// The sums run over pixels, so both factors are laid out anew, some rows of an image at a time, as the tile products
// take them: as one line of pixels, row after row `pitch` apart, zeros in between, in which a tap is a shift by
// i * pitch + j. A step is 32 pixels of that line, whatever the rows' width.
//
//   left (blocks of 16 of the kernel * out pairs (column, channel) of the gradient, steps, 16, 32 pixels): a line of
//     pixels for each channel of the gradient, shifted for each column of the kernel;
//   right (blocks of 16 channels of x, pairs of pixels of rows + kernel - 1 rows, 16 channels, 2).
//
// A row of the kernel shifts the right side by a pitch, an even number. There are zeros enough if a pitch has room for
// a row of either image and for x with the padding of one side: a tap that leaves a row of x or of the gradient, by at
// most `padding` or kernel - 1 - padding pixels, then meets zeros.
//
// Products: N H W out in k^2, as many as the convolution's. Every part of the rows has sums of its own, which are added
// in order: the result does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "common/parallel.h"

namespace lorun::packed_weight_gradient {

constexpr int64_t kLanes = 16, kDepth = 32;  // channels of a tile, pixels of a step
constexpr int64_t kTileValues = kLanes * kDepth, kSums = kLanes * kLanes;
constexpr int64_t kSteps = 16;           // that are multiplied together, from the first-level cache
constexpr int64_t kAtHand = 512;         // pixels of 16 lines at a time, in the first-level cache
constexpr int64_t kLaidOut = 640 << 10;  // bytes: both sides stay in the second-level cache
// Parts of the rows with sums of their own: at most so many, of so many steps at least, and so much memory.
constexpr int64_t kParts = 16, kPartSteps = 32, kPartBytes = 16 << 20;

struct Shape {
  int64_t n, out, in, height, width, kernel, padding;  // height, width: of x

  int64_t grad_height() const {
    return height + 2 * padding - kernel + 1;
  }

  int64_t grad_width() const {
    return width + 2 * padding - kernel + 1;
  }

  // Pixels from one row to the next.
  int64_t pitch() const {
    const int64_t pixels = std::max(width + padding, grad_width());
    return pixels + pixels % 2;
  }

  int64_t steps(int64_t rows) const {
    return (rows * pitch() + kDepth - 1) / kDepth;
  }

  // Zeros before a line's first pixel that shifts reach.
  int64_t front() const {
    return (kernel + kDepth - 1) / kDepth * kDepth;
  }

  // Values of the part of a line that is at hand: a row and more, what the last steps left, and zeros after the end.
  int64_t line() const {
    return (2 * front() + std::max(pitch(), kAtHand) + pitch() + padding + 4 * kDepth) / kDepth * kDepth;
  }

  int64_t left_blocks() const {
    return (kernel * out + kLanes - 1) / kLanes;
  }

  bool fills_blocks() const {
    return kernel * out % kLanes == 0;
  }

  int64_t right_blocks() const {
    return (in + kLanes - 1) / kLanes;
  }

  // Rows of the gradient that are laid out at a time.
  int64_t rows() const {
    const int64_t row = pitch() * kLanes * 2, around = (kernel - 1) * right_blocks() * row;
    const int64_t fit = (kLaidOut - around) / ((left_blocks() + right_blocks()) * row);
    return std::clamp<int64_t>(fit, 1, std::max<int64_t>(grad_height(), 1));
  }

  // Values of one block.
  int64_t left_block() const {
    return steps(rows()) * kTileValues;
  }

  int64_t right_block() const {
    return ((rows() + kernel - 1) * pitch() + kDepth) * kLanes;
  }

  // Sums of a part of the rows, (kernel rows, left blocks, right blocks, 16, 16).
  int64_t sums() const {
    return kernel * left_blocks() * right_blocks() * kSums;
  }

  int64_t parts() const {
    const int64_t fit = kPartBytes / std::max<int64_t>(sums() * static_cast<int64_t>(sizeof(float)), 1);
    const int64_t worth = steps(n * grad_height()) / kPartSteps;
    return std::clamp<int64_t>(std::min(fit, worth), 1, kParts);
  }
};

// Sums of `parts` parts, `apart` values from one part's to the next's, added in order onto the first: g (out, in,
// kernel, kernel).
inline void add_parts(const Shape& s, float* sums, int64_t parts, int64_t apart, float* g) {
  parallel(s.sums() / kSums, parts * kSums, [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t i = begin * kSums; i < end * kSums; ++i) {
        sums[i] += sums[part * apart + i];
      }
    }
  });
  const int64_t taps = s.kernel * s.kernel;
  parallel(s.out, s.in * taps, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t line = tap % s.kernel * s.out + o;
        const int64_t tiles = (tap / s.kernel * s.left_blocks() + line / kLanes) * s.right_blocks();
        const float* from = sums + tiles * kSums + line % kLanes * kLanes;
        for (int64_t c = 0; c < s.in; ++c) {
          g[(o * s.in + c) * taps + tap] = from[c / kLanes * kSums + c % kLanes];
        }
      }
    }
  });
}

// Sums in one piece of memory, as the tiles want it.
struct Sums {
  std::unique_ptr<float[], void (*)(float*)> memory;

  explicit Sums(int64_t count)
      : memory(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t{64})),
               [](float* p) { ::operator delete(p, std::align_val_t{64}); }) {}
};

}  // namespace lorun::packed_weight_gradient
