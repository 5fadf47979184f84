// The weight gradient of a convolution of stride 1, by matrix tiles:
//
//   G[o, c, i, j] = sum over n, h, w of grad[n, o, h, w] * x[n, c, h - padding + i, w - padding + j].
//
// The sums run over pixels, so both factors are laid out anew, some rows of an image at a time, as the tile products
// take them: as one line of pixels, row after row `pitch` apart, zeros in between, in which a tap is a shift by
// i * pitch + j. A step is 32 pixels of that line, whatever the rows' width.
//
//   left (blocks of 16 channels of the gradient, steps, 16, 32 pixels): a line of pixels for each channel;
//   right (min(kernel, 2), blocks of 16 channels of x, pairs of pixels of rows + kernel - 1 rows, 16 channels, 2): rows
//     begin with `padding` zeros; the second time, pairs begin with the second pixel.
//
// A tap shifts the right side, by a pitch, an even number, for a row of the kernel, and by its column: an even one by
// pairs, an odd one by pairs of the second kind. Where it takes fewer blocks, because channels are few, the left side
// has lines for the kernel * out pairs (column, channel) instead, shifted, and the right side is there once. There are
// zeros enough if a pitch has room for a row of either image and for x with the padding of one side: a tap that leaves
// a row of x or of the gradient, by at most `padding` or kernel - 1 - padding pixels, then meets zeros.
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
// Bytes of both sides: they and the sums stay in the second-level cache, two MiB on every processor that has the tiles.
constexpr int64_t kLaidOut = 1 << 20;
// Parts of the rows with sums of their own: at most so many, of so many steps at least, and so much memory.
constexpr int64_t kParts = 16, kPartSteps = 32, kPartBytes = 16 << 20;

struct Shape {
  int64_t n, out, in, height, width, kernel, padding;  // height, width: of x
  int64_t laid_out = kLaidOut;

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

  // Columns of the kernel that the left side has lines for. A shift reaches one step back at most.
  int64_t columns() const {
    const int64_t blocks = (kernel * out + kLanes - 1) / kLanes;
    return blocks < kernel * ((out + kLanes - 1) / kLanes) && kernel <= kDepth ? kernel : 1;
  }

  int64_t steps(int64_t rows) const {
    return (rows * pitch() + columns() - 1 + kDepth - 1) / kDepth;
  }

  int64_t left_blocks() const {
    return (columns() * out + kLanes - 1) / kLanes;
  }

  int64_t left_values() const {
    return left_blocks() * left_block();
  }

  int64_t right_blocks() const {
    return (in + kLanes - 1) / kLanes;
  }

  // Kinds of pairs on the right side.
  int64_t phases() const {
    return std::min<int64_t>(kernel / columns(), 2);
  }

  // Rows of the gradient that are laid out at a time.
  int64_t rows() const {
    const int64_t row = pitch() * kLanes * 2, right = phases() * right_blocks() * row;
    const int64_t fit = (laid_out - (kernel - 1) * right) / (left_blocks() * row + right);
    return std::clamp<int64_t>(fit, 1, std::max<int64_t>(grad_height(), 1));
  }

  // Values of one block.
  int64_t left_block() const {
    return steps(rows()) * kTileValues;
  }

  int64_t right_block() const {
    return ((rows() + kernel - 1) * pitch() + right_end()) * kLanes;
  }

  int64_t right_values() const {
    return phases() * right_blocks() * right_block();
  }

  // Pixels after the last row that steps and shifts reach.
  int64_t right_end() const {
    return kDepth + kernel + kernel % 2;
  }

  // Products of all lines: one for each tap, or for each row of the kernel.
  int64_t products() const {
    return kernel * kernel / columns();
  }

  // Sums of a part of the rows, (products, left blocks, right blocks, 16, 16).
  int64_t sums() const {
    return products() * left_blocks() * right_blocks() * kSums;
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
  const int64_t taps = s.kernel * s.kernel, columns = s.columns();
  parallel(s.out, s.in * taps, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t line = tap % columns * s.out + o;
        const int64_t tiles = (tap / columns * s.left_blocks() + line / kLanes) * s.right_blocks();
        const float* from = sums + tiles * kSums + line % kLanes * kLanes;
        for (int64_t c = 0; c < s.in; c += kLanes, from += kSums) {
          float* to = g + (o * s.in + c) * taps + tap;
          for (int64_t i = 0, lanes = std::min(kLanes, s.in - c); i < lanes; ++i) {
            to[i * taps] = from[i];
          }
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
