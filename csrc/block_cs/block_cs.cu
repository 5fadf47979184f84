// Block compressive sensing on CUDA (formulas in block_cs.h).
//
// Forward and adjoint are one matrix product each, a step is two, one launch a product. A product reads its factors
// where they lie, blocks straight out of the image, and finishes each value in registers: the first of a step writes
// r = rho (y - Phi x), the second z = x + Phi^T r.
//   fp32, fp64 images: ordinary multiply-adds (no TF32).
//   bf16, fp16 images: tensor cores. fp32 factors enter as a sum of two bf16 numbers, high + low, and the three
//   products that matter are accumulated in fp32: about 16 bits of each factor, more than the result keeps.
// Too few tiles to occupy the device (one 512 x 512 image has 16 in its first product) share out the sums instead: each
// part of the depth goes to a block of its own, and one more launch adds the parts and finishes.
// Every value is one sum in one order: no atomics, bitwise repeatable.

#include <cuda_bf16.h>
#include <mma.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "block_cs/block_cs.h"
#include "block_cs/checks.h"
#include "common/cuda.cuh"
#include "common/load4.cuh"
#include "common/tensor.h"

namespace lorun::block_cs {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;  // rows and columns of a thread block's part of the result
constexpr int kSimtDepth = 16;
constexpr int kTensorDepth = 32;

// Factors. A factor is a matrix over (outer, depth): line(outer) and place(depth) prepare what loads share, load(line,
// place) reads. kDepthFastest says which index runs over neighbouring addresses; kExact, that values fit bf16.

template <class W>
struct PhiRows {  // outer: measurement, depth: pixel
  static constexpr bool kDepthFastest = true, kExact = false;
  const W* phi;
  int64_t pixels;
  using Line = const W*;
  __device__ Line line(int64_t k) const {
    return phi + k * pixels;
  }
  __device__ int64_t place(int64_t p) const {
    return p;
  }
  __device__ W load(Line at, int64_t p) const {
    return at[p];
  }
};

template <class W>
struct PhiColumns {  // outer: pixel, depth: measurement
  static constexpr bool kDepthFastest = false, kExact = false;
  const W* phi;
  int64_t pixels;
  using Line = const W*;
  __device__ Line line(int64_t p) const {
    return phi + p;
  }
  __device__ int64_t place(int64_t k) const {
    return k * pixels;
  }
  __device__ W load(Line at, int64_t offset) const {
    return at[offset];
  }
};

// A block in an image: the offset of its first pixel, and how many of its rows and columns lie inside.
struct Corner {
  int64_t offset;
  int rows, cols;
};

// A pixel of a block: its offset from the first one, its row and column.
struct Pixel {
  int64_t offset;
  int i, j;
};

template <class T>
struct Image {
  const T* data;
  int64_t by_sample, by_row, by_col;
  Grid grid;

  __device__ Corner corner(int64_t b) const {
    const Place place = grid.place(b);
    return {place.sample * by_sample + place.top * by_row + place.left * by_col,
            static_cast<int>(min(grid.block, grid.height - place.top)),
            static_cast<int>(min(grid.block, grid.width - place.left))};
  }

  __device__ Pixel pixel(int64_t p) const {
    // 32-bit on purpose: a 64-bit division in the loop costs registers to the point of spilling.
    const int i = static_cast<int>(p) / static_cast<int>(grid.block),
              j = static_cast<int>(p) % static_cast<int>(grid.block);
    return {i * by_row + j * by_col, i, j};
  }

