// Blur and downsample on the CPU, as direct sums (formulas in blur_downsample.h).
//
// Arithmetic is kh*kw multiply-adds per measurement and plane, each way; everything here serves to run them at the
// speed of the FMA units. A tile of an image is packed, widened and wrapped, into rows that lie phase by phase, so
// that a strided convolution becomes unit-stride ones (tiles.inl); the adjoint's phases are interleaved while they are
// written. Tiles fit L2, one per thread; nothing grows with the image but, in a step, the residual of the planes in
// flight. Every output is one sum in one order: results depend on no tile, thread or batch mate.

#include "blur_downsample/blur_downsample.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "blur_downsample/checks.h"
#include "blur_downsample/tiling.h"
#include "common/convert.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace lorun::blur_downsample {

// Output rows that are computed together.
inline constexpr int kRows = 4;

// One unit-stride correlation: rows of input, and weights [column][taps] down them.
template <class W>
struct Pass {
  const W* in;
  const W* weights;
  int64_t taps;
};

// A sum of correlations that share their columns: column v reads at offset[v].
template <class W>
struct Blur {
  const Pass<W>* passes;
  int64_t count, in_stride;
  const int64_t* offset;
  int64_t columns;
};

}  // namespace lorun::blur_downsample

#define LORUN_KERNELS "blur_downsample/tiles.inl"
#include "common/for_each_variant.h"

namespace lorun::blur_downsample {
namespace {

constexpr int64_t kTileBytes = 448 << 10;
constexpr int64_t kTileColumns = 320;
constexpr int64_t kFlightBytes = 1 << 20;  // residual of the planes in flight, unless one alone is larger
constexpr int64_t kGradientBytes = 192 << 10;
constexpr int64_t kSharedPieces = 64, kSamplePieces = 16;  // partial sums of a kernel's gradient

template <class W>
Tiling tiling_of(const Shape& shape, int64_t first, int64_t planes) {
  return choose_tiling(shape, first, planes, LORUN_PICK(lanes<W>)(), sizeof(W), kTileBytes, kTileColumns, kRows,
                       torch::stable::get_num_threads());
}

template <class F>
void for_each_piece(const Shape& shape, const Tiling& tiling, const F& f) {
  parallel(tiling.pieces(), tiling.rows * tiling.cols * (shape.taps() / 8 + shape.rows.scale * shape.cols.scale),
           [&](int64_t begin, int64_t end) {
             for (int64_t i = begin; i < end; ++i) {
               f(tiling.piece(i));
             }
           });
}

// Consecutive pieces of one thread's work space, each a whole number of cache lines.
template <class W>
struct Space {
  W* next;

  W* take(int64_t values) {
    W* const here = next;
    next += padded(values);
    return here;
  }

