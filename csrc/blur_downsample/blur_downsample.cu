// Blur and downsample on CUDA, as direct sums (formulas in blur_downsample.h).
//
// Each direction is a set of unit-stride correlations, one per pair of phases: out[i][j] += sum w[t][u] in[i+t][j+u].
// So is the kernel's gradient, with the measurement in place of w. A block of threads takes a tile of out. For each
// correlation, or as many of its taps as fit, it copies what it needs of `in` into shared memory, phase taken out and
// periods wrapped, and w beside it. A thread sums eight neighbours of a row: of four values that it reads, each meets
// four taps and eight sums, 32 multiply-adds for two 16-byte loads. Lines keep their odd quads behind the even ones:
// threads that lie eight columns apart then read neighbouring quads, from different banks.
//
// A step is two launches, with the residual between them; a small A x takes one more, phases apart. Accumulation is
// fp32 (fp64 for fp64 images), in one order: no atomics, bitwise repeatable.
//
// Kernels count in 32 bits: with 64, what leads to a phase's sums (which pixels, where they lie) was some two fifths of
// all instructions of 25 x 25 taps at x3, counted in the compiled code.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "blur_downsample/blur_downsample.h"
#include "blur_downsample/checks.h"
#include "common/cuda.cuh"
#include "common/load4.cuh"
#include "common/tensor.h"

namespace lorun::blur_downsample {
namespace {

constexpr int kEach = 8;  // sums of a thread
constexpr int kMostLanes = 8;
constexpr int kMostThreads = 256;
constexpr int kMostRows = 32;
constexpr int kTapColumns = 72;  // taps across that are in shared memory at once
constexpr int64_t kSharedBytes = 44 << 10;
constexpr int64_t kParts = 64, kSampleParts = 16;  // partial sums of a kernel's gradient

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

using Axis32 = AxisOf<int>;
using Shape32 = ShapeOf<int>;

// A tile of sums, `rows` by `lanes` * kEach, and how many taps, `tap_rows` by `tap_cols`, meet it at once.
struct Tile {
  int lanes, rows, tap_rows, tap_cols;
  int down, across;  // tiles of a plane

  LORUN_HD int cols() const {
    return lanes * kEach;
  }

  LORUN_HD int line() const {  // values, whole pairs of quads; a thread reads up to three values too many
    return (cols() + tap_cols + 3 + 7) / 8 * 8;
  }

  LORUN_HD int lines() const {
    return rows + tap_rows - 1;
  }

  LORUN_HD int weight_line() const {
    return (tap_cols + 3) / 4 * 4;
  }

  // Values of `in`, of w, and where rows and columns lie.
  template <class W>
  int64_t bytes() const {
    return (lines() * line() + tap_rows * weight_line()) * sizeof(W) + (lines() + line()) * sizeof(int64_t);
  }

  int64_t threads() const {
    return ceil_div(rows * lanes, 32) * 32;
  }

  // For `planes` planes of rows x cols sums, each of taps_down x taps_across terms.
  template <class W>
  static Tile of(int64_t planes, int64_t all_rows, int64_t all_cols, int64_t taps_down, int64_t taps_across,
                 int64_t blocks) {
    Tile t{};
    t.across = static_cast<int>(ceil_div(all_cols, kMostLanes * kEach));
    t.lanes = static_cast<int>(ceil_div(ceil_div(all_cols, t.across), kEach));
    // Smaller tiles where there would be too few to occupy the device.
    const auto cut = [&](int rows) {
      t.down = static_cast<int>(ceil_div(all_rows, rows));
      t.rows = static_cast<int>(ceil_div(all_rows, t.down));
    };
    for (int rows = kMostRows; cut(rows), rows > 4 && planes * t.across * t.down < blocks; rows /= 2) {
    }
    t.tap_cols = static_cast<int>(std::min<int64_t>(taps_across, kTapColumns));
    t.tap_rows = static_cast<int>(taps_down);
    while (t.tap_rows > 1 && t.bytes<W>() > kSharedBytes) {
      --t.tap_rows;
    }
    return t;
  }
};

// What a block holds in shared memory.
template <class W>
struct Work {
  const Tile tile;
  W *const lines, *const weights;
  int64_t *const row_at, *const col_at;  // in values, from the plane's first

