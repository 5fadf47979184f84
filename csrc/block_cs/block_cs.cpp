// Block compressive sensing on the CPU (formulas in block_cs.h).
//
// The work is two matrix products, so it is torch's matrix product that does it; this file sees to it that nothing
// else costs much. Blocks are packed once into P (blocks, B*B), widened to the accumulation type. Then
//   T = P Phi^T,   T <- rho (y - T)   (y is read transposed, tile by tile),   P <- P + T Phi,
// and P is cropped and narrowed into z: the second product adds onto the packed image, so that neither the gradient
// nor a second copy of x exists.

#include "block_cs/block_cs.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/convert.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/tensor.h"

namespace lorun::block_cs {
namespace {

// Called directly, not through the dispatcher: autocast must not turn the accumulation into bf16.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

void multiply_add(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

Tensor transposed(const Tensor& t) {
  return torch::stable::transpose(t, 0, 1);
}

// x (N, 1, H, W), any strides -> P (blocks, B*B) in the accumulation type, zero outside the image.
template <class T>
Tensor pack(const Tensor& x, const Grid& grid) {
  const Tensor packed = empty_beside(x, {grid.blocks(), grid.pixels()}, wide_type(x.scalar_type()));
  const T* from = x.const_data_ptr<T>();
  Wide<T>* to = packed.mutable_data_ptr<Wide<T>>();
  const int64_t by_sample = x.stride(0), by_row = x.stride(2), by_col = x.stride(3);
  parallel(grid.blocks(), grid.pixels(), [&](int64_t begin, int64_t end) {
    multiversion([&](auto) LORUN_INLINE {
      for (int64_t b = begin; b < end; ++b) {
        const Place at = grid.place(b);
        const int64_t inside = std::min(grid.block, grid.width - at.left);
        Wide<T>* out = to + b * grid.pixels();
        for (int64_t i = 0; i < grid.block; ++i, out += grid.block) {
          const int64_t filled = at.top + i < grid.height ? inside : 0;
          const T* in = from + at.sample * by_sample + (at.top + i) * by_row + at.left * by_col;
          if (by_col == 1) {
            for (int64_t j = 0; j < filled; ++j) {
              out[j] = widen(in[j]);
            }
          } else {
            for (int64_t j = 0; j < filled; ++j) {
              out[j] = widen(in[j * by_col]);
            }
          }
          for (int64_t j = filled; j < grid.block; ++j) {
            out[j] = 0;
          }
        }
      }
    });
  });
  return packed;
}

// P (blocks, B*B) -> a contiguous (N, 1, H, W) image.
template <class T>
Tensor unpack(const Tensor& packed, const Grid& grid, ScalarType type) {
  const Tensor x = empty_beside(packed, {grid.samples, 1, grid.height, grid.width}, type);
  const Wide<T>* from = packed.const_data_ptr<Wide<T>>();
  T* to = x.mutable_data_ptr<T>();
  parallel(grid.blocks(), grid.pixels(), [&](int64_t begin, int64_t end) {
    multiversion([&](auto) LORUN_INLINE {
      for (int64_t b = begin; b < end; ++b) {
        const Place at = grid.place(b);
        const int64_t inside = std::min(grid.block, grid.width - at.left);
        const int64_t filled = std::min(grid.block, grid.height - at.top);
        for (int64_t i = 0; i < filled; ++i) {
          const Wide<T>* in = from + b * grid.pixels() + i * grid.block;
          T* out = to + (at.sample * grid.height + at.top + i) * grid.width + at.left;
          for (int64_t j = 0; j < inside; ++j) {
            out[j] = narrow<T>(in[j]);
          }
        }
      }
    });
  });
  return x;
}

// Visits t = T[block, k] beside y[n, k, row, col] for all blocks and k, as f(t, y, n), in parallel and in tiles that
// keep the transposed side in cache. T and y are contiguous.
template <class Tall, class Wise, class F>
void beside_measurements(Tall* tall, Wise* y, const Grid& grid, int64_t m, const F& f) {
  constexpr int64_t kTile = 16;
  const int64_t each = grid.per_sample(), tiles = (each + kTile - 1) / kTile;
  parallel(grid.samples * tiles, kTile * m, [&](int64_t begin, int64_t end) {
    multiversion([&](auto) LORUN_INLINE {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t n = tile / tiles, first = tile % tiles * kTile, last = std::min(first + kTile, each);
        for (int64_t k0 = 0; k0 < m; k0 += kTile) {
          const int64_t k1 = std::min(k0 + kTile, m);
          for (int64_t l = first; l < last; ++l) {
            Tall* row = tall + (n * each + l) * m;
            Wise* column = y + n * m * each + l;
            for (int64_t k = k0; k < k1; ++k) {
              f(row[k], column[k * each], n);
            }
          }
        }
      }
    });
  });
}

// y (N, m, rows, cols) -> T (blocks, m) in the accumulation type.
template <class T>
Tensor tall(const Tensor& y, const Grid& grid, int64_t m) {
  const Tensor out = empty_beside(y, {grid.blocks(), m}, wide_type(y.scalar_type()));
  const Tensor plain = dense(y);
  beside_measurements(out.mutable_data_ptr<Wide<T>>(), plain.const_data_ptr<T>(), grid, m,
                      [](Wide<T>& t, const T& v, int64_t) LORUN_INLINE { t = widen(v); });
  return out;
}

void check_phi(const Tensor& phi, const Grid& grid, ScalarType image) {
  check_type("phi", phi, wide_type(image));
  check_shape("phi", phi, {phi.size(0), grid.pixels()});
}

Grid grid_of(const Tensor& x, int64_t block_size) {
  STD_TORCH_CHECK(block_size > 0, "block_size: expected at least 1, got ", block_size);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == 1, "x: expected (N, 1, H, W), got ", shape_of(x));
  return Grid(x.size(0), x.size(2), x.size(3), block_size);
}

Tensor forward(Tensor x, Tensor phi, int64_t block_size) {
  const Grid grid = grid_of(x, block_size);
  check_phi(phi, grid, x.scalar_type());
  const int64_t m = phi.size(0);
  const Tensor y = empty_beside(x, {grid.samples, m, grid.rows, grid.cols}, x.scalar_type());
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor packed = pack<T>(x, grid);
    const Tensor product = empty_beside(packed, {grid.blocks(), m}, packed.scalar_type());
    multiply(product, packed, transposed(phi));
    beside_measurements(product.const_data_ptr<Wide<T>>(), y.mutable_data_ptr<T>(), grid, m,
                        [](const Wide<T>& t, T& v, int64_t) LORUN_INLINE { v = narrow<T>(t); });
  });
  return y;
}