  static int64_t padded(int64_t values) {
    return round_up(values, 64 / static_cast<int64_t>(sizeof(W)));
  }
};

template <class W, class... Sizes>
Space<W> space_for(Sizes... values) {
  struct Slot;
  return {static_cast<W*>(scratch<Slot>((Space<W>::padded(values) + ...) * sizeof(W)))};
}

// `count` pixels of a periodic row from pixel `start`.
template <class T, class W>
void read_around(const T* row, int64_t stride, int64_t period, int64_t start, int64_t count, W* out) {
  const auto read_run = LORUN_PICK(read<T, W>);
  while (count > 0) {
    const int64_t run = std::min(count, period - start);
    read_run(row + start * stride, stride, run, out);
    out += run;
    count -= run;
    start = 0;
  }
}

// X (see blur_downsample.h) as measurements [top, top + height) x [left, ...) read it, phase by phase.
template <class T, class W>
void pack_image(const Shape& shape, const Planes<T>& x, const Piece& at, const Layout& layout, W* packed) {
  const int64_t s = shape.rows.scale, period = shape.cols.pixels(), first = shape.cols.pixel(at.left * s);
  const auto split_run = LORUN_PICK(split<T, W>);
  for (int64_t e = 0; e < (at.height - 1) * s + shape.rows.taps; ++e, packed += layout.line) {
    const T* row = x.row(at.plane, shape.rows.pixel(at.top * s + e));
    for (int64_t done = 0, from = first; done < layout.line; from = 0) {
      const int64_t run = std::min(layout.line - done, period - from);
      split_run(row + from * x.by_col, x.by_col, done, run, s, packed, layout.segment);
      done += run;
    }
  }
}

// y = A x for a tiling of planes: finish(plane, row, left, width, values) takes each stretch of measurements.
template <class T, class W, class Finish>
void forward_tiles(const Shape& shape, const Planes<T>& x, const W* weights, const Tiling& tiling,
                   const Finish& finish) {
  const int64_t s = shape.rows.scale, kw = shape.cols.taps;
  const Layout layout(shape.cols, tiling.cols, LORUN_PICK(lanes<W>)());
  const int64_t most_lines = (tiling.rows - 1) * s + shape.rows.taps;
  std::vector<int64_t> offset(kw);
  for (int64_t f = 0; f < kw; ++f) {
    offset[f] = f % s * layout.segment + f / s;
  }
  for_each_piece(shape, tiling, [&](const Piece& at) {
    Space<W> space = space_for<W>(most_lines * layout.line, tiling.rows * layout.width);
    W* const packed = space.take(most_lines * layout.line);
    W* const out = space.take(tiling.rows * layout.width);
    pack_image(shape, x, at, layout, packed);
    const W* weight = weights + shape.kernel_of(at.plane) * shape.taps();
    std::vector<Pass<W>> passes(s);
    for (int64_t a = 0; a < s; ++a) {
      passes[a] = {packed + a * layout.line, weight, shape.rows.steps(a)};
      weight += kw * passes[a].taps;
    }
    LORUN_PICK(blur<W>)({passes.data(), s, s * layout.line, offset.data(), kw}, at.height, at.width, out, layout.width);
    for (int64_t i = 0; i < at.height; ++i) {
      finish(at.plane, at.top + i, at.left, at.width, out + i * layout.width);
    }
  });
}

// x = A^T y for a tiling of planes: finish(plane, row, left, width, values) takes each stretch of pixels.
template <class T, class W, class Finish>
void adjoint_tiles(const Shape& shape, const Planes<T>& y, const W* weights, const Tiling& tiling,
                   const Finish& finish) {
  const int64_t s = shape.rows.scale;
  const Layout layout(shape.cols, tiling.cols, LORUN_PICK(lanes<W>)());
  const int64_t reach = shape.rows.most_steps();  // the farthest measurement, shifted by one, minus the first
  std::vector<int64_t> offset(shape.cols.most_steps());
  for (int64_t t = 0; t < shape.cols.most_steps(); ++t) {
    offset[t] = t;
  }
  for_each_piece(shape, tiling, [&](const Piece& at) {
    Space<W> space = space_for<W>((tiling.rows + reach) * layout.segment, kRows * s * layout.width, s * layout.width);
    W* const packed = space.take((tiling.rows + reach) * layout.segment);
    W* const phases = space.take(kRows * s * layout.width);
    W* const line = space.take(s * layout.width);
    for (int64_t e = 0; e < at.height + reach; ++e) {
      read_around(y.row(at.plane, shape.rows.measurement(at.top + e)), y.by_col, shape.cols.count,
                  shape.cols.measurement(at.left), layout.segment, packed + e * layout.segment);
    }
    for (int64_t i = 0; i < at.height; i += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, at.height - i);
      const W* weight = weights + shape.kernel_of(at.plane) * shape.taps();
      for (int64_t p = 0; p < s; ++p) {
        const W* const from = packed + (i + shape.rows.shift(p)) * layout.segment;
        for (int64_t q = 0; q < s; ++q) {
          const int64_t columns = shape.cols.steps(shape.cols.first(q));
          const Pass<W> pass{from + shape.cols.shift(q), weight, shape.rows.steps(shape.rows.first(p))};
          weight += columns * pass.taps;
          LORUN_PICK(blur<W>)({&pass, 1, layout.segment, offset.data(), columns}, rows, at.width,
                              phases + q * layout.width, s * layout.width);
        }
        for (int64_t r = 0; r < rows; ++r) {
          const W* values = phases + r * s * layout.width;
          if (s > 1) {
            LORUN_PICK(join<W>)(values, layout.width, s, at.width, line);
            values = line;
          }
          finish(at.plane, (at.top + i + r) * s + p, at.left * s, at.width * s, values);
        }
      }
    }
  });
}

template <class W>
using LayOut = void (*)(const Shape&, const W*, W*);

// All kernels, laid out for one of the two directions.
template <class W>
Tensor weights_of(const Tensor& kernel, const Shape& shape, LayOut<W> lay_out) {
  const Tensor plain = dense(kernel);
  const int64_t kernels = shape.per_sample ? shape.samples : 1;
  const Tensor weights = empty_beside(kernel, {kernels, shape.taps()}, kernel.scalar_type());
  for (int64_t n = 0; n < kernels; ++n) {
    lay_out(shape, plain.const_data_ptr<W>() + n * shape.taps(), weights.mutable_data_ptr<W>() + n * shape.taps());
  }
  return weights;
}

Tensor forward(Tensor x, Tensor kernel, int64_t scale) {
  const Shape shape = check_image(x, kernel, scale);
  const int64_t rows = shape.rows.count, cols = shape.cols.count;
  const Tensor y = empty_measurement(x, shape, x.scalar_type());
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    const Tensor weights = weights_of<W>(kernel, shape, &lay_out_forward<W>);
    T* const out = y.mutable_data_ptr<T>();
    const auto store = LORUN_PICK(write<T, W>);
    forward_tiles(shape, planes_of<T>(x), weights.const_data_ptr<W>(), tiling_of<W>(shape, 0, shape.planes()),
                  [=](int64_t plane, int64_t i, int64_t left, int64_t width, const W* values) {
                    store(values, width, out + (plane * rows + i) * cols + left);
                  });
  });
  return y;
}

