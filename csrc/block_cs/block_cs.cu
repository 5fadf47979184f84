// Block compressive sensing on CUDA (formulas in block_cs.h).
//
// Forward and adjoint are one matrix product each, a step is two, one launch a product (product.cuh). A product reads
// its factors where they lie, blocks straight out of the image, and finishes each value itself: the first of a step
// writes r = rho (y - Phi x), the second z = x + Phi^T r.
//   fp64 images: ordinary multiply-adds.
//   fp32 images: tensor cores, as exact as ordinary multiply-adds (never TF32 alone). Factors enter as a sum of two
//   tf32 numbers, high + low; the three products of these that matter keep 21 bits of each product. Sums are left to
//   the tensor cores for 16 depths only. Emulated on a CPU, with sums cut off as tensor cores may, results 1024 deep
//   are 1.2e-7 to 2.1e-7 off (of the norm); ordinary multiply-adds were 1.7e-7 off, cuBLAS in fp32 5e-7. Where a
//   factor is infinite, the result is NaN.
//   bf16, fp16 images: tensor cores. fp32 factors enter as a sum of two bf16 numbers, high + low, and the three
//   products that matter are accumulated in fp32: about 16 bits of each factor, more than the result keeps. Between
//   the products r is kept as these two, as many bytes as one fp32 number, and so split only once.
//
// Tiles. 16 images of 256 x 256, B = 32, m = 256, are two products of 2^28 multiply-adds: 256 x 1024 results 1024
// deep, then 1024 x 1024 results 256 deep. An H200 has 132 multiprocessors at 1.85 GHz or so, each with four
// schedulers, which issue an instruction a cycle, and as many tensor cores: 256 multiply-adds of tf32 numbers a
// cycle, or 512 of bf16, of which mma.sync is said to reach about two thirds. From the L2 cache a multiprocessor has
// 64 bytes a cycle at most, nearer 30 if all ask at once, 0.7 us or more after asking: 80 KB must be on their way to
// it, which is what the ring of 96 KB is for. Eight warps, two a scheduler, take 16 depths of 32 x 32 sums or more
// at once: fewer values to split for each mma, and enough mma to hide the next values' way from shared memory. What
// a multiprocessor has to do, all of it overlapping; instructions are counted in the compiled loop, all times
// estimated:
//   First product, 128 tiles of 32 x 64; with so few results, the depth is shared out among a tile's warps.
//     fp32: 384 KB, 3.3 us or more. 16 pieces; for each a warp has 48 mma and 239 other instructions: 96 split its
//     32 values, 32 add up sums, some 80 copy. 5.0 us. 6144 mma, 3.3 us at the full rate and 5.0 at two thirds.
//     bf16: 256 KB, 2.2 us or more. 8 pieces, 32 mma and 181 others, 1.8 us. 2048 mma, 1.1 to 1.7 us.
//     fp16: the same bytes, 48 mma and 321 others, for images are split as well: 3.2 us.
//   Second product, of a step.
//     fp32: 128 tiles of 64 x 128. 192 KB, 1.7 us or more. 8 pieces, 96 mma and 400 others, 4.3 us. mma 3.3 to 5 us.
//     bf16: 128 tiles of 128 x 64. 192 KB, 1.7 us or more. 8 pieces, 48 mma and 220 others, 2.3 us. mma 1.7 to 2.5.
// To each comes a launch, a first wait for memory and the ending, some 3 us. Both together: 16 to 20 us in fp32, 11
// to 14 in bf16, by estimate. Measured: 33 and 23 us; the two kernels 15 and 18 (fp32), 8 and 15 (bf16), the products
// without a residual and an image to add 14 and 15, 8 and 11. cuBLAS's two products on blocks that lie ready take 38
// and 8.
//
// Where large tiles are too few (one 512 x 512 image: 32) there are small ones, which sum in the same order. Only a
// gradient for Phi, whose depth is the batch, shares it out among blocks as well; one more launch adds their parts.
//
// Every value is one sum in one order, whatever the batch: no atomics, bitwise repeatable.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "block_cs/block_cs.h"
#include "block_cs/checks.h"
#include "block_cs/product.cuh"
#include "common/cuda.cuh"
#include "common/divisor.cuh"
#include "common/tensor.h"