  __device__ Wide<T> at(const Corner& corner, const Pixel& pixel) const {
    if (pixel.i >= corner.rows || pixel.j >= corner.cols) {
      return 0;
    }
    return static_cast<Wide<T>>(data[corner.offset + pixel.offset]);
  }
};

template <class T>
struct ImageBlocks : Image<T> {  // outer: block, depth: pixel
  static constexpr bool kDepthFastest = true, kExact = std::is_same_v<T, BFloat16>;
  using Line = Corner;
  __device__ Line line(int64_t b) const {
    return this->corner(b);
  }
  __device__ Pixel place(int64_t p) const {
    return this->pixel(p);
  }
  __device__ Wide<T> load(const Line& corner, const Pixel& pixel) const {
    return this->at(corner, pixel);
  }
};

template <class T>
struct ImagePixels : Image<T> {  // outer: pixel, depth: block
  static constexpr bool kDepthFastest = false, kExact = std::is_same_v<T, BFloat16>;
  using Line = Pixel;
  __device__ Line line(int64_t p) const {
    return this->pixel(p);
  }
  __device__ Corner place(int64_t b) const {
    return this->corner(b);
  }
  __device__ Wide<T> load(const Line& pixel, const Corner& corner) const {
    return this->at(corner, pixel);
  }
};

// Contiguous (N, m, rows, cols): where block b's values start, `each` apart.
LORUN_HD int64_t measurement_offset(int64_t b, int64_t m, int64_t each) {
  return b / each * m * each + b % each;
}

template <class T>
struct MeasurementBlocks {  // outer: block, depth: measurement
  static constexpr bool kDepthFastest = false, kExact = std::is_same_v<T, BFloat16>;
  const T* y;
  int64_t m, each;
  using Line = const T*;
  __device__ Line line(int64_t b) const {
    return y + measurement_offset(b, m, each);
  }
  __device__ int64_t place(int64_t k) const {
    return k * each;
  }
  __device__ Wide<T> load(Line at, int64_t offset) const {
    return static_cast<Wide<T>>(at[offset]);
  }
};

template <class T>
struct MeasurementRows {  // outer: measurement, depth: block
  static constexpr bool kDepthFastest = true, kExact = std::is_same_v<T, BFloat16>;
  const T* y;
  int64_t m, each;
  using Line = const T*;
  __device__ Line line(int64_t k) const {
    return y + k * each;
  }
  __device__ int64_t place(int64_t b) const {
    return measurement_offset(b, m, each);
  }
  __device__ Wide<T> load(Line at, int64_t offset) const {
    return static_cast<Wide<T>>(at[offset]);
  }
};

// Endings: store(row(i), col(j), value) takes the finished element (i, j).

template <class T>
struct StoreMeasurement {  // rows: measurements, columns: blocks
  T* y;
  int64_t m, each;
  __device__ int64_t row(int64_t k) const {
    return k * each;
  }
  __device__ int64_t col(int64_t b) const {
    return measurement_offset(b, m, each);
  }
  __device__ void store(int64_t row, int64_t col, Wide<T> value) const {
    y[row + col] = static_cast<T>(value);
  }
};

template <class W>
struct StoreResidual {  // rows: measurements, columns: blocks; r = rho (y - value), kept = value - y unless null
  const W *y, *rho;
  W *r, *kept;
  int64_t m, each, rho_by_sample;
  struct Column {
    int64_t offset;
    W rho;
  };
  __device__ int64_t row(int64_t k) const {
    return k * each;
  }
  __device__ Column col(int64_t b) const {
    return {measurement_offset(b, m, each), rho[b / each * rho_by_sample]};
  }
  __device__ void store(int64_t row, const Column& col, W value) const {
    const int64_t i = row + col.offset;
    r[i] = col.rho * (y[i] - value);
    if (kept != nullptr) {
      kept[i] = value - y[i];
    }
  }
};

template <class T, bool Add>
struct StoreImage {  // rows: blocks, columns: pixels; out = value, or x + value; out is contiguous
  Image<T> x;
  T* out;
  struct Row {
    Corner from;
    int64_t to;
  };
  struct Pixel {
    int i, j;
  };
  __device__ Row row(int64_t b) const {
    const Place place = x.grid.place(b);
    return {x.corner(b), (place.sample * x.grid.height + place.top) * x.grid.width + place.left};
  }
  __device__ Pixel col(int64_t p) const {
    const int pixel = static_cast<int>(p), block = static_cast<int>(x.grid.block);
    return {pixel / block, pixel % block};
  }
  __device__ void store(const Row& row, const Pixel& at, Wide<T> value) const {
    if (at.i >= row.from.rows || at.j >= row.from.cols) {
      return;
    }
    if constexpr (Add) {
      value += static_cast<Wide<T>>(x.data[row.from.offset + at.i * x.by_row + at.j * x.by_col]);
    }
    out[row.to + at.i * x.grid.width + at.j] = static_cast<T>(value);
  }
};

template <class W>
struct StoreMatrix {
  W* out;
  int64_t cols;
  __device__ int64_t row(int64_t i) const {
    return i * cols;
  }
  __device__ int64_t col(int64_t j) const {
    return j;
  }
  __device__ void store(int64_t row, int64_t col, W value) const {
    out[row + col] = value;
  }
};

// One thread's share of a kTile x Depth piece of a factor: fetched into registers while the previous piece is in use.
template <class W, class Factor, int Depth>
struct Fetch {
  static constexpr int kEach = kTile * Depth / kThreads;
  // Lanes run over the index that is contiguous in memory; the other index is this thread's to step through.
  static constexpr bool kByDepth = Factor::kDepthFastest;
  static constexpr int kLanes = kByDepth ? Depth : kTile;
  static constexpr int kLines = kByDepth ? kEach : 1;