Tensor adjoint(Tensor y, Tensor phi, int64_t block_size, int64_t height, int64_t width) {
  STD_TORCH_CHECK(block_size > 0, "block_size: expected at least 1, got ", block_size);
  STD_TORCH_CHECK(y.dim() == 4, "y: expected (N, m, rows, cols), got ", shape_of(y));
  const Grid grid(y.size(0), height, width, block_size);
  check_phi(phi, grid, y.scalar_type());
  check_shape("y", y, {grid.samples, phi.size(0), grid.rows, grid.cols});
  return dispatch_storage(y.scalar_type(), "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor measured = tall<T>(y, grid, phi.size(0));
    const Tensor packed = empty_beside(measured, {grid.blocks(), grid.pixels()}, measured.scalar_type());
    multiply(packed, measured, phi);
    return unpack<T>(packed, grid, y.scalar_type());
  });
}

Tensor step(Tensor x, Tensor y, Tensor phi, Tensor rho, int64_t block_size) {
  const Grid grid = grid_of(x, block_size);
  check_phi(phi, grid, x.scalar_type());
  const int64_t m = phi.size(0);
  check_type("y", y, wide_type(x.scalar_type()));
  check_shape("y", y, {grid.samples, m, grid.rows, grid.cols});
  check_step_size(rho, grid.samples, 1, wide_type(x.scalar_type()));
  const Tensor dense_y = dense(y), dense_rho = dense(rho);
  return dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    const Tensor packed = pack<T>(x, grid);
    const Tensor residual = empty_beside(packed, {grid.blocks(), m}, packed.scalar_type());
    multiply(residual, packed, transposed(phi));
    const W* rhos = dense_rho.const_data_ptr<W>();
    const int64_t by_sample = rho.dim() == 1 ? 0 : 1;
    beside_measurements(residual.mutable_data_ptr<W>(), dense_y.const_data_ptr<W>(), grid, m,
                        [=](W& t, const W& v, int64_t n) LORUN_INLINE { t = rhos[n * by_sample] * (v - t); });
    multiply_add(packed, residual, phi);
    return unpack<T>(packed, grid, x.scalar_type());
  });
}

Tensor grad_phi(Tensor x, Tensor y, int64_t block_size) {
  const Grid grid = grid_of(x, block_size);
  const ScalarType wide = wide_type(x.scalar_type());
  check_type("y", y, wide);
  STD_TORCH_CHECK(y.dim() == 4, "y: expected (N, m, rows, cols), got ", shape_of(y));
  const int64_t m = y.size(1);
  check_shape("y", y, {grid.samples, m, grid.rows, grid.cols});
  const Tensor out = empty_beside(y, {m, grid.pixels()}, wide);
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    multiply(out, transposed(tall<Wide<T>>(y, grid, m)), pack<T>(x, grid));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("block_cs", TORCH_BOX(&forward));
  m.impl("block_cs_adjoint", TORCH_BOX(&adjoint));
  m.impl("block_cs_step", TORCH_BOX(&step));
  m.impl("block_cs_grad_phi", TORCH_BOX(&grad_phi));
}

}  // namespace lorun::block_cs