namespace lorun::block_cs {
namespace {

// Factors. Memory is lines of neighbouring values, their numbers and places 32-bit, as divisions are slow: line(l) and
// position(p) prepare what loads share, at(line, position) is an address, and inside(line, position) says whether there
// is a value; others are zeros. `whole`: 16 bytes from any multiple of that in a line are aligned, and lie together,
// inside or not.

// What lines without padding share: all of their places hold a value. At: a place in a line.
template <class T, class At>
struct Unpadded {
  using Value = T;
  using Line = const T*;
  using Place = At;

  __device__ static void keep(Line& line) {
    lorun::keep(line);
  }
  __device__ bool inside(Line, Place) const {
    return true;
  }
  __device__ const T* at(Line line, Place place) const {
    return line + place;
  }
};

template <class W>
struct PhiLines : Unpadded<W, int> {  // line: measurement, position: pixel
  using typename Unpadded<W, int>::Line;
  const W* data;
  int64_t pixels;
  bool whole;

  __device__ Line line(int k) const {
    return data + k * pixels;
  }
  __device__ int position(int p) const {
    return p;
  }
};

template <class T>
struct MeasurementLines : Unpadded<T, int64_t> {  // line: measurement, position: block; contiguous (N, m, rows, cols)
  using typename Unpadded<T, int64_t>::Line;
  const T* data;
  int64_t m;
  Divisor each;  // blocks of a sample
  bool whole;

  __device__ int64_t offset(int k) const {
    return static_cast<int64_t>(k) * each.value();
  }
  __device__ Line line(int k) const {
    return data + offset(k);
  }
  __device__ int64_t position(int b) const {
    const int sample = each.quotient(b);
    return sample * m * each.value() + (b - sample * each.value());
  }
};

template <class T>
struct ImageLines {  // line: block, position: pixel
  using Value = T;
  const T* data;
  int64_t by_sample;
  int by_row, by_col, height, width;
  Divisor block, each, cols;  // a block's side; blocks of a sample, of a row of these
  bool whole;

  // A block's first pixel: in which sample it is, its row and column there.
  struct Corner {
    int sample, top, left;
  };
  // A block: its first pixel, and how many of its rows and columns lie inside.
  struct Line {
    const T* first;
    int rows, cols;
  };
  // A pixel: its offset from the block's first one, its row and column.
  struct Place {
    int offset, i, j;
  };

  __device__ Corner corner(int b) const {
    const int sample = each.quotient(b), in_sample = b - sample * each.value(), row = cols.quotient(in_sample);
    return {sample, row * block.value(), (in_sample - row * cols.value()) * block.value()};
  }
  __device__ Line line(int b) const {
    const Corner at = corner(b);
    return {
        data + at.sample * by_sample + static_cast<int64_t>(at.top) * by_row + static_cast<int64_t>(at.left) * by_col,
        min(block.value(), height - at.top), min(block.value(), width - at.left)};
  }
  __device__ Place position(int p) const {
    const int i = block.quotient(p), j = p - i * block.value();
    return {i * by_row + j * by_col, i, j};
  }
  __device__ static void keep(Line& line) {
    lorun::keep(line.first);
  }
  __device__ bool inside(const Line& line, const Place& pixel) const {
    return pixel.i < line.rows && pixel.j < line.cols;
  }
  __device__ const T* at(const Line& line, const Place& pixel) const {
    return line.first + pixel.offset;
  }
};

// Endings. store(row(i), col(j), before, value) takes the finished element (i, j); before(row(i), col(j)) has loaded
// what it needs, as it lies in memory: converted beside its load, under a condition, each would wait for the one before
// (a bf16 step took 5 us more).

template <class T>
struct StoreMeasurement {  // rows: measurements, columns: blocks
  using Row = int64_t;
  using Before = Nothing;
  MeasurementLines<T> y;
  T* out;