  __device__ explicit Work(const Tile& tile)
      : tile(tile),
        lines(reinterpret_cast<W*>(dynamic_shared())),
        weights(lines + tile.lines() * tile.line()),
        row_at(reinterpret_cast<int64_t*>(weights + tile.tap_rows * tile.weight_line())),
        col_at(row_at + tile.lines()) {}

  // Copies from[row(m)][col(n)] for all that the tile and rows x cols taps meet, and weight(t, u). row and col are
  // called once per row and column: they divide.
  template <class T, class Row, class Col, class Weight>
  __device__ void load(const T* from, int64_t by_row, int64_t by_col, int rows, int cols, const Row& row,
                       const Col& col, const Weight& weight) const {
    const int height = tile.rows + rows - 1, width = tile.cols() + cols - 1;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    __syncthreads();  // until nobody reads what the last taps left
    for (int m = threadIdx.x; m < height + width; m += blockDim.x) {
      if (m < height) {
        row_at[m] = row(m) * by_row;
      } else {
        col_at[m - height] = col(m - height) * by_col;
      }
    }
    for (int t = warp; t < rows; t += warps) {
      for (int u = lane; u < cols; u += 32) {
        weights[t * tile.weight_line() + u] = weight(t, u);
      }
    }
    __syncthreads();
    const int half = tile.line() / 2;
    // All loads of a batch are on their way before the first is waited for.
    constexpr int kBatch = 8;
    for (int n = lane; n < width; n += 32) {
      const T* const column = from + col_at[n];
      W* const to = lines + n / 4 % 2 * half + n / 8 * 4 + n % 4;
      for (int m0 = warp; m0 < height; m0 += warps * kBatch) {
        T values[kBatch];  // as they lie there: a conversion would be made, and waited for, under the condition
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int m = m0 + k * warps;
          values[k] = m < height ? column[row_at[m]] : T{};
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int m = m0 + k * warps;
          if (m < height) {
            to[m * tile.line()] = static_cast<W>(values[k]);
          }
        }
      }
    }
    __syncthreads();
  }

  // sum[c] += w[t][u] in[row + t][lane * kEach + c + u] for rows x cols taps.
  __device__ void add(int row, int lane, int rows, int cols, W (&sum)[kEach]) const {
    const W* const line = lines + row * tile.line() + lane * 4;
    switch (cols / 4) {
      case 1:
        return add_lines<1>(line, rows, cols, sum);
      case 2:
        return add_lines<2>(line, rows, cols, sum);
      default:
        return add_lines<0>(line, rows, cols, sum);
    }
  }

 private:
  // Quads: how many whole ones cols are, 0 for any number. Of few, all that a line brings is in registers at once, and
  // nothing moves; of three, nothing does in the loop, which takes three at once.
  template <int Quads>
  __device__ void add_lines(const W* line, int rows, int cols, W (&sum)[kEach]) const {
    constexpr int kHeld = Quads + 2;
    const int half = tile.line() / 2, rest = cols % 4;
    const W* weight = weights;
    for (int t = 0; t < rows; ++t, line += tile.line(), weight += tile.weight_line()) {
      W in[4 * (kHeld + 1)];
#pragma unroll
      for (int q = 0; q < kHeld; ++q) {
        load_quad(line, half, q, in + 4 * q);
      }
      int from = 0;
      if constexpr (Quads == 0) {
#pragma unroll 3
        for (; from + 4 <= cols; from += 4) {
          load_quad(line, half, from / 4 + 2, in + 8);
          add_quad(weight + from, in, sum);
#pragma unroll
          for (int k = 0; k < kEach; ++k) {
            in[k] = in[k + 4];
          }
        }
      } else {
#pragma unroll
        for (int q = 0; q < Quads; ++q) {
          add_quad(weight + 4 * q, in + 4 * q, sum);
        }
        from = 4 * Quads;
      }
      if (rest > 0) {
        W* const last = in + 4 * Quads;
        if (rest > 1) {
          load_quad(line, half, from / 4 + 2, last + 8);
        }
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          if (k < rest) {
            add_tap(weight[from + k], last + k, sum);
          }
        }
      }
    }
  }

  __device__ static void load_quad(const W* line, int half, int q, W* to) {
    load4(line + q % 2 * half + q / 2 * 4, to);
  }

  __device__ static void add_quad(const W* weight, const W* in, W (&sum)[kEach]) {
    W w[4];
    load4(weight, w);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      add_tap(w[k], in + k, sum);
    }
  }

  __device__ static void add_tap(W w, const W* in, W (&sum)[kEach]) {
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
      sum[c] += w * in[c];
    }
  }
};

