// Block compressive sensing: where a block lies in its image. Shared by the CPU and CUDA implementations.
//
//   y = Phi x,   x^ = Phi^T y,   z = x - rho Phi^T (Phi x - y)     for every B x B block, row-major, as a vector
//
// Blocks are numbered sample by sample, row by row; block b of an image holds measurements y[n, :, row, col].
#pragma once

#include <cstdint>

#include "common/hd.h"

namespace lorun::block_cs {

struct Place {
  int64_t sample, top, left;
};

struct Grid {
  int64_t samples, height, width, block, rows, cols;

  Grid(int64_t samples, int64_t height, int64_t width, int64_t block)
      : samples(samples),
        height(height),
        width(width),
        block(block),
        rows((height + block - 1) / block),
        cols((width + block - 1) / block) {}

  LORUN_HD int64_t per_sample() const {
    return rows * cols;
  }

  LORUN_HD int64_t blocks() const {
    return samples * rows * cols;
  }

  LORUN_HD int64_t pixels() const {
    return block * block;
  }

  LORUN_HD Place place(int64_t b) const {
    const int64_t in_sample = b % per_sample();
    return {b / per_sample(), in_sample / cols * block, in_sample % cols * block};
  }
};

}  // namespace lorun::block_cs