  __device__ Row row(int64_t k) const {
    return y.offset(static_cast<int>(k));
  }
  __device__ int64_t col(int b) const {
    return y.position(b);
  }
  __device__ Before before(Row, int64_t) const {
    return {};
  }
  __device__ void store(Row row, int64_t col, Before, Wide<T> value) const {
    out[row + col] = static_cast<T>(value);
  }
};

// A residual between two products, as the second wants it: Split where that runs on tensor cores.
template <class T>
using Between = std::conditional_t<sizeof(T) == 2, Split, T>;

template <class T>
struct StoreResidual {  // rows: measurements, columns: blocks; r = rho (y - value), kept = value - y unless null
  using W = Wide<T>;
  using Row = int64_t;
  using Before = W;
  MeasurementLines<W> y;
  const W* rho;
  int64_t rho_by_sample;
  Between<T>* r;
  W* kept;

  struct Column {
    int64_t offset;
    W rho;
  };
  __device__ Row row(int64_t k) const {
    return y.offset(static_cast<int>(k));
  }
  __device__ Column col(int b) const {
    return {y.position(b), rho[y.each.quotient(b) * rho_by_sample]};
  }
  __device__ W before(Row row, const Column& col) const {
    return y.data[row + col.offset];
  }
  __device__ void store(Row row, const Column& col, W measured, W value) const {
    const int64_t i = row + col.offset;
    const W scaled = col.rho * (measured - value);
    if constexpr (sizeof(T) == 2) {
      const SplitPair parts = split(scaled, 0);
      r[i] = {static_cast<uint16_t>(parts.high), static_cast<uint16_t>(parts.low)};
    } else {
      r[i] = scaled;
    }
    if (kept != nullptr) {
      kept[i] = value - measured;
    }
  }
};

template <class T, bool Add>
struct StoreImage {  // rows: blocks, columns: pixels; out = value, or x + value; out is contiguous
  using Lines = ImageLines<T>;
  using Before = std::conditional_t<Add, T, Nothing>;
  struct Row {
    typename Lines::Line from;
    T* to;
  };
  struct Column {
    typename Lines::Place from;
    int to;
  };
  Lines x;
  T* out;

  __device__ Row row(int64_t b) const {
    const auto at = x.corner(static_cast<int>(b));
    const int64_t line = static_cast<int64_t>(at.sample) * x.height + at.top;
    return {x.line(static_cast<int>(b)), out + line * x.width + at.left};
  }
  __device__ Column col(int p) const {
    const auto at = x.position(p);
    return {at, at.i * x.width + at.j};
  }
  __device__ Before before(const Row& row, const Column& col) const {
    if constexpr (Add) {
      return x.inside(row.from, col.from) ? *x.at(row.from, col.from) : Before{};
    } else {
      return {};
    }
  }
  __device__ void store(const Row& row, const Column& col, Before before, Wide<T> value) const {
    if (x.inside(row.from, col.from)) {
      if constexpr (Add) {
        value += static_cast<Wide<T>>(before);
      }
      row.to[col.to] = static_cast<T>(value);
    }
  }
};

template <class W>
struct StoreMatrix {
  using Row = int64_t;
  using Before = Nothing;
  W* out;
  int64_t cols;

  __device__ Row row(int64_t i) const {
    return i * cols;
  }
  __device__ int col(int j) const {
    return j;
  }
  __device__ Before before(Row, int) const {
    return {};
  }
  __device__ void store(Row row, int col, Before, W value) const {
    out[row + col] = value;
  }
};

template <class W>
__global__ void __launch_bounds__(kThreads) add_parts(const W* sums, W* out, int64_t parts, int64_t values) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < values) {
    W sum = 0;
    for (int64_t part = 0; part < parts; ++part) {
      sum += sums[part * values + i];
    }
    out[i] = sum;
  }
}

