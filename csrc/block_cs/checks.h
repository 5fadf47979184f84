// What the op's arguments must look like, for the CPU and the CUDA implementation.
#pragma once

#include "block_cs/block_cs.h"
#include "common/tensor.h"

namespace lorun::block_cs {

// Far from where a block's number of pixels would no longer be represented.
constexpr int64_t kMostBlock = int64_t{1} << 20;

inline void check_block_size(int64_t block_size) {
  STD_TORCH_CHECK(block_size > 0 && block_size <= kMostBlock, "block_size: expected 1 to ", kMostBlock, ", got ",
                  block_size);
}

inline Grid grid_of(const Tensor& x, int64_t block_size) {
  check_block_size(block_size);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == 1, "x: expected (N, 1, H, W), got ", shape_of(x));
  return Grid(x.size(0), x.size(2), x.size(3), block_size);
}

inline Grid grid_of_measurements(const Tensor& y, int64_t block_size, int64_t height, int64_t width) {
  check_block_size(block_size);
  STD_TORCH_CHECK(y.dim() == 4, "y: expected (N, m, rows, cols), got ", shape_of(y));
  return Grid(y.size(0), height, width, block_size);
}

inline void check_phi(const Tensor& phi, const Grid& grid, ScalarType image) {
  check_type("phi", phi, wide_type(image));
  STD_TORCH_CHECK(phi.dim() == 2 && phi.size(1) == grid.pixels(), "phi: expected (m, ", grid.pixels(), "), got ",
                  shape_of(phi));
}

// y beside the image x, in the accumulation type.
inline void check_measurements(const Tensor& x, const Tensor& y, const Grid& grid) {
  check_type("y", y, wide_type(x.scalar_type()));
  STD_TORCH_CHECK(y.dim() == 4, "y: expected (N, m, rows, cols), got ", shape_of(y));
  check_shape("y", y, {grid.samples, y.size(1), grid.rows, grid.cols});
}

inline void check_step(const Tensor& x, const Tensor& y, const Tensor& phi, const Tensor& rho, const Grid& grid) {
  check_phi(phi, grid, x.scalar_type());
  check_measurements(x, y, grid);
  check_shape("y", y, {grid.samples, phi.size(0), grid.rows, grid.cols});
  check_step_size(rho, grid.samples, 1, wide_type(x.scalar_type()));
}

inline Tensor empty_residual(const Tensor& y) {
  STD_TORCH_CHECK(y.dim() == 4, "y: expected (N, m, rows, cols), got ", shape_of(y));
  return empty_beside(y, {y.size(0), y.size(1), y.size(2), y.size(3)}, y.scalar_type());
}

}  // namespace lorun::block_cs