// A x of all planes if not Adjoint, else A^T y: end.store(plane, i, j, before, value) takes each value,
// end.before(plane, i, j) has loaded what it needs. A x is the sum over phases of each phase's sum, whether a block
// takes all phases, or, given `phases`, one of them, which it leaves there: (phases, planes, rows, cols).
template <class T, class W, bool Adjoint, class End>
__global__ void __launch_bounds__(kMostThreads, sizeof(W) == 4 ? 2 : 1)
    correlate(const Shape32 shape, const Planes<T> in, const W* kernels, const End end, const Tile tile, W* phases) {
  const Work<W> work(tile);
  const Axis32 &rows = shape.rows, &cols = shape.cols;
  const int s = rows.scale;
  const bool apart = Adjoint || phases != nullptr;
  int index = static_cast<int>(blockIdx.x), phase = 0, last_phase = s * s;
  if (apart) {
    phase = index % (s * s), last_phase = phase + 1;
    index /= s * s;
  }
  const int left = index % tile.across * tile.cols(), top = index / tile.across % tile.down * tile.rows;
  const int plane = index / tile.across / tile.down;
  const int row = static_cast<int>(threadIdx.x) / tile.lanes, lane = static_cast<int>(threadIdx.x) % tile.lanes;
  const bool sums = row < tile.rows;
  const W* const kernel = kernels + static_cast<int64_t>(shape.kernel_of(plane)) * shape.taps();
  const T* const from = in.plane(plane);
  W total[kEach] = {};
  for (; phase < last_phase; ++phase) {
    const int p = phase / s, q = phase % s;
    W sum[kEach] = {};
    const int first_row = Adjoint ? rows.first(p) : p, first_col = Adjoint ? cols.first(q) : q;
    const int down = rows.steps(first_row), across = cols.steps(first_col);
    const int shift_down = Adjoint ? rows.shift(p) : 0, shift_across = Adjoint ? cols.shift(q) : 0;
    for (int t0 = 0; t0 < down; t0 += tile.tap_rows) {
      for (int u0 = 0; u0 < across; u0 += tile.tap_cols) {
        const int height = min(tile.tap_rows, down - t0), width = min(tile.tap_cols, across - u0);
        work.load(
            from, in.by_row, in.by_col, height, width,
            [&](int m) {
              const int e = top + t0 + m;
              return Adjoint ? rows.measurement(e + shift_down) : rows.pixel(e * s + p);
            },
            [&](int n) {
              const int e = left + u0 + n;
              return Adjoint ? cols.measurement(e + shift_across) : cols.pixel(e * s + q);
            },
            [&](int t, int u) {
              const int e = first_row + (t0 + t) * s, f = first_col + (u0 + u) * s;
              return Adjoint ? kernel[e * cols.taps + f] : kernel[(rows.taps - 1 - e) * cols.taps + cols.taps - 1 - f];
            });
        if (sums) {
          work.add(row, lane, height, width, sum);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
      total[c] += sum[c];
    }
  }
  if (!sums || top + row >= rows.count) {
    return;
  }
  const int i = top + row, j0 = left + lane * kEach;
  if (!Adjoint && apart) {
    const int64_t line = (static_cast<int64_t>(last_phase - 1) * shape.planes() + plane) * rows.count + i;
    W* const to = phases + line * cols.count;
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
      if (j0 + c < cols.count) {
        to[j0 + c] = total[c];
      }
    }
    return;
  }
  const int each = Adjoint ? s : 1, p = Adjoint ? (last_phase - 1) / s : 0, q = Adjoint ? (last_phase - 1) % s : 0;
  typename End::Before before[kEach];
#pragma unroll
  for (int c = 0; c < kEach; ++c) {
    before[c] = j0 + c < cols.count ? end.before(plane, i * each + p, (j0 + c) * each + q) : typename End::Before{};
  }
#pragma unroll
  for (int c = 0; c < kEach; ++c) {
    if (j0 + c < cols.count) {
      end.store(plane, i * each + p, (j0 + c) * each + q, before[c], total[c]);
    }
  }
}

template <class W, class End>
__global__ void __launch_bounds__(256) add_phases(const Shape shape, const W* phases, const End end) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t rows = shape.rows.count, cols = shape.cols.count, each = shape.planes() * rows * cols;
  if (index < each) {
    W sum = 0;
    for (int64_t k = 0; k < shape.rows.scale * shape.cols.scale; ++k) {
      sum += phases[k * each + index];
    }
    const int64_t plane = index / cols / rows, i = index / cols % rows, j = index % cols;
    end.store(plane, i, j, end.before(plane, i, j), sum);
  }
}

