// The gradients of a convolution's low-rank factors on the CPU (formulas in packed_factor_gradients.h).

#include "packed_factor_gradients/packed_factor_gradients.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <iterator>
#include <numeric>
#include <tuple>

#include "common/ahead.h"
#include "common/convert.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "packed_factor_gradients/tiles.h"

namespace lorun::packed_factor_gradients {
namespace {

// The factors as they lie in memory: up (out, rank), down (rank, in, kernel, kernel).
template <class T>
struct Factors {
  const T *up, *down;
};

#ifdef LORUN_AMX

using packed_weight_gradient::add_parts;
using packed_weight_gradient::end_right;
using packed_weight_gradient::kTileValues;
using packed_weight_gradient::lay_out_right;
using packed_weight_gradient::LeftSide;
using packed_weight_gradient::multiply_all;
using packed_weight_gradient::Sums;

struct Slot;
struct Weights;

// What both convolutions to `rank` channels take.
struct Filters {
  Filter<BFloat16> down, up;

  Filters(const Problem& p, const Factors<BFloat16>& factors)
      : down{p.in, p.rank, p.kernel, 1, p.padding, 1, nullptr, nullptr, false},
        up{p.out, p.rank, 1, 1, 0, 1, nullptr, nullptr, false} {
    BFloat16* to =
        static_cast<BFloat16*>(scratch<Weights>((down.block_values() + up.block_values()) * sizeof(BFloat16)));
    const int64_t taps = p.kernel * p.kernel;
    for (int64_t row = 0; row < p.kernel; ++row) {
      pack_row(down, Strided<BFloat16>{factors.down, p.in * taps, taps, p.kernel, 1}, row,
               to + row * down.steps() * kTileValues);
    }
    down.w = to;
    to += down.block_values();
    pack_row(up, Strided<BFloat16>{factors.up, 1, p.rank, 0, 0}, 0, to);
    up.w = to;
  }
};

// Work space of a thread.
struct Space {
  int64_t together;
  BFloat16 *zeros, *down_left, *up_left, *down_right, *up_right, *s, *t, *edge;
  float* narrow;  // sums of a row of s or t

