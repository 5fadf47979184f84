// Block compressive sensing on the CPU (formulas in block_cs.h).
//
// Blocks are packed once, widened to the accumulation type, a batch at a time into P (blocks, B*B). Two matrix products
// (products.inl) do the work: the first hands each value straight to the measurement or, in a step, to
// A = rho (y - Phi x), laid out as the second wants it; the second adds onto P. P is then cropped and narrowed into the
// result. So neither the gradient nor a second copy of x exists, and the work space does not grow with the image.
// Every output value is one sum in one fixed order: results do not depend on threads or batch mates.

#include "block_cs/block_cs.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include <algorithm>

#include "block_cs/checks.h"
#include "common/convert.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "common/tensor.h"

namespace lorun::block_cs {

// Longest sum that one visit of a tile takes, and room for a panel of that depth, whatever the variant.
inline constexpr int64_t kDepth = 256;
inline constexpr int64_t kPanelBytes = 32768;

}  // namespace lorun::block_cs

#define LORUN_KERNELS "block_cs/products.inl"
#include "common/for_each_variant.h"

namespace lorun::block_cs {
namespace {

// Packed blocks that one thread works on at a time, in bytes: to stay in L2 beside a part of Phi.
constexpr int64_t kSliceBytes = 256 << 10;
// Batches for each thread to take in turns, unless they would be of so few blocks that copying Phi's panels shows.
constexpr int64_t kTurns = 4, kLeastBatch = 32;
// Packed blocks of a batch that all threads share, where the number of batches must not depend on theirs.
constexpr int64_t kSumBytes = 2 << 20;

// Where a block's part of a measurement (n, m, rows, cols) starts, its step size, and where its part of A starts.
template <class Y, class W>
struct Beside {
  Y* y;
  W rho;
  W* tile;
};

struct Slot;

// Work space for a batch of at most `batch` blocks, which `threads` threads share.
template <class W, class Y>
struct Work {
  int64_t pixels, m, batch, threads, rows_of_tile;
  W* packed;  // P (batch, B*B)
  W* tiles;   // A, in tiles of rows_of_tile
  Beside<Y, W>* beside;

  Work(const Grid& grid, int64_t m, int64_t batch, int64_t threads)
      : pixels(grid.pixels()),
        m(m),
        batch(std::min(batch, grid.blocks())),
        threads(threads),
        rows_of_tile(LORUN_PICK(spread_rows<W>)()) {
    const int64_t packed_bytes = bytes_of(this->batch * pixels);
    // A holds a value per (block, measurement); either may be the dimension that comes in tiles.
    const int64_t tile_bytes = bytes_of((this->batch + rows_of_tile) * (m + rows_of_tile));
    char* memory = static_cast<char*>(scratch<Slot>(packed_bytes + tile_bytes + this->batch * sizeof(Beside<Y, W>)));
    packed = reinterpret_cast<W*>(memory);
    tiles = reinterpret_cast<W*>(memory + packed_bytes);
    beside = reinterpret_cast<Beside<Y, W>*>(memory + packed_bytes + tile_bytes);
  }

  static int64_t bytes_of(int64_t values) {
    return (values * sizeof(W) + 63) / 64 * 64;
  }

  Slices block_slices(int64_t blocks) const {
    return Slices(blocks, std::min(threads, (blocks + 15) / 16), 8);
  }

  int64_t tile_index(int64_t row, int64_t depth, int64_t k) const {
    return row / rows_of_tile * rows_of_tile * depth + k * rows_of_tile + row % rows_of_tile;
  }