// Endings. Results are contiguous.

template <class T>
struct StoreValue {
  using Before = Nothing;
  T* out;
  int64_t rows, cols;
  __device__ Before before(int64_t, int64_t, int64_t) const {
    return {};
  }
  __device__ void store(int64_t plane, int64_t i, int64_t j, Before, Wide<T> value) const {
    out[(plane * rows + i) * cols + j] = static_cast<T>(value);
  }
};

// base - rho value; rho is one value (by_plane 0) or one per plane, and null for 1; sign is 1 or -1.
template <class T>
struct StoreDifference {
  using W = Wide<T>;
  using Before = T;
  Planes<T> base;
  const W* rho;
  int64_t by_plane;
  W sign;
  T* out;
  int64_t rows, cols;
  __device__ Before before(int64_t plane, int64_t i, int64_t j) const {
    return base.row(plane, i)[j * base.by_col];
  }
  __device__ void store(int64_t plane, int64_t i, int64_t j, Before from, W value) const {
    const W rate = rho == nullptr ? sign : sign * rho[plane * by_plane];
    out[(plane * rows + i) * cols + j] = static_cast<T>(static_cast<W>(from) - rate * value);
  }
};

// A part of the gradient of <A x, y> for the taps of one pair of phases: of the measurements of its group (a sample, or
// all), cut into pieces of tap_rows x tap_cols, one in `parts`. Tiles are of taps.
template <class T>
__global__ void __launch_bounds__(kMostThreads, 1)
    correlate_with_measurements(const Shape32 shape, const Planes<T> x, const Planes<Wide<T>> y, const Tile tile,
                                int parts, int planes, Wide<T>* out) {
  using W = Wide<T>;
  const Work<W> work(tile);
  const Axis32 &rows = shape.rows, &cols = shape.cols;
  const int s = rows.scale;
  int index = static_cast<int>(blockIdx.x);
  const int left = index % tile.across * tile.cols();
  index /= tile.across;
  const int top = index % tile.down * tile.rows;
  index /= tile.down;
  const int q = index % s, p = index / s % s;
  index /= s * s;
  const int part = index % parts, group = index / parts;
  const int row = static_cast<int>(threadIdx.x) / tile.lanes, lane = static_cast<int>(threadIdx.x) % tile.lanes;
  const bool sums = row < tile.rows;
  const int across = (cols.count + tile.tap_cols - 1) / tile.tap_cols,
            down = (rows.count + tile.tap_rows - 1) / tile.tap_rows;
  W sum[kEach] = {};
  for (int64_t piece = part; piece < static_cast<int64_t>(planes) * down * across; piece += parts) {
    const int plane = group * planes + static_cast<int>(piece / across / down);
    const int i0 = static_cast<int>(piece / across % down) * tile.tap_rows;
    const int j0 = static_cast<int>(piece % across) * tile.tap_cols;
    const int height = min(tile.tap_rows, rows.count - i0), width = min(tile.tap_cols, cols.count - j0);
    const W* const measured = y.row(plane, i0) + j0 * y.by_col;
    work.load(
        x.plane(plane), x.by_row, x.by_col, height, width, [&](int m) { return rows.pixel((i0 + top + m) * s + p); },
        [&](int n) { return cols.pixel((j0 + left + n) * s + q); },
        [&](int t, int u) { return measured[t * y.by_row + u * y.by_col]; });
    if (sums) {
      work.add(row, lane, height, width, sum);
    }
  }
  const int e = (top + row) * s + p;
  if (sums && e < rows.taps) {
    W* const to = out + (static_cast<int64_t>(group) * parts + part) * shape.taps();
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
      const int f = (left + lane * kEach + c) * s + q;
      if (f < cols.taps) {
        to[(rows.taps - 1 - e) * cols.taps + cols.taps - 1 - f] = sum[c];
      }
    }
  }
}

template <class W>
__global__ void __launch_bounds__(256) sum_parts(const W* partial, int64_t parts, int64_t taps, int64_t count, W* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) {
    W sum = 0;
    for (int64_t k = 0; k < parts; ++k) {
      sum += partial[(i / taps * parts + k) * taps + i % taps];
    }
    out[i] = sum;
  }
}