  typename Factor::Line lines[kLines];
  W values[kEach];
  const Factor& factor;
  const int64_t depth;
  const int valid;  // outer indices from `first` on that exist

  __device__ Fetch(const Factor& factor, int64_t first, int64_t outers, int64_t depth)
      : factor(factor), depth(depth), valid(static_cast<int>(min(outers - first, static_cast<int64_t>(kTile)))) {
#pragma unroll
    for (int q = 0; q < kLines; ++q) {
      lines[q] = factor.line(first + min(outer(q), valid - 1));
    }
  }

  __device__ static int outer(int q) {
    return kByDepth ? threadIdx.x / kLanes + q * (kThreads / kLanes) : threadIdx.x % kLanes;
  }

  __device__ static int within(int q) {
    return kByDepth ? threadIdx.x % kLanes : threadIdx.x / kLanes + q * (kThreads / kLanes);
  }

  __device__ void load(int64_t from) {
    [[maybe_unused]] const auto shared = factor.place(from + within(0));  // by all loads, if kByDepth
#pragma unroll
    for (int q = 0; q < kEach; ++q) {
      const bool inside = from + within(q) < depth && outer(q) < valid;
      if constexpr (kByDepth) {
        values[q] = inside ? factor.load(lines[q], shared) : W(0);
      } else {
        values[q] = inside ? factor.load(lines[0], factor.place(from + within(q))) : W(0);
      }
    }
  }
};

// Which blocks take what: `parts` of them share a tile, each `span` of the depth. With more than one, `sums` takes
// theirs, (parts, rows, cols).
template <class W>
struct Split {
  int64_t parts, span;
  W* sums;
};

// A block's tile, its part of the depth, and where its values go.
template <class W>
struct Share {
  int64_t row0, col0, from, until, rows, cols;
  W* sums;

  __device__ Share(const Split<W>& split, int64_t rows, int64_t cols, int64_t depth)
      : from(blockIdx.x % split.parts * split.span),
        until(min(depth, from + split.span)),
        rows(rows),
        cols(cols),
        sums(split.parts > 1 ? split.sums + blockIdx.x % split.parts * rows * cols : nullptr) {
    const int64_t tile = blockIdx.x / split.parts, col_tiles = (cols + kTile - 1) / kTile;
    row0 = tile / col_tiles * kTile, col0 = tile % col_tiles * kTile;
  }

  template <class End, class Column>
  __device__ void store(const End& end, const Column& at, int64_t r, int64_t c, W value) const {
    if (sums != nullptr) {
      sums[r * cols + c] = value;
    } else {
      end.store(end.row(r), at, value);
    }
  }
};

template <class W, class End>
__global__ void __launch_bounds__(kThreads)
    add_parts(const W* sums, const End end, int64_t parts, int64_t rows, int64_t cols) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index < rows * cols) {
    W sum = 0;
    for (int64_t k = 0; k < parts; ++k) {
      sum += sums[k * rows * cols + index];
    }
    end.store(end.row(index / cols), end.col(index % cols), sum);
  }
}