  // Zeros for the rows that the last tile has too many. They are multiplied like the others, only not stored, and what
  // lies in memory may be subnormal numbers, on which a processor takes a hundred times as long.
  void fill_last_tile(int64_t rows, int64_t depth) const {
    const int64_t filled = rows % rows_of_tile;
    for (int64_t k = 0; filled > 0 && k < depth; ++k) {
      std::fill_n(tiles + tile_index(rows, depth, k), rows_of_tile - filled, W(0));
    }
  }
};

int64_t threads() {
  return torch::stable::get_num_threads();
}

// f(work, first, blocks) for batches that cover all blocks. With blocks enough for every thread, each takes batches
// through all stages alone and P never leaves its L2; with few, the threads share a batch and split each stage.
// (torch runs a parallel loop within a parallel loop serially, so that the stages need not know.)
template <class W, class Y, class F>
void for_each_batch(const Grid& grid, int64_t m, const F& f) {
  const int64_t total = grid.blocks(), crew = threads();
  const int64_t fitting = kSliceBytes / (grid.pixels() * static_cast<int64_t>(sizeof(W)));
  const int64_t batch = std::max<int64_t>(16, fitting / 8 * 8);
  if (crew > 1 && total < 16 * crew) {
    const Work<W, Y> work(grid, m, batch * crew, crew);
    for (int64_t first = 0; first < total; first += work.batch) {
      f(work, first, std::min(work.batch, total - first));
    }
    return;
  }
  const int64_t rounds =
      std::max((total + batch * crew - 1) / (batch * crew), std::min(kTurns, total / (kLeastBatch * crew)));
  const Slices slices(total, rounds * crew, 8);
  parallel_turns(slices.count, [&](int64_t i) {
    f(Work<W, Y>(grid, m, slices.size, 1), slices.begin(i), slices.end(i) - slices.begin(i));
  });
}

// x (N, 1, H, W), any strides -> P in the accumulation type, zero outside the image.
template <class T>
void pack(const Tensor& x, const Grid& grid, int64_t first, int64_t blocks, Wide<T>* packed) {
  const T* from = x.const_data_ptr<T>();
  const int64_t by_sample = x.stride(0), by_row = x.stride(2), by_col = x.stride(3);
  parallel(blocks, grid.pixels(), [&](int64_t begin, int64_t end) {
    multiversion([&](auto) LORUN_INLINE {
      for (int64_t b = begin; b < end; ++b) {
        const Place at = grid.place(first + b);
        const int64_t inside = std::min(grid.block, grid.width - at.left);
        Wide<T>* out = packed + b * grid.pixels();
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
}

// P -> a contiguous (N, 1, H, W) image.
template <class T>
void unpack(const Wide<T>* packed, const Grid& grid, int64_t first, int64_t blocks, T* x) {
  parallel(blocks, grid.pixels(), [&](int64_t begin, int64_t end) {
    multiversion([&](auto) LORUN_INLINE {
      for (int64_t b = begin; b < end; ++b) {
        const Place at = grid.place(first + b);
        const int64_t inside = std::min(grid.block, grid.width - at.left);
        const int64_t filled = std::min(grid.block, grid.height - at.top);
        for (int64_t i = 0; i < filled; ++i) {
          const Wide<T>* in = packed + b * grid.pixels() + i * grid.block;
          T* out = x + (at.sample * grid.height + at.top + i) * grid.width + at.left;
          for (int64_t j = 0; j < inside; ++j) {
            out[j] = narrow<T>(in[j]);
          }
        }
      }
    });
  });
}

// Finds each block's measurements in a contiguous y, and its step size.
template <class Y, class W>
void locate(Y* y, const W* rho, int64_t rho_by_sample, const Grid& grid, const Work<W, Y>& work, int64_t first,
            int64_t blocks) {
  const int64_t each = grid.per_sample();
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t n = (first + b) / each;
    work.beside[b] = {y + n * work.m * each + (first + b) % each, rho == nullptr ? W(0) : rho[n * rho_by_sample],
                      work.tiles + work.tile_index(b, work.m, 0)};
  }
}

// P Phi^T, each value handed to store(block, k, value).
template <class W, class Y, class Store>
void measure_all(const Work<W, Y>& work, const W* phi, int64_t blocks, const Store& store) {
  const Slices by_block = work.block_slices(blocks);
  const Slices by_row(work.m, (work.threads + by_block.count - 1) / by_block.count, 12);
  const auto kernel = LORUN_PICK(measure<W, Store>);
  parallel_pairs(by_block, by_row, [&](int64_t i, int64_t j) {
    kernel(work.packed, phi, work.pixels, by_block.begin(i), by_block.end(i), by_row.begin(j), by_row.end(j), store);
  });
}

// c (rows, cols) (+)= A (rows, depth) b (depth, cols), with A in the work space's tiles.
template <class W, class Y>
void spread_all(const Work<W, Y>& work, const Slices& by_row, const W* b, int64_t depth, int64_t cols, bool add, W* c) {
  const Slices by_col(cols, (work.threads + by_row.count - 1) / by_row.count, 96);
  const auto kernel = LORUN_PICK(spread<W>);
  work.fill_last_tile(by_row.total, depth);
  parallel_pairs(by_row, by_col, [&](int64_t i, int64_t j) {
    alignas(64) W panel[kPanelBytes / sizeof(W)];
    const int64_t row = by_row.begin(i);
    kernel(work.tiles + row * depth, b, cols, depth, by_row.end(i) - row, by_col.begin(j), by_col.end(j), add,
           c + row * cols, cols, panel);
  });
}

Tensor forward(Tensor x, Tensor phi, int64_t block_size) {
  const Grid grid = grid_of(x, block_size);
  check_phi(phi, grid, x.scalar_type());
  const int64_t m = phi.size(0), each = grid.per_sample();
  const Tensor dense_phi = dense(phi);
  const Tensor y = empty_beside(x, {grid.samples, m, grid.rows, grid.cols}, x.scalar_type());
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    for_each_batch<W, T>(grid, m, [&](const auto& work, int64_t first, int64_t blocks) {
      pack<T>(x, grid, first, blocks, work.packed);
      locate<T, W>(y.mutable_data_ptr<T>(), nullptr, 0, grid, work, first, blocks);
      measure_all(work, dense_phi.const_data_ptr<W>(), blocks,
                  [&](int64_t b, int64_t k, W value) LORUN_INLINE { work.beside[b].y[k * each] = narrow<T>(value); });
    });
  });
  return y;
}

Tensor adjoint(Tensor y, Tensor phi, int64_t block_size, int64_t height, int64_t width) {
  const Grid grid = grid_of_measurements(y, block_size, height, width);
  check_phi(phi, grid, y.scalar_type());
  const int64_t m = phi.size(0), each = grid.per_sample();
  check_shape("y", y, {grid.samples, m, grid.rows, grid.cols});
  const Tensor dense_y = dense(y), dense_phi = dense(phi);
  const Tensor x = empty_beside(y, {grid.samples, 1, height, width}, y.scalar_type());
  dispatch_storage(y.scalar_type(), "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    for_each_batch<W, const T>(grid, m, [&](const auto& work, int64_t first, int64_t blocks) {
      locate<const T, W>(dense_y.const_data_ptr<T>(), nullptr, 0, grid, work, first, blocks);
      const Slices tiles(blocks, blocks, work.rows_of_tile);
      parallel(tiles.count, tiles.size * m, [&](int64_t begin, int64_t end) {
        for (int64_t b = tiles.begin(begin); b < tiles.end(end - 1); ++b) {
          for (int64_t k = 0; k < m; ++k) {
            work.beside[b].tile[k * work.rows_of_tile] = widen(work.beside[b].y[k * each]);
          }
        }
      });
      spread_all(work, work.block_slices(blocks), dense_phi.const_data_ptr<W>(), m, grid.pixels(), false, work.packed);
      unpack<T>(work.packed, grid, first, blocks, x.mutable_data_ptr<T>());
    });
  });
  return x;
}

// z, and in `residual`, unless null, Phi x - y.
Tensor step_of(const Tensor& x, const Tensor& y, const Tensor& phi, const Tensor& rho, int64_t block_size,
               const Tensor* residual) {
  const Grid grid = grid_of(x, block_size);
  check_step(x, y, phi, rho, grid);
  const int64_t m = phi.size(0), each = grid.per_sample();
  const Tensor dense_y = dense(y), dense_phi = dense(phi), dense_rho = dense(rho);
  const Tensor z = empty_beside(x, {grid.samples, 1, grid.height, grid.width}, x.scalar_type());
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    const W *const phis = dense_phi.const_data_ptr<W>(), *const ys = dense_y.const_data_ptr<W>();
    W* const kept = residual != nullptr ? residual->mutable_data_ptr<W>() : nullptr;
    for_each_batch<W, const W>(grid, m, [&](const auto& work, int64_t first, int64_t blocks) {
      pack<T>(x, grid, first, blocks, work.packed);
      locate<const W, W>(ys, dense_rho.const_data_ptr<W>(), rho.dim() == 1 ? 0 : 1, grid, work, first, blocks);
      measure_all(work, phis, blocks, [&](int64_t b, int64_t k, W value) LORUN_INLINE {
        const auto& at = work.beside[b];
        const W* const measured = at.y + k * each;
        if (kept != nullptr) {
          kept[measured - ys] = value - *measured;
        }
        at.tile[k * work.rows_of_tile] = at.rho * (*measured - value);
      });
      spread_all(work, work.block_slices(blocks), phis, m, grid.pixels(), true, work.packed);
      unpack<T>(work.packed, grid, first, blocks, z.mutable_data_ptr<T>());
    });
  });
  return z;
}