// Engines for an image stored as T, with large tiles or small ones, which sum in the same order: Deep where the depth
// is long and results are few, Flat the other way round.
template <class T, class Double, class Float, class Half>
using OneFor = std::conditional_t<std::is_same_v<T, double>, Double, std::conditional_t<sizeof(T) == 2, Half, Float>>;
template <class T, bool Large>
using Deep = OneFor<T, Simt<double, 4, 1, 1, 8, 64>, TensorCores<AsTf32, Large ? 32 : 16, Large ? 32 : 16, 1, 2, 4, 64>,
                    TensorCores<AsBf16, Large ? 32 : 16, 64, 1, 1, 8, 128>>;
template <class T, bool Large>
using Flat = OneFor<T, Simt<double, 4, 2, 2, 2, 32>, TensorCores<AsTf32, Large ? 32 : 16, Large ? 32 : 16, 2, 4, 1, 32>,
                    TensorCores<AsBf16, Large ? 64 : 32, Large ? 32 : 16, 2, 2, 2, 32>>;

template <class Engine>
int64_t tiles_of(int64_t rows, int64_t cols) {
  return (rows + Engine::kRows - 1) / Engine::kRows * ((cols + Engine::kCols - 1) / Engine::kCols);
}

// What a product takes, in no unit: rounds of tiles, each as long as its arithmetic and, times 32, its reading.
template <class Engine>
int64_t time_of(const OnDeviceOf& device, int64_t rows, int64_t cols) {
  const int64_t at_once = device.multiprocessors();
  return (tiles_of<Engine>(rows, cols) + at_once - 1) / at_once *
         (Engine::kRows * Engine::kCols + 32 * (Engine::kRows + Engine::kCols));
}

// Calls f(TypeTag<Engine>) for the engine that takes a product of this size, on this device, least time.
template <template <class, bool> class EngineFor, class T, class F>
void with_engine(const OnDeviceOf& device, int64_t rows, int64_t cols, const F& f) {
  using Large = EngineFor<T, true>;
  using Small = EngineFor<T, false>;
  if constexpr (!std::is_same_v<Large, Small>) {
    if (time_of<Small>(device, rows, cols) < time_of<Large>(device, rows, cols)) {
      f(TypeTag<Small>{});
      return;
    }
  }
  f(TypeTag<Large>{});
}

// How a product's depth is cut, for blocks of their own to sum.
struct Cut {
  int64_t parts, span;
};

template <class Engine, Lines LinesA, Lines LinesB, class A, class B, class End>
void launch_product(const OnDeviceOf& device, const A& a, const B& b, const End& end, int64_t rows, int64_t cols,
                    int64_t depth, const Cut& cut) {
  const int64_t tiles = tiles_of<Engine>(rows, cols);
  if (tiles > 0) {
    launch(device, &product<Engine, LinesA, LinesB, A, B, End>, tiles * cut.parts, kThreads,
           Plan<Engine, LinesA, LinesB, A, B>::kBytes, a, b, end, static_cast<int>(rows), static_cast<int>(cols),
           static_cast<int>(depth), static_cast<int>(cut.parts), static_cast<int>(cut.span));
  }
}

bool whole(const void* data, std::initializer_list<int64_t> steps, int64_t size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         std::all_of(steps.begin(), steps.end(), [&](int64_t step) { return step * size % 16 == 0; });
}

template <class W>
PhiLines<W> lines_of_phi(const Tensor& phi) {
  const W* data = phi.const_data_ptr<W>();
  return {{}, data, phi.size(1), whole(data, {phi.size(1)}, sizeof(W))};
}

template <class T>
MeasurementLines<T> lines_of_measurements(const Tensor& y, const Grid& grid) {
  const T* data = static_cast<const T*>(y.const_data_ptr());
  return {{}, data, y.size(1), Divisor(grid.per_sample()), whole(data, {grid.per_sample()}, sizeof(T))};
}