// The shape in 32 bits, with room for what tiles reach beyond.
Shape32 narrow(const Shape& shape) {
  const Axis &rows = shape.rows, &cols = shape.cols;
  STD_TORCH_CHECK(rows.pixels() < 1 << 30 && cols.pixels() < 1 << 30,
                  "x: expected at most 2^30 - 1 rows and columns on CUDA, got ", rows.pixels(), "x", cols.pixels());
  STD_TORCH_CHECK(rows.scale <= 1 << 15, "scale: expected at most 32768 on CUDA, got ", rows.scale);
  STD_TORCH_CHECK(
      std::max(rows.taps, cols.taps) <= 1 << 28 && shape.taps() < int64_t{1} << 31 && shape.planes() < int64_t{1} << 31,
      "kernel, x: expected fewer than 2^31 taps and planes and at most 2^28 taps a side on CUDA, got ", rows.taps, "x",
      cols.taps, " and ", shape.planes());
  const auto axis = [](const Axis& of) {
    return Axis32{static_cast<int>(of.count), static_cast<int>(of.scale), static_cast<int>(of.taps)};
  };
  return {static_cast<int>(shape.samples), static_cast<int>(shape.channels), axis(rows), axis(cols), shape.per_sample};
}

// `beside`: work space is allocated beside it.
template <class T, bool Adjoint, class W, class End>
void run(const OnDeviceOf& device, const Tensor& beside, const Shape& shape, const Planes<T>& in, const W* kernel,
         const End& end) {
  const Shape32 narrowed = narrow(shape);
  const int64_t planes = shape.planes(), phases = shape.rows.scale * shape.cols.scale;
  if (planes == 0) {
    return;
  }
  const int64_t wish = 2 * device.multiprocessors();
  const auto tile_for = [&](int64_t each) {
    return Tile::of<W>(each, shape.rows.count, shape.cols.count, shape.rows.most_steps(), shape.cols.most_steps(),
                       wish);
  };
  const auto blocks = [&](const Tile& t) { return planes * t.down * t.across; };  // in 64 bits, as planes are
  Tile tile = tile_for(Adjoint ? planes * phases : planes);
  std::optional<Tensor> partial;
  if constexpr (!Adjoint) {
    // Where even small tiles are too few, phases go to blocks of their own.
    if (phases > 1 && tile.rows <= 8 && blocks(tile) < 2 * wish) {
      tile = tile_for(planes * phases);
      partial =
          empty_beside(beside, {phases, planes, shape.rows.count, shape.cols.count}, wide_type(beside.scalar_type()));
    }
  }
  launch(device, &correlate<T, W, Adjoint, End>, blocks(tile) * (Adjoint || partial ? phases : 1), tile.threads(),
         tile.bytes<W>(), narrowed, in, kernel, end, tile, partial ? partial->mutable_data_ptr<W>() : nullptr);
  if (partial) {
    launch(device, &add_phases<W, End>, ceil_div(planes * shape.rows.count * shape.cols.count, 256), 256, 0, shape,
           partial->const_data_ptr<W>(), end);
  }
}

Tensor forward(Tensor x, Tensor kernel, int64_t scale) {
  const OnDeviceOf device(x);
  const Shape shape = check_image(x, kernel, scale);
  const Tensor plain = dense(kernel);
  const Tensor y = empty_measurement(x, shape, x.scalar_type());
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    run<T, false>(device, x, shape, planes_of<T>(x), plain.const_data_ptr<Wide<T>>(),
                  StoreValue<T>{y.mutable_data_ptr<T>(), shape.rows.count, shape.cols.count});
  });
  return y;
}

Tensor adjoint(Tensor y, Tensor kernel, int64_t scale) {
  const OnDeviceOf device(y);
  const Shape shape = check_measurement(y, kernel, scale);
  const Tensor plain = dense(kernel);
  const Tensor x = empty_image(y, shape);
  dispatch_storage(y.scalar_type(), "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    run<T, true>(device, y, shape, planes_of<T>(y), plain.const_data_ptr<Wide<T>>(),
                 StoreValue<T>{x.mutable_data_ptr<T>(), shape.rows.pixels(), shape.cols.pixels()});
  });
  return x;
}