template <class W, class A, class B, class End>
__global__ void __launch_bounds__(kThreads, sizeof(W) == 4 ? 2 : 1)
    simt_product(const A a, const B b, const End end, int64_t rows, int64_t cols, int64_t depth, const Split<W> split) {
  // Column c of b lies at c % 16 * 4 + c / 16, so that a thread's columns are neighbours.
  __shared__ __align__(16) W a_tile[kSimtDepth][kTile + 4];
  __shared__ __align__(16) W b_tile[kSimtDepth][kTile + 4];
  const Share<W> share(split, rows, cols, depth);
  // 4 x 4 values a thread: neighbouring rows, and columns 16 apart so that neighbouring threads store side by side.
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  W acc[4][4] = {};
  Fetch<W, A, kSimtDepth> fetch_a(a, share.row0, rows, share.until);
  Fetch<W, B, kSimtDepth> fetch_b(b, share.col0, cols, share.until);
  fetch_a.load(share.from);
  fetch_b.load(share.from);
  for (int64_t k0 = share.from; k0 < share.until; k0 += kSimtDepth) {
#pragma unroll
    for (int q = 0; q < fetch_a.kEach; ++q) {
      const int column = fetch_b.outer(q);
      a_tile[fetch_a.within(q)][fetch_a.outer(q)] = fetch_a.values[q];
      b_tile[fetch_b.within(q)][column % 16 * 4 + column / 16] = fetch_b.values[q];
    }
    __syncthreads();
    if (k0 + kSimtDepth < share.until) {
      fetch_a.load(k0 + kSimtDepth);
      fetch_b.load(k0 + kSimtDepth);
    }
#pragma unroll
    for (int k = 0; k < kSimtDepth; ++k) {
      W left[4], right[4];
      load4(&a_tile[k][ty * 4], left);
      load4(&b_tile[k][tx * 4], right);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          acc[i][j] += left[i] * right[j];
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t c = share.col0 + tx + j * 16;
    if (c < cols) {
      const auto at = end.col(c);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t r = share.row0 + ty * 4 + i;
        if (r < rows) {
          share.store(end, at, r, c, acc[i][j]);
        }
      }
    }
  }
}

__device__ inline __nv_bfloat16 high_part(float v) {
  return __float2bfloat16_rn(v);
}

__device__ inline __nv_bfloat16 low_part(float v) {
  return __float2bfloat16_rn(v - __bfloat162float(__float2bfloat16_rn(v)));
}

template <class A, class B, class End>
__global__ void __launch_bounds__(kThreads, 1) tensor_product(const A a, const B b, const End end, int64_t rows,
                                                              int64_t cols, int64_t depth, const Split<float> split) {
  using namespace nvcuda;
  constexpr int kStride = kTensorDepth + 8;  // keeps 16-byte rows off each other's banks
  constexpr int kOutStride = kTile + 4;
  // Fragments are loaded from multiples of 32 bytes.
  struct Factors {
    alignas(32) __nv_bfloat16 a_high[kTile][kStride];
    alignas(32) __nv_bfloat16 b_high[kTile][kStride];
    alignas(32) __nv_bfloat16 a_low[A::kExact ? 1 : kTile][kStride];
    alignas(32) __nv_bfloat16 b_low[B::kExact ? 1 : kTile][kStride];
  };
  union Shared {
    Factors factors;
    float out[kTile][kOutStride];
  };
  __shared__ __align__(128) char memory[sizeof(Shared)];
  Factors& f = reinterpret_cast<Shared*>(memory)->factors;
  float (*out)[kOutStride] = reinterpret_cast<Shared*>(memory)->out;

  const Share<float> share(split, rows, cols, depth);
  // Eight warps, four by two: 16 rows and 32 columns each.
  const int warp = threadIdx.x / 32, warp_row = warp / 2 * 16, warp_col = warp % 2 * 32;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> acc[2];
  wmma::fill_fragment(acc[0], 0.0f);
  wmma::fill_fragment(acc[1], 0.0f);
  Fetch<float, A, kTensorDepth> fetch_a(a, share.row0, rows, share.until);
  Fetch<float, B, kTensorDepth> fetch_b(b, share.col0, cols, share.until);
  fetch_a.load(share.from);
  fetch_b.load(share.from);
  for (int64_t k0 = share.from; k0 < share.until; k0 += kTensorDepth) {
#pragma unroll
    for (int q = 0; q < fetch_a.kEach; ++q) {
      const float left = fetch_a.values[q], right = fetch_b.values[q];
      f.a_high[fetch_a.outer(q)][fetch_a.within(q)] = high_part(left);
      f.b_high[fetch_b.outer(q)][fetch_b.within(q)] = high_part(right);
      if constexpr (!A::kExact) {
        f.a_low[fetch_a.outer(q)][fetch_a.within(q)] = low_part(left);
      }
      if constexpr (!B::kExact) {
        f.b_low[fetch_b.outer(q)][fetch_b.within(q)] = low_part(right);
      }
    }
    __syncthreads();
    if (k0 + kTensorDepth < share.until) {
      fetch_a.load(k0 + kTensorDepth);
      fetch_b.load(k0 + kTensorDepth);
    }
#pragma unroll
    for (int k = 0; k < kTensorDepth; k += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> a_high, a_low;
      wmma::load_matrix_sync(a_high, &f.a_high[warp_row][k], kStride);
      if constexpr (!A::kExact) {
        wmma::load_matrix_sync(a_low, &f.a_low[warp_row][k], kStride);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::col_major> b_part;
        const int c = warp_col + half * 16;
        if constexpr (!B::kExact) {
          wmma::load_matrix_sync(b_part, &f.b_low[c][k], kStride);
          wmma::mma_sync(acc[half], a_high, b_part, acc[half]);
        }
        wmma::load_matrix_sync(b_part, &f.b_high[c][k], kStride);
        if constexpr (!A::kExact) {
          wmma::mma_sync(acc[half], a_low, b_part, acc[half]);
        }
        wmma::mma_sync(acc[half], a_high, b_part, acc[half]);
      }
    }
    __syncthreads();
  }
  // The factors are done with: the same memory takes the result, which the threads then finish row by row.
  wmma::store_matrix_sync(&out[warp_row][warp_col], acc[0], kOutStride, wmma::mem_row_major);
  wmma::store_matrix_sync(&out[warp_row][warp_col + 16], acc[1], kOutStride, wmma::mem_row_major);
  __syncthreads();
  const int64_t c = share.col0 + threadIdx.x % kTile;
  if (c < cols) {
    const auto at = end.col(c);
    for (int r = threadIdx.x / kTile; r < kTile && share.row0 + r < rows; r += kThreads / kTile) {
      share.store(end, at, share.row0 + r, c, out[r][threadIdx.x % kTile]);
    }
  }
}