template <class T>
ImageLines<T> lines_of_image(const Tensor& x, const Grid& grid) {
  const T* data = x.const_data_ptr<T>();
  const int64_t by_sample = x.size(0) > 1 ? x.stride(0) : 0, by_row = x.size(2) > 1 ? x.stride(2) : 0;
  const int64_t by_col = x.size(3) > 1 ? x.stride(3) : 1;
  return {data,
          by_sample,
          static_cast<int>(by_row),
          static_cast<int>(by_col),
          static_cast<int>(grid.height),
          static_cast<int>(grid.width),
          Divisor(grid.block),
          Divisor(grid.per_sample()),
          Divisor(grid.cols),
          by_col == 1 && whole(data, {by_sample, by_row, grid.block, grid.width}, sizeof(T))};
}

// Lines and places in them are counted in 32 bits, with room for what tiles reach beyond.
constexpr int64_t kMost = 1 << 30;

void check_counts(const Grid& grid, int64_t m) {
  STD_TORCH_CHECK(grid.block <= 1 << 15, "block_size: expected at most 32768 on CUDA, got ", grid.block);
  STD_TORCH_CHECK(std::max({grid.blocks(), grid.height, grid.width * grid.block, m}) <= kMost,
                  "expected at most 2^30 blocks, measurements, rows, and pixels in a row of blocks on CUDA");
}

// The image, or a dense copy where a block's pixels lie further apart than that.
Tensor within_reach(const Tensor& x, int64_t block_size) {
  return (x.stride(2) + x.stride(3)) * block_size <= kMost ? x : torch::stable::contiguous(x);
}

template <class T, class End>
void measure(const OnDeviceOf& device, const Tensor& x, const Tensor& phi, const Grid& grid, const End& end) {
  const int64_t m = phi.size(0), depth = grid.pixels();
  with_engine<Deep, T>(device, m, grid.blocks(), [&](auto tag) {
    using Engine = typename decltype(tag)::type;
    launch_product<Engine, Lines::kOuter, Lines::kOuter>(device, lines_of_phi<Wide<T>>(phi), lines_of_image<T>(x, grid),
                                                         end, m, grid.blocks(), depth, {1, depth});
  });
}

// Y is what y holds.
template <class T, class Y, class End>
void project(const OnDeviceOf& device, const Tensor& y, const Tensor& phi, const Grid& grid, const End& end) {
  const int64_t m = phi.size(0);
  with_engine<Flat, T>(device, grid.blocks(), grid.pixels(), [&](auto tag) {
    using Engine = typename decltype(tag)::type;
    launch_product<Engine, Lines::kDepth, Lines::kDepth>(device, lines_of_measurements<Y>(y, grid),
                                                         lines_of_phi<Wide<T>>(phi), end, grid.blocks(), grid.pixels(),
                                                         m, {1, m});
  });
}

Tensor forward(Tensor x, Tensor phi, int64_t block_size) {
  const Grid grid = grid_of(x, block_size);
  check_phi(phi, grid, x.scalar_type());
  check_counts(grid, phi.size(0));
  const OnDeviceOf device(x);
  const Tensor image = within_reach(x, block_size), dense_phi = dense(phi);
  const Tensor y = empty_beside(x, {grid.samples, phi.size(0), grid.rows, grid.cols}, x.scalar_type());
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    measure<T>(device, image, dense_phi, grid,
               StoreMeasurement<T>{lines_of_measurements<T>(y, grid), y.mutable_data_ptr<T>()});
  });
  return y;
}