Tensor adjoint(Tensor y, Tensor kernel, int64_t scale) {
  const Shape shape = check_measurement(y, kernel, scale);
  const int64_t height = shape.rows.pixels(), width = shape.cols.pixels();
  const Tensor x = empty_image(y, shape);
  dispatch_storage(y.scalar_type(), "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    const Tensor weights = weights_of<W>(kernel, shape, &lay_out_adjoint<W>);
    T* const out = x.mutable_data_ptr<T>();
    const auto store = LORUN_PICK(write<T, W>);
    adjoint_tiles(shape, planes_of<T>(y), weights.const_data_ptr<W>(), tiling_of<W>(shape, 0, shape.planes()),
                  [=](int64_t plane, int64_t i, int64_t left, int64_t count, const W* values) {
                    store(values, count, out + (plane * height + i) * width + left);
                  });
  });
  return x;
}

// How x - sign * rho A^T r is written, stretch by stretch.
template <class T>
struct Descent {
  using W = Wide<T>;
  Planes<T> x;
  Tensor rho;
  W sign;
  T* out;
  int64_t height, width;
  void (*store)(const T*, int64_t, W, const W*, int64_t, T*) = LORUN_PICK(write_descent<T, W>);

  void operator()(int64_t plane, int64_t i, int64_t left, int64_t count, const W* values) const {
    const W rate = sign * rho.const_data_ptr<W>()[rho.dim() == 1 ? 0 : plane];
    store(x.row(plane, i) + left * x.by_col, x.by_col, rate, values, count, out + (plane * height + i) * width + left);
  }
};

Tensor descend(Tensor x, Tensor residual, Tensor kernel, Tensor rho, int64_t scale) {
  const Shape shape = check_image(x, kernel, scale);
  check_beside("residual", residual, x, shape);
  check_step_size(rho, shape.samples, shape.channels, wide_type(x.scalar_type()));
  const Tensor z = empty_image(x, shape);
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    const Tensor weights = weights_of<W>(kernel, shape, &lay_out_adjoint<W>);
    const Descent<T> descent{planes_of<T>(x),         dense(rho),          1,
                             z.mutable_data_ptr<T>(), shape.rows.pixels(), shape.cols.pixels()};
    adjoint_tiles(shape, planes_of<W>(residual), weights.const_data_ptr<W>(), tiling_of<W>(shape, 0, shape.planes()),
                  descent);
  });
  return z;
}

Tensor step(Tensor x, Tensor y, Tensor kernel, Tensor rho, int64_t scale) {
  const ScalarType wide = wide_type(x.scalar_type());
  const Shape shape = check_image(x, kernel, scale);
  check_beside("y", y, x, shape);
  check_step_size(rho, shape.samples, shape.channels, wide);
  const int64_t rows = shape.rows.count, cols = shape.cols.count, each = rows * cols;
  const Tensor z = empty_image(x, shape);
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    const Tensor forward_weights = weights_of<W>(kernel, shape, &lay_out_forward<W>);
    const Tensor adjoint_weights = weights_of<W>(kernel, shape, &lay_out_adjoint<W>);
    const int64_t flight =
        std::min(shape.planes(), std::max<int64_t>(1, kFlightBytes / (each * static_cast<int64_t>(sizeof(W)))));
    const Tensor residual = empty_beside(x, {flight, rows, cols}, wide);
    W* const r = residual.mutable_data_ptr<W>();
    const Planes<T> image = planes_of<T>(x);
    const Planes<W> measured = planes_of<W>(y);
    const Descent<T> descent{image, dense(rho), -1, z.mutable_data_ptr<T>(), rows * scale, cols * scale};
    const auto subtract = LORUN_PICK(write_descent<W, W>);
    for (int64_t first = 0; first < shape.planes(); first += flight) {
      const Tiling tiling = tiling_of<W>(shape, first, std::min(flight, shape.planes() - first));
      forward_tiles(shape, image, forward_weights.const_data_ptr<W>(), tiling,
                    [&](int64_t plane, int64_t i, int64_t left, int64_t width, const W* values) {
                      subtract(measured.row(plane, i) + left * measured.by_col, measured.by_col, W(1), values, width,
                               r + ((plane - first) * rows + i) * cols + left);
                    });
      adjoint_tiles(shape, Planes<W>{r - first * each, 1, each, 0, cols, 1}, adjoint_weights.const_data_ptr<W>(),
                    tiling, descent);
    }
  });
  return z;
}