// C (rows, cols) = sum over depth of a(row, k) b(col, k), each element given to `end`. T is the image's storage type;
// work space is allocated beside `beside`.
template <class T, class A, class B, class End>
void product(const OnDeviceOf& device, const Tensor& beside, const A& a, const B& b, const End& end, int64_t rows,
             int64_t cols, int64_t depth) {
  using W = Wide<T>;
  constexpr bool kSimt = std::is_same_v<T, W>;
  constexpr int64_t kDepth = kSimt ? kSimtDepth : kTensorDepth, kFewestSteps = 4;
  const int64_t tiles = ((rows + kTile - 1) / kTile) * ((cols + kTile - 1) / kTile);
  if (tiles == 0) {
    return;
  }
  const int64_t steps = (depth + kDepth - 1) / kDepth;
  const int64_t wish = std::min(2 * device.multiprocessors() / tiles, steps / kFewestSteps);
  Split<W> split{1, std::max<int64_t>(depth, 1), nullptr};
  std::optional<Tensor> sums;
  if (wish > 1) {
    split.span = (steps + wish - 1) / wish * kDepth;
    split.parts = (depth + split.span - 1) / split.span;
    sums = empty_beside(beside, {split.parts, rows, cols}, wide_type(beside.scalar_type()));
    split.sums = sums->mutable_data_ptr<W>();
  }
  const int64_t blocks = tiles * split.parts;
  if constexpr (kSimt) {
    launch(device, &simt_product<W, A, B, End>, blocks, kThreads, 0, a, b, end, rows, cols, depth, split);
  } else {
    launch(device, &tensor_product<A, B, End>, blocks, kThreads, 0, a, b, end, rows, cols, depth, split);
  }
  if (split.parts > 1) {
    launch(device, &add_parts<W, End>, (rows * cols + kThreads - 1) / kThreads, kThreads, 0, split.sums, end,
           split.parts, rows, cols);
  }
}

template <class T>
Image<T> image_of(const Tensor& x, const Grid& grid) {
  STD_TORCH_CHECK(grid.block <= 46340, "block_size: expected at most 46340 on CUDA, got ", grid.block);
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(2), x.stride(3), grid};
}

Tensor forward(Tensor x, Tensor phi, int64_t block_size) {
  const Grid grid = grid_of(x, block_size);
  check_phi(phi, grid, x.scalar_type());
  const OnDeviceOf device(x);
  const int64_t m = phi.size(0);
  const Tensor dense_phi = dense(phi);
  const Tensor y = empty_beside(x, {grid.samples, m, grid.rows, grid.cols}, x.scalar_type());
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    product<T>(device, x, PhiRows<W>{dense_phi.const_data_ptr<W>(), grid.pixels()},
               ImageBlocks<T>{image_of<T>(x, grid)}, StoreMeasurement<T>{y.mutable_data_ptr<T>(), m, grid.per_sample()},
               m, grid.blocks(), grid.pixels());
  });
  return y;
}