Tensor adjoint(Tensor y, Tensor phi, int64_t block_size, int64_t height, int64_t width) {
  const Grid grid = grid_of_measurements(y, block_size, height, width);
  check_phi(phi, grid, y.scalar_type());
  check_shape("y", y, {grid.samples, phi.size(0), grid.rows, grid.cols});
  check_counts(grid, phi.size(0));
  const OnDeviceOf device(y);
  const Tensor dense_y = dense(y), dense_phi = dense(phi);
  const Tensor x = empty_beside(y, {grid.samples, 1, height, width}, y.scalar_type());
  dispatch_storage(y.scalar_type(), "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    project<T, T>(device, dense_y, dense_phi, grid,
                  StoreImage<T, false>{lines_of_image<T>(x, grid), x.mutable_data_ptr<T>()});
  });
  return x;
}

// z, and in `kept`, unless null, Phi x - y.
Tensor step_of(const Tensor& x, const Tensor& y, const Tensor& phi, const Tensor& rho, int64_t block_size,
               const Tensor* kept) {
  const Grid grid = grid_of(x, block_size);
  check_step(x, y, phi, rho, grid);
  check_counts(grid, phi.size(0));
  const OnDeviceOf device(x);
  const Tensor image = within_reach(x, block_size);
  const Tensor dense_y = dense(y), dense_phi = dense(phi), dense_rho = dense(rho);
  const Tensor z = empty_beside(x, {grid.samples, 1, grid.height, grid.width}, x.scalar_type());
  const Tensor residual = empty_residual(y);
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    measure<T>(device, image, dense_phi, grid,
               StoreResidual<T>{lines_of_measurements<W>(dense_y, grid), dense_rho.const_data_ptr<W>(),
                                rho.dim() == 1 ? 0 : 1, static_cast<Between<T>*>(residual.mutable_data_ptr()),
                                kept != nullptr ? kept->mutable_data_ptr<W>() : nullptr});
    project<T, Between<T>>(device, residual, dense_phi, grid,
                           StoreImage<T, true>{lines_of_image<T>(image, grid), z.mutable_data_ptr<T>()});
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

// Where too few tiles would leave the device idle, several blocks to each, with four steps or more of the depth.
template <class Engine>
Cut cut_of(const OnDeviceOf& device, int64_t rows, int64_t cols, int64_t depth) {
  constexpr int64_t kFewestSteps = 4;
  const int64_t steps = (depth + Engine::kDepth - 1) / Engine::kDepth, tiles = tiles_of<Engine>(rows, cols);
  const int64_t wish = std::min(2 * device.multiprocessors() / std::max<int64_t>(tiles, 1), steps / kFewestSteps);
  if (wish <= 1) {
    return {1, depth};
  }
  const int64_t span = (steps + wish - 1) / wish * Engine::kDepth;
  return {(depth + span - 1) / span, span};
}

Tensor grad_phi(Tensor x, Tensor y, int64_t block_size) {
  const Grid grid = grid_of(x, block_size);
  check_measurements(x, y, grid);
  const int64_t m = y.size(1), pixels = grid.pixels();
  check_counts(grid, m);
  const OnDeviceOf device(x);
  const Tensor image = within_reach(x, block_size), dense_y = dense(y);
  const Tensor out = empty_beside(y, {m, pixels}, y.scalar_type());
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    with_engine<Deep, T>(device, m, pixels, [&](auto chosen) {
      using Engine = typename decltype(chosen)::type;
      const Cut cut = cut_of<Engine>(device, m, pixels, grid.blocks());
      const Tensor sums = cut.parts > 1 ? empty_beside(y, {cut.parts, m, pixels}, y.scalar_type()) : out;
      launch_product<Engine, Lines::kOuter, Lines::kDepth>(
          device, lines_of_measurements<W>(dense_y, grid), lines_of_image<T>(image, grid),
          StoreMatrix<W>{sums.mutable_data_ptr<W>(), pixels}, m, pixels, grid.blocks(), cut);
      if (cut.parts > 1) {
        launch(device, &add_parts<W>, (m * pixels + kThreads - 1) / kThreads, kThreads, 0, sums.const_data_ptr<W>(),
               out.mutable_data_ptr<W>(), cut.parts, m * pixels);
      }
    });
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