  Space(const Shape& down, const Shape& up, const Filters& f) : together(std::min(down.rows(), up.rows())) {
    const int64_t edge_values = std::max(4 * f.down.kernel * tile_room(f.down), 4 * tile_room(f.up));
    const int64_t narrow_room = (up.width + kDepth) / kDepth * kDepth * kLanes;
    const int64_t sizes[] = {kDepth,
                             down.left_values(),
                             up.left_values(),
                             down.right_values(),
                             up.right_values(),
                             LeftSide::room(down) * narrow_room,
                             LeftSide::room(up) * narrow_room,
                             (edge_values + kDepth - 1) / kDepth * kDepth};
    const int64_t values = std::accumulate(std::begin(sizes), std::end(sizes), int64_t{0});
    BFloat16* at = static_cast<BFloat16*>(scratch<Slot>(values * sizeof(BFloat16) + narrow_room * sizeof(float)));
    BFloat16** const pieces[] = {&zeros, &down_left, &up_left, &down_right, &up_right, &s, &t, &edge};
    for (size_t i = 0; i < std::size(pieces); ++i) {
      *pieces[i] = at;
      at += sizes[i];
    }
    narrow = reinterpret_cast<float*>(at);
    std::fill_n(zeros, kDepth, BFloat16{});
  }
};

// Rows [begin, end) of all images' gradients, into the sums of their part.
void sum_rows(const Problem& p, const Filters& f, const Space& space, const BFloat16* grad, const BFloat16* x,
              int64_t begin, int64_t end, float* sums) {
  const Shape down = p.down(), up = p.up();
  const int64_t height = down.grad_height(), width = down.grad_width(), steps = narrow_steps(f.down, width);
  for (int64_t i = begin; i < end;) {
    const int64_t n = i / height, top = i % height, count = std::min({space.together, height - top, end - i});
    const BFloat16 *g = grad + n * height * width * p.out, *image = x + n * p.height * p.width * p.in;
    LeftSide s(down, space.s, LeftSide::room(down), kLanes, space.zeros, space.down_left);
    LeftSide t(up, space.t, LeftSide::room(up), kLanes, space.zeros, space.up_left);
    for (int64_t j = 0, ready = 0; j < count; ++j) {
      // Laid out first: reading a row from end to end brings it to the caches sooner than tiles would.
      for (; ready < j + p.kernel; ++ready) {
        lay_out_right(down, image, p.width * p.in, top - p.padding + ready, 1,
                      space.down_right + ready * down.pitch() * kLanes);
      }
      Fetch fetch{{}, Ahead(g + (top + j) * width * p.out, width * p.out * sizeof(BFloat16), steps)};
      if (const int64_t next = top - p.padding + ready; next >= 0 && next < p.height) {
        fetch.x = Ahead(image + next * p.width * p.in, p.width * p.in * sizeof(BFloat16), steps);
      }
      narrow_row(f.down, image, p.height, p.width, top + j, space.edge, space.narrow, fetch);
      round_row(space.narrow, width, space.t + j % LeftSide::room(up) * width * kLanes);
      t.add(j + 1);
      lay_out_right(up, g, width * p.out, top + j, 1, space.up_right + j * up.pitch() * kLanes);
      narrow_row(f.up, g, height, width, top + j, space.edge, space.narrow);
      round_row(space.narrow, width, space.s + j % LeftSide::room(down) * width * kLanes);
      s.add(j + 1);
    }
    s.end(count);
    end_right(down, count + p.kernel - 1, space.down_right);
    multiply_all(down, space.down_left, space.down_right, count, sums, i > begin);
    t.end(count);
    end_right(up, count, space.up_right);
    multiply_all(up, space.up_left, space.up_right, count, sums + down.sums(), i > begin);
    i += count;
  }
  if (begin == end) {
    std::fill_n(sums, down.sums() + up.sums(), 0.0f);
  }
}

void by_tiles(const Problem& p, const Factors<BFloat16>& factors, const BFloat16* grad, const BFloat16* x,
              float* g_down, float* g_up) {
  const Shape down = p.down(), up = p.up();
  const Filters f(p, factors);
  const int64_t rows = p.n * down.grad_height(), parts = std::min(down.parts(), up.parts());
  const int64_t apart = down.sums() + up.sums();
  const Sums sums(parts * apart);
  parallel_turns(parts, [&](int64_t part) {
    const Tiles tiles;
    const Space space(down, up, f);
    sum_rows(p, f, space, grad, x, part * rows / parts, (part + 1) * rows / parts, sums.memory.get() + part * apart);
  });
  add_parts(down, sums.memory.get(), parts, apart, g_down);
  add_parts(up, sums.memory.get() + down.sums(), parts, apart, g_up);
}

#endif

// As the formulas read, for other dtypes and processors.
template <class T>
void by_loops(const Problem& p, const Factors<T>& factors, const T* grad, const T* x, Wide<T>* g_down, Wide<T>* g_up) {
  using W = Wide<T>;
  const int64_t height = p.down().grad_height(), width = p.down().grad_width(), taps = p.kernel * p.kernel;
  const int64_t each = p.in * taps;
  parallel(p.rank, p.n * height * width * (each + p.out), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::fill_n(g_down + i * each, each, W(0));
      std::fill_n(g_up + i * p.out, p.out, W(0));
      for (int64_t at = 0; at < p.n * height * width; ++at) {
        const int64_t n = at / (height * width), h = at / width % height, w = at % width;
        const T* g = grad + at * p.out;
        W s = 0, t = 0;
        for (int64_t o = 0; o < p.out; ++o) {
          s += widen(factors.up[o * p.rank + i]) * widen(g[o]);
        }
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t row = h - p.padding + tap / p.kernel, column = w - p.padding + tap % p.kernel;
          if (row < 0 || row >= p.height || column < 0 || column >= p.width) {
            continue;
          }
          const T* pixel = x + ((n * p.height + row) * p.width + column) * p.in;
          for (int64_t c = 0; c < p.in; ++c) {
            t += widen(factors.down[i * each + c * taps + tap]) * widen(pixel[c]);
            g_down[i * each + c * taps + tap] += s * widen(pixel[c]);
          }
        }
        for (int64_t o = 0; o < p.out; ++o) {
          g_up[i * p.out + o] += t * widen(g[o]);
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor> gradients(Tensor grad, Tensor x, Tensor down, Tensor up, int64_t padding) {
  STD_TORCH_CHECK(grad.dim() == 4 && x.dim() == 4 && down.dim() == 4 && up.dim() == 2,
                  "grad, x, down, up: expected 4, 4, 4 and 2 dimensions, got ", shape_of(grad), ", ", shape_of(x), ", ",
                  shape_of(down), " and ", shape_of(up));
  const ScalarType type = x.scalar_type();
  const Problem p{x.size(0), up.size(0), x.size(1), down.size(0), x.size(2), x.size(3), down.size(2), padding};
  STD_TORCH_CHECK(p.kernel >= 1 && p.kernel <= packed_conv2d::kMaxKernel && p.padding >= 0,
                  "kernel, padding: expected 1 to 7 and 0 or more");
  check_shape("down", down, {p.rank, p.in, p.kernel, p.kernel});
  check_shape("up", up, {p.out, p.rank});
  check_shape("grad", grad, {p.n, p.out, p.down().grad_height(), p.down().grad_width()});
  STD_TORCH_CHECK(grad.scalar_type() == type && down.scalar_type() == type && up.scalar_type() == type,
                  "grad, down, up: expected x's dtype, got another one");
  return dispatch_storage(type, "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor pixels = channels_inside(x), gradients = channels_inside(grad), dense_down = dense(down);
    const Tensor dense_up = dense(up);
    const Tensor g_down = empty_beside(x, {p.rank, p.in, p.kernel, p.kernel}, wide_type(type));
    const Tensor g_up = empty_beside(x, {p.rank, p.out}, wide_type(type));
    const Factors<T> factors{dense_up.const_data_ptr<T>(), dense_down.const_data_ptr<T>()};
    const T *from = gradients.const_data_ptr<T>(), *at = pixels.const_data_ptr<T>();
    Wide<T>*to_down = g_down.mutable_data_ptr<Wide<T>>(), *to_up = g_up.mutable_data_ptr<Wide<T>>();
    const auto found = [&] { return std::tuple(g_down, dense(torch::stable::transpose(g_up, 0, 1))); };
#ifdef LORUN_AMX
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (has_amx() && p.rank <= kMaxRank) {
        by_tiles(p, factors, from, at, to_down, to_up);
        return found();
      }
    }
#endif
    by_loops(p, factors, from, at, to_down, to_up);
    return found();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("packed_factor_gradients", TORCH_BOX(&gradients));
}

}  // namespace lorun::packed_factor_gradients
