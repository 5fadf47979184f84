// The weight gradient of a convolution on the CPU (formulas and layouts in packed_weight_gradient.h).

#include "packed_weight_gradient/packed_weight_gradient.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/convert.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "packed_weight_gradient/tiles.h"

namespace lorun::packed_weight_gradient {
namespace {

#ifdef LORUN_AMX

struct Slot;

// Work space of a thread.
struct Space {
  BFloat16 *zeros, *left, *right;

  explicit Space(const Shape& s) {
    const int64_t pixel = (s.out + kDepth - 1) / kDepth * kDepth;
    zeros = static_cast<BFloat16*>(scratch<Slot>((pixel + s.left_values() + s.right_values()) * sizeof(BFloat16)));
    left = zeros + pixel;
    right = left + s.left_values();
    std::fill_n(zeros, pixel, BFloat16{});
  }
};

// Images whose pixels lie side by side, channels innermost: values from one row to the next, and from one image.
struct Images {
  const BFloat16* at;
  int64_t row, image;
};

// Rows [begin, end) of all images' gradients, into the sums of their part.
void sum_rows(const Shape& s, const Space& space, const BFloat16* grad, const Images& x, int64_t begin, int64_t end,
              float* sums) {
  const int64_t height = s.grad_height();
  const auto count_from = [&](int64_t i) { return std::min({s.rows(), height - i % height, end - i}); };
  const auto soon = [&](int64_t i) {
    if (i == end || x.row != s.width * s.in) {
      return Soon{};
    }
    const int64_t count = count_from(i), top = i % height - s.padding;
    const int64_t first = std::max<int64_t>(top, 0), last = std::min(top + count + s.kernel - 1, s.height);
    return Soon{grad + i * s.grad_width() * s.out, x.at + i / height * x.image + first * x.row,
                count * s.grad_width() * s.out, std::max<int64_t>(last - first, 0) * x.row};
  };
  for (int64_t i = begin; i < end;) {
    const int64_t n = i / height, top = i % height, count = count_from(i);
    LeftSide(s, grad + i * s.grad_width() * s.out, count, s.out, space.zeros, space.left).end(count);
    lay_out_right(s, x.at + n * x.image, x.row, top - s.padding, count + s.kernel - 1, space.right);
    end_right(s, count + s.kernel - 1, space.right);
    i += count;
    multiply_all(s, space.left, space.right, count, sums, i - count > begin, soon(i));
  }
  if (begin == end) {
    std::fill_n(sums, s.sums(), 0.0f);
  }
}

void by_tiles(const Shape& s, const BFloat16* grad, const Images& x, float* g) {
  const int64_t rows = s.n * s.grad_height(), parts = s.parts();
  const Sums sums(parts * s.sums());
  parallel_turns(parts, [&](int64_t part) {
    const Tiles tiles;
    const Space space(s);
    float* to = sums.memory.get() + part * s.sums();
    sum_rows(s, space, grad, x, part * rows / parts, (part + 1) * rows / parts, to);
  });
  add_parts(s, sums.memory.get(), parts, s.sums(), g);
}

#endif

// As the formula reads, for other dtypes and processors.
template <class T>
void by_loops(const Shape& s, const T* grad, const T* x, Wide<T>* g) {
  const int64_t height = s.grad_height(), width = s.grad_width(), taps = s.kernel * s.kernel;
  parallel(s.out, s.in * taps * s.n * height * width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * s.in * taps; i < end * s.in * taps; ++i) {
      const int64_t o = i / (s.in * taps), c = i / taps % s.in, row = i % taps / s.kernel, column = i % s.kernel;
      Wide<T> sum = 0;
      for (int64_t n = 0; n < s.n; ++n) {
        for (int64_t h = std::max<int64_t>(0, s.padding - row); h < height; ++h) {
          const int64_t from = h - s.padding + row;
          for (int64_t w = std::max<int64_t>(0, s.padding - column); from < s.height && w < width; ++w) {
            const int64_t at = w - s.padding + column;
            if (at < s.width) {
              sum += widen(grad[((n * height + h) * width + w) * s.out + o]) *
                     widen(x[((n * s.height + from) * s.width + at) * s.in + c]);
            }
          }
        }
      }
      g[i] = sum;
    }
  });
}

Tensor weight_gradient(Tensor grad, Tensor x, int64_t kernel, int64_t padding) {
  STD_TORCH_CHECK(grad.dim() == 4 && x.dim() == 4, "grad, x: expected 4 dimensions, got ", shape_of(grad), " and ",
                  shape_of(x));
  const ScalarType type = x.scalar_type();
  const Shape s{x.size(0), grad.size(1), x.size(1), x.size(2), x.size(3), kernel, padding};
  STD_TORCH_CHECK(kernel >= 1 && padding >= 0, "kernel, padding: expected 1 or more and 0 or more");
  check_shape("grad", grad, {s.n, s.out, s.grad_height(), s.grad_width()});
  STD_TORCH_CHECK(grad.scalar_type() == type, "grad: expected x's dtype, got another one");
  return dispatch_storage(type, "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor gradients = channels_inside(grad);
    const Tensor g = empty_beside(x, {s.out, s.in, kernel, kernel}, wide_type(type));
    const T* from = gradients.const_data_ptr<T>();
    Wide<T>* to = g.mutable_data_ptr<Wide<T>>();
#ifdef LORUN_AMX
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (has_amx()) {
        // As it is where only rows lie apart: every second row of another image.
        const bool rows = x.stride(1) == 1 && x.stride(3) == s.in;
        const Tensor pixels = rows ? x : channels_inside(x);
        const int64_t row = rows ? x.stride(2) : s.width * s.in, image = rows ? x.stride(0) : s.height * row;
        by_tiles(s, from, {pixels.const_data_ptr<T>(), row, image}, to);
        return g;
      }
    }
#endif
    by_loops(s, from, channels_inside(x).const_data_ptr<T>(), to);
    return g;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("packed_weight_gradient", TORCH_BOX(&weight_gradient));
}

}  // namespace lorun::packed_weight_gradient