Tensor adjoint(Tensor y, Tensor phi, int64_t block_size, int64_t height, int64_t width) {
  const Grid grid = grid_of_measurements(y, block_size, height, width);
  check_phi(phi, grid, y.scalar_type());
  const int64_t m = phi.size(0);
  check_shape("y", y, {grid.samples, m, grid.rows, grid.cols});
  const OnDeviceOf device(y);
  const Tensor dense_y = dense(y), dense_phi = dense(phi);
  const Tensor x = empty_beside(y, {grid.samples, 1, height, width}, y.scalar_type());
  dispatch_storage(y.scalar_type(), "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    product<T>(device, y, MeasurementBlocks<T>{dense_y.const_data_ptr<T>(), m, grid.per_sample()},
               PhiColumns<W>{dense_phi.const_data_ptr<W>(), grid.pixels()},
               StoreImage<T, false>{image_of<T>(x, grid), x.mutable_data_ptr<T>()}, grid.blocks(), grid.pixels(), m);
  });
  return x;
}

// z, and in `kept`, unless null, Phi x - y.
Tensor step_of(const Tensor& x, const Tensor& y, const Tensor& phi, const Tensor& rho, int64_t block_size,
               const Tensor* kept) {
  const Grid grid = grid_of(x, block_size);
  check_step(x, y, phi, rho, grid);
  const int64_t m = phi.size(0), each = grid.per_sample();
  const OnDeviceOf device(x);
  const Tensor dense_y = dense(y), dense_phi = dense(phi), dense_rho = dense(rho);
  const Tensor z = empty_beside(x, {grid.samples, 1, grid.height, grid.width}, x.scalar_type());
  const Tensor residual = empty_beside(y, {grid.samples, m, grid.rows, grid.cols}, y.scalar_type());
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    const W* phis = dense_phi.const_data_ptr<W>();
    product<T>(
        device, x, PhiRows<W>{phis, grid.pixels()}, ImageBlocks<T>{image_of<T>(x, grid)},
        StoreResidual<W>{dense_y.const_data_ptr<W>(), dense_rho.const_data_ptr<W>(), residual.mutable_data_ptr<W>(),
                         kept != nullptr ? kept->mutable_data_ptr<W>() : nullptr, m, each, rho.dim() == 1 ? 0 : 1},
        m, grid.blocks(), grid.pixels());
    product<T>(device, x, MeasurementBlocks<W>{residual.const_data_ptr<W>(), m, each},
               PhiColumns<W>{phis, grid.pixels()}, StoreImage<T, true>{image_of<T>(x, grid), z.mutable_data_ptr<T>()},
               grid.blocks(), grid.pixels(), m);
  });
  return z;
}

Tensor step(Tensor x, Tensor y, Tensor phi, Tensor rho, int64_t block_size) {
  return step_of(x, y, phi, rho, block_size, nullptr);
}

std::tuple<Tensor, Tensor> step_residual(Tensor x, Tensor y, Tensor phi, Tensor rho, int64_t block_size) {
  const OnDeviceOf device(x);
  const Tensor residual = empty_residual(y);
  return {step_of(x, y, phi, rho, block_size, &residual), residual};
}

Tensor grad_phi(Tensor x, Tensor y, int64_t block_size) {
  const Grid grid = grid_of(x, block_size);
  check_measurements(x, y, grid);
  const int64_t m = y.size(1);
  const OnDeviceOf device(x);
  const Tensor dense_y = dense(y);
  const Tensor out = empty_beside(y, {m, grid.pixels()}, y.scalar_type());
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    product<T>(device, x, MeasurementRows<W>{dense_y.const_data_ptr<W>(), m, grid.per_sample()},
               ImagePixels<T>{image_of<T>(x, grid)}, StoreMatrix<W>{out.mutable_data_ptr<W>(), grid.pixels()}, m,
               grid.pixels(), grid.blocks());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CUDA, m) {
  m.impl("block_cs", TORCH_BOX(&forward));
  m.impl("block_cs_adjoint", TORCH_BOX(&adjoint));
  m.impl("block_cs_step", TORCH_BOX(&step));
  m.impl("block_cs_step_residual", TORCH_BOX(&step_residual));
  m.impl("block_cs_grad_phi", TORCH_BOX(&grad_phi));
}

}  // namespace lorun::block_cs
