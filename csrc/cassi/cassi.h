// Single-disperser CASSI: where everything lies. Shared by the CPU and CUDA implementations.
//
//   y[n, i, j] = sum_c m_c[i, j - c*step] x[n, c, i, j - c*step]          y = Phi x
//   z = x - rho Phi^T (w (Phi x - y)),   that is
//   z[n, c, i, j] = x[n, c, i, j] - rho m_c[i, j] r[n, i, j + c*step],    r = w (Phi x - y)
//
// Rows never meet: a row of y needs the same row of each band, and nothing else.
#pragma once

#include <cstdint>

#include "common/hd.h"

namespace lorun::cassi {

struct Geometry {
  int64_t samples, bands, height, width, step;

  // Columns by which the last band is shifted.
  LORUN_HD int64_t shift() const {
    return step * (bands - 1);
  }

  // Columns of a measurement.
  LORUN_HD int64_t measured() const {
    return width + shift();
  }

  // Rows of all measurements.
  LORUN_HD int64_t rows() const {
    return samples * height;
  }
};

// Elements between neighbours of an image, (N, L, H, W) with unit stride along W.
struct ImageStrides {
  int64_t sample, band, row;
};

}  // namespace lorun::cassi