Tensor step(Tensor x, Tensor y, Tensor phi, Tensor rho, int64_t block_size) {
  return step_of(x, y, phi, rho, block_size, nullptr);
}

std::tuple<Tensor, Tensor> step_residual(Tensor x, Tensor y, Tensor phi, Tensor rho, int64_t block_size) {
  const Tensor residual = empty_residual(y);
  return {step_of(x, y, phi, rho, block_size, &residual), residual};
}

Tensor grad_phi(Tensor x, Tensor y, int64_t block_size) {
  const Grid grid = grid_of(x, block_size);
  check_measurements(x, y, grid);
  const int64_t m = y.size(1), each = grid.per_sample();
  const Tensor dense_y = dense(y);
  Tensor out = empty_beside(y, {m, grid.pixels()}, y.scalar_type());
  if (grid.blocks() == 0 || m == 0) {
    return torch::stable::zero_(out);
  }
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    // All threads share every batch: batches add onto the one result, in order.
    const int64_t fitting = kSumBytes / (grid.pixels() * static_cast<int64_t>(sizeof(W)));
    const Work<W, const W> work(grid, m, std::max<int64_t>(16, fitting / 8 * 8), threads());
    for (int64_t first = 0; first < grid.blocks(); first += work.batch) {
      const int64_t blocks = std::min(work.batch, grid.blocks() - first);
      pack<T>(x, grid, first, blocks, work.packed);
      locate<const W, W>(dense_y.const_data_ptr<W>(), nullptr, 0, grid, work, first, blocks);
      parallel(m, blocks, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          for (int64_t b = 0; b < blocks; ++b) {
            work.tiles[work.tile_index(k, blocks, b)] = work.beside[b].y[k * each];
          }
        }
      });
      spread_all(work, Slices(m, work.threads, work.rows_of_tile), work.packed, blocks, grid.pixels(), first > 0,
                 out.mutable_data_ptr<W>());
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("block_cs", TORCH_BOX(&forward));
  m.impl("block_cs_adjoint", TORCH_BOX(&adjoint));
  m.impl("block_cs_step", TORCH_BOX(&step));
  m.impl("block_cs_step_residual", TORCH_BOX(&step_residual));
  m.impl("block_cs_grad_phi", TORCH_BOX(&grad_phi));
}

}  // namespace lorun::block_cs