// z = x - sign rho A^T residual.
template <class T>
void descend(const OnDeviceOf& device, const Shape& shape, const Tensor& x, const Planes<Wide<T>>& residual,
             const Tensor& kernel, const Tensor& rho, Wide<T> sign, const Tensor& z) {
  using W = Wide<T>;
  run<W, true>(device, x, shape, residual, kernel.const_data_ptr<W>(),
               StoreDifference<T>{planes_of<T>(x), rho.const_data_ptr<W>(), rho.dim() == 1 ? 0 : 1, sign,
                                  z.mutable_data_ptr<T>(), shape.rows.pixels(), shape.cols.pixels()});
}

Tensor descend_op(Tensor x, Tensor residual, Tensor kernel, Tensor rho, int64_t scale) {
  const OnDeviceOf device(x);
  const Shape shape = check_image(x, kernel, scale);
  check_beside("residual", residual, x, shape);
  check_step_size(rho, shape.samples, shape.channels, wide_type(x.scalar_type()));
  const Tensor plain = dense(kernel), rhos = dense(rho), z = empty_image(x, shape);
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    descend<T>(device, shape, x, planes_of<Wide<T>>(residual), plain, rhos, 1, z);
  });
  return z;
}

Tensor step(Tensor x, Tensor y, Tensor kernel, Tensor rho, int64_t scale) {
  const OnDeviceOf device(x);
  const ScalarType wide = wide_type(x.scalar_type());
  const Shape shape = check_image(x, kernel, scale);
  check_beside("y", y, x, shape);
  check_step_size(rho, shape.samples, shape.channels, wide);
  const Tensor plain = dense(kernel), rhos = dense(rho), z = empty_image(x, shape);
  const Tensor residual = empty_measurement(x, shape, wide);
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    // The residual is kept as y - A x, hence the sign of the second launch.
    run<T, false>(device, x, shape, planes_of<T>(x), plain.const_data_ptr<W>(),
                  StoreDifference<W>{planes_of<W>(y), nullptr, 0, W(1), residual.mutable_data_ptr<W>(),
                                     shape.rows.count, shape.cols.count});
    descend<T>(device, shape, x, planes_of<W>(residual), plain, rhos, -1, z);
  });
  return z;
}

Tensor grad_kernel(Tensor x, Tensor y, int64_t kh, int64_t kw, int64_t scale, bool per_sample) {
  const OnDeviceOf device(x);
  const Shape shape = shape_of_image(x, kh, kw, per_sample, scale);
  check_beside("y", y, x, shape);
  const Shape32 narrowed = narrow(shape);
  const Tensor grad = empty_kernel(y, shape);
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    const int64_t groups = per_sample ? shape.samples : 1, planes = per_sample ? shape.channels : shape.planes();
    // The number of parts does not depend on the device: the same bits everywhere.
    const Tile tile = Tile::of<W>(groups, shape.rows.most_steps(), shape.cols.most_steps(),
                                  std::min<int64_t>(shape.rows.count, 32), shape.cols.count, 0);
    const int64_t pieces =
        planes * ceil_div(shape.rows.count, tile.tap_rows) * ceil_div(shape.cols.count, tile.tap_cols);
    const int64_t parts = std::min(pieces, per_sample ? kSampleParts : kParts), taps = shape.taps();
    const Tensor partial = empty_beside(y, {groups, parts, taps}, y.scalar_type());
    if (groups * parts > 0) {
      launch(device, &correlate_with_measurements<T>, groups * parts * scale * scale * tile.down * tile.across,
             tile.threads(), tile.bytes<W>(), narrowed, planes_of<T>(x), planes_of<W>(y), tile, static_cast<int>(parts),
             static_cast<int>(planes), partial.mutable_data_ptr<W>());
    }
    if (groups > 0) {
      launch(device, &sum_parts<W>, ceil_div(groups * taps, 256), 256, 0, partial.const_data_ptr<W>(), parts, taps,
             groups * taps, grad.mutable_data_ptr<W>());
    }
  });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CUDA, m) {
  m.impl("blur_downsample", TORCH_BOX(&forward));
  m.impl("blur_downsample_adjoint", TORCH_BOX(&adjoint));
  m.impl("blur_downsample_descend", TORCH_BOX(&descend_op));
  m.impl("blur_downsample_step", TORCH_BOX(&step));
  m.impl("blur_downsample_grad_kernel", TORCH_BOX(&grad_kernel));
}

}  // namespace lorun::blur_downsample