// Adds one piece's share of the gradient, with the kernel reversed, onto out.
template <class T, class W>
void correlate_piece(const Shape& shape, const Planes<T>& x, const Planes<W>& y, const Tiling& tiling, const Piece& at,
                     const std::vector<int64_t>& offset, W* out) {
  const int64_t s = shape.rows.scale, kw = shape.cols.taps;
  const Layout layout(shape.cols, tiling.cols, LORUN_PICK(lanes<W>)());
  const int64_t most_lines = (tiling.rows - 1) * s + shape.rows.taps, margin = (kRows - 1) * layout.width;
  Space<W> space = space_for<W>(most_lines * layout.line, tiling.rows * layout.width + 2 * margin);
  W* const packed = space.take(most_lines * layout.line);
  pack_image(shape, x, at, layout, packed);
  W* const above = space.take(tiling.rows * layout.width + 2 * margin);
  W* const g = above + margin;
  std::fill(above, g + at.height * layout.width + margin, W(0));
  for (int64_t i = 0; i < at.height; ++i) {
    LORUN_PICK(read<W, W>)(y.row(at.plane, at.top + i) + at.left * y.by_col, y.by_col, at.width, g + i * layout.width);
  }
  for (int64_t a = 0; a < s; ++a) {
    LORUN_PICK(correlate<W>)(packed + a * layout.line, s * layout.line, offset.data(), shape.rows.steps(a), kw, g,
                             layout.width, at.height, at.width, out + a * kw, s * kw);
  }
}

Tensor grad_kernel(Tensor x, Tensor y, int64_t kh, int64_t kw, int64_t scale, bool per_sample) {
  const Shape shape = shape_of_image(x, kh, kw, per_sample, scale);
  check_beside("y", y, x, shape);
  const Tensor grad = empty_kernel(y, shape);
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    // Neither the tiles nor the partial sums know of threads or of other samples: the same bits always.
    const Tiling tiling = choose_tiling(shape, 0, shape.planes(), LORUN_PICK(lanes<W>)(), sizeof(W), kGradientBytes,
                                        kTileColumns, kRows, 1);
    const int64_t groups = per_sample ? shape.samples : 1, each = groups > 0 ? tiling.pieces() / groups : 0;
    const int64_t sums = std::min(each, per_sample ? kSamplePieces : kSharedPieces);
    const Planes<T> image = planes_of<T>(x);
    const Planes<W> measured = planes_of<W>(y);
    const Layout layout(shape.cols, tiling.cols, LORUN_PICK(lanes<W>)());
    std::vector<int64_t> offset(kw);
    for (int64_t f = 0; f < kw; ++f) {
      offset[f] = f % scale * layout.segment + f / scale;
    }
    const Tensor partial = empty_beside(y, {groups, sums, kh * kw}, y.scalar_type());
    W* const partials = partial.mutable_data_ptr<W>();
    parallel(groups * sums, ceil_div(each, std::max<int64_t>(1, sums)) * tiling.rows * tiling.cols * kh * kw / 8,
             [&](int64_t begin, int64_t end) {
               for (int64_t i = begin; i < end; ++i) {
                 W* const out = partials + i * kh * kw;
                 std::fill(out, out + kh * kw, W(0));
                 const int64_t k = i % sums, from = i / sums * each;
                 for (int64_t piece = from + each * k / sums; piece < from + each * (k + 1) / sums; ++piece) {
                   correlate_piece(shape, image, measured, tiling, tiling.piece(piece), offset, out);
                 }
               }
             });
    W* const out = grad.mutable_data_ptr<W>();
    std::fill(out, out + groups * kh * kw, W(0));
    for (int64_t i = 0; i < groups * sums; ++i) {
      for (int64_t tap = 0; tap < kh * kw; ++tap) {
        out[i / sums * kh * kw + kh * kw - 1 - tap] += partials[i * kh * kw + tap];
      }
    }
  });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("blur_downsample", TORCH_BOX(&forward));
  m.impl("blur_downsample_adjoint", TORCH_BOX(&adjoint));
  m.impl("blur_downsample_descend", TORCH_BOX(&descend));
  m.impl("blur_downsample_step", TORCH_BOX(&step));
  m.impl("blur_downsample_grad_kernel", TORCH_BOX(&grad_kernel));
}

}  // namespace lorun::blur_downsample
