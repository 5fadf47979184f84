// Single-disperser CASSI on the CPU (formulas in cassi.h).
//
// The step moves few bytes per operation, so what counts is that memory is walked well. A thread takes a few rows at a
// time, through all bands twice, first for the sum over bands, then for z. Within a band rows are consecutive: a few
// kilobytes in one piece, which the hardware's prefetchers and few entries of the TLB serve, where single rows of 28
// bands would jump from page to page. a and r, the rows of a measurement, stay in the first-level cache, and what is
// left of x between the two in the second. The gradient never exists. Results too large for the caches go past them,
// so that z is not read before it is written.

#include "cassi/cassi.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>

#include "cassi/checks.h"
#include "common/caches.h"
#include "common/convert.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "common/tensor.h"

#ifdef LORUN_X86
#include <immintrin.h>
#endif

namespace lorun::cassi {

// What happens to a row: kGather adds it up, kSpread writes its z, kAdjoint writes Phi^T.
enum class Part { kGather, kSpread, kAdjoint };

constexpr int kTogether = 4;  // bands of a group, at most

// One band of one row. `next_*` lead from a column of it to the one that lies under it on the detector, of the next
// band of its group.
template <class T>
struct Band {
  T* z;
  const T* x;
  const Wide<T>*m, *r;
  Wide<T>* a;
  int64_t next_z, next_x, next_m;
  Wide<T> k[kTogether];
};

// All bands of a few rows. Rows of z and of the mask are `width` apart, those of r and a `pitch`.
template <class T>
struct Lines {
  int64_t rows, bands, width, step, z_band, x_band, x_row, m_band, k_band, pitch;
  T* z;
  const T* x;
  const Wide<T>*m, *r, *k;
  Wide<T>* a;

  // Band c of row i, the first of Count that are `distance` apart.
  template <int Count>
  LORUN_INLINE Band<T> band(int64_t i, int64_t c, int64_t distance) const {
    const int64_t back = distance * step;
    Band<T> b{z + c * z_band + i * width, x + c * x_band + i * x_row, m + c * m_band + i * width,
              r + c * step + i * pitch,   a + c * step + i * pitch,   distance * z_band - back,
              distance * x_band - back,   distance * m_band - back,   {}};
#pragma GCC unroll 4
    for (int n = 0; n < Count; ++n) {
      b.k[n] = k[(c + n * distance) * k_band];
    }
    return b;
  }
};

}  // namespace lorun::cassi

#define LORUN_KERNELS "cassi/rows.inl"
#include "common/for_each_variant.h"

namespace lorun::cassi {
namespace {

// What a thread goes through twice: measurements, half a first-level cache; and of x, with as much of z half a
// second-level one.
constexpr int64_t kRowBytes = 16 << 10, kImageBytes = 128 << 10;

// An image as the kernels take it, its row pointers, and its mask.
template <class T>
struct Coded {
  using W = Wide<T>;
  Geometry g;
  ImageStrides strides;
  const T* x;
  const W* mask;
  int64_t m_sample, m_band;

  const T* row_of_x(int64_t row) const {
    return x + row / g.height * strides.sample + row % g.height * strides.row;
  }

  const W* row_of_mask(int64_t row) const {
    return mask + row / g.height * m_sample + row % g.height * g.width;
  }

  int64_t row_of_z(int64_t row) const {
    return (row / g.height * g.bands * g.height + row % g.height) * g.width;
  }

  // Rows [begin, end) of one sample.
  Lines<T> lines(int64_t begin, int64_t end, int64_t pitch) const {
    static constexpr W kOne = 1;
    Lines<T> l{};
    l.rows = end - begin, l.bands = g.bands, l.width = g.width, l.step = g.step, l.pitch = pitch;
    l.z_band = g.height * g.width, l.x_band = strides.band, l.x_row = strides.row, l.m_band = m_band;
    l.x = row_of_x(begin), l.m = row_of_mask(begin), l.k = &kOne;
    return l;
  }

  // Phi x of these rows.
  void gather(int64_t begin, int64_t end, int64_t pitch, W* a) const {
    std::fill_n(a, (end - begin) * pitch, W(0));
    Lines<T> l = lines(begin, end, pitch);
    l.a = a;
    LORUN_PICK(lines<T, Part::kGather, false>)(l);
  }
};

template <class T>
Coded<T> coded(const Tensor& x, const OperatorTensors& op) {
  return {op.g, strides_of(x), x.const_data_ptr<T>(), op.mask.const_data_ptr<Wide<T>>(), op.m_sample, op.m_band};
}

// Streaming stores are not ordered with what follows; the thread that reads z next must see them.
void finish_streaming() {
#ifdef LORUN_X86
  _mm_sfence();
#endif
}

// f(begin, end, pitch, work) over the rows of all samples, a few of one sample at a time; `work` holds as many rows of
// measurements, `pitch` apart.
template <class T, class F>
void parallel_rows(const Geometry& g, const F& f) {
  using W = Wide<T>;
  const int64_t pitch = (g.measured() + 15) / 16 * 16;
  const auto rows_in = [](int64_t bytes, int64_t row) { return bytes / std::max<int64_t>(1, row); };
  const int64_t together = std::clamp<int64_t>(
      std::min(rows_in(kRowBytes, pitch * sizeof(W)), rows_in(kImageBytes, g.bands * g.width * sizeof(T))), 1, 8);
  parallel(g.rows(), g.bands * g.width, [&](int64_t begin, int64_t end) {
    W* work = static_cast<W*>(scratch<Geometry>(together * pitch * sizeof(W)));
    while (begin < end) {
      const int64_t stop = std::min({begin + together, end, (begin / g.height + 1) * g.height});
      f(begin, stop, pitch, work);
      begin = stop;
    }
    finish_streaming();
  });
}

// Whether a result of this size would not stay in the caches beside what it was made from.
bool past_caches(int64_t bytes) {
  return bytes > last_level_cache() / 2;
}

Tensor forward(Tensor x, Tensor mask, int64_t step) {
  const OperatorTensors op = operator_of_image(x, mask, step);
  const Geometry g = op.g;
  const Tensor in = with_unit_columns(x);
  const Tensor y = empty_beside(x, {g.samples, g.height, g.measured()}, x.scalar_type());
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    const Coded<T> image = coded<T>(in, op);
    T* out = y.mutable_data_ptr<T>();
    parallel_rows<T>(g, [&](int64_t begin, int64_t end, int64_t pitch, W* a) {
      image.gather(begin, end, pitch, a);
      for (int64_t row = begin; row < end; ++row) {
        LORUN_PICK(narrow_row<T>)(a + (row - begin) * pitch, out + row * g.measured(), g.measured());
      }
    });
  });
  return y;
}

Tensor adjoint(Tensor y, Tensor mask, int64_t bands, int64_t step) {
  const OperatorTensors op = operator_of_measurement(y, mask, bands, step);
  const Geometry g = op.g;
  const Tensor in = dense(y);
  const Tensor x = empty_beside(y, {g.samples, g.bands, g.height, g.width}, y.scalar_type());
  dispatch_storage(y.scalar_type(), "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    const Coded<T> image = coded<T>(x, op);
    const T* measured = in.const_data_ptr<T>();
    T* out = x.mutable_data_ptr<T>();
    const bool stream = past_caches(x.numel() * sizeof(T));
    parallel_rows<T>(g, [&](int64_t begin, int64_t end, int64_t pitch, W* r) {
      for (int64_t row = begin; row < end; ++row) {
        LORUN_PICK(widen_row<T>)(measured + row * g.measured(), r + (row - begin) * pitch, g.measured());
      }
      Lines<T> l = image.lines(begin, end, pitch);
      l.z = out + image.row_of_z(begin), l.r = r;
      (stream ? LORUN_PICK(lines<T, Part::kAdjoint, true>) : LORUN_PICK(lines<T, Part::kAdjoint, false>))(l);
    });
  });
  return x;
}

std::tuple<Tensor, Tensor> step(Tensor x, std::optional<Tensor> y, Tensor mask, Tensor rho,
                                std::optional<Tensor> weight, int64_t step, bool keep_residual) {
  const OperatorTensors op = operator_of_image(x, mask, step);
  const Geometry g = op.g;
  const ScalarType wide = wide_type(x.scalar_type());
  const StepTensors tensors(g, wide, y, rho, weight);
  const Tensor in = with_unit_columns(x);
  const Tensor z = empty_beside(x, {g.samples, g.bands, g.height, g.width}, x.scalar_type());
  const Tensor residual =
      keep_residual ? empty_beside(mask, {g.samples, g.height, g.measured()}, wide) : empty_beside(mask, {0}, wide);
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    const Coded<T> image = coded<T>(in, op);
    T* out = z.mutable_data_ptr<T>();
    const StepArguments<W> with = tensors.arguments<W>(g);
    W* keep = keep_residual ? residual.mutable_data_ptr<W>() : nullptr;
    const bool stream = past_caches(z.numel() * sizeof(T));
    parallel_rows<T>(g, [&](int64_t begin, int64_t end, int64_t pitch, W* r) {
      image.gather(begin, end, pitch, r);
      for (int64_t row = begin; row < end; ++row) {
        LORUN_PICK(weigh_row<W>)(r + (row - begin) * pitch, with.y ? with.y + row * g.measured() : nullptr,
                                 keep ? keep + row * g.measured() : nullptr,
                                 with.weight ? with.weight + row % with.weight_rows * g.measured() : nullptr,
                                 g.measured());
      }
      Lines<T> l = image.lines(begin, end, pitch);
      l.z = out + image.row_of_z(begin), l.r = r;
      l.k = with.rho + begin / g.height * with.rho_sample, l.k_band = with.rho_band;
      (stream ? LORUN_PICK(lines<T, Part::kSpread, true>) : LORUN_PICK(lines<T, Part::kSpread, false>))(l);
    });
  });
  return {z, residual};
}

// 1 / (mu + Phi_s), row by row.
Tensor prox_weight(Tensor mask, Tensor mu, int64_t bands, int64_t step) {
  const OperatorTensors op = operator_of_weight(mask, mu, bands, step);
  const Geometry g = op.g;
  const Tensor each = dense(mu);
  const Tensor weight = empty_beside(mask, {g.samples, g.height, g.measured()}, mask.scalar_type());
  dispatch_wide(mask.scalar_type(), "mask", [&](auto tag) {
    using W = typename decltype(tag)::type;
    const W *m = op.mask.const_data_ptr<W>(), *first = each.const_data_ptr<W>();
    W* to = weight.mutable_data_ptr<W>();
    parallel(g.height, g.bands * g.width + g.samples * g.measured(), [&](int64_t begin, int64_t end) {
      W* sum = static_cast<W*>(scratch<struct Diagonal>(g.measured() * sizeof(W)));
      for (int64_t h = begin; h < end; ++h) {
        multiversion([&](auto) LORUN_INLINE {
          for (int64_t n = 0; n < g.samples; ++n) {
            if (n == 0 || op.m_sample != 0) {
              std::fill_n(sum, g.measured(), W(0));
              for (int64_t c = 0; c < g.bands; ++c) {
                const W* from = m + n * op.m_sample + c * op.m_band + h * g.width;
                for (int64_t j = 0; j < g.width; ++j) {
                  sum[c * step + j] += from[j] * from[j];
                }
              }
            }
            W* row = to + (n * g.height + h) * g.measured();
            for (int64_t j = 0; j < g.measured(); ++j) {
              row[j] = W(1) / (first[n] + (sum[j] == 0 ? W(1) : sum[j]));
            }
          }
        });
      }
    });
  });
  return weight;
}

// Samples and bands that share a mask are added up in order, whatever the number of threads.
Tensor grad_mask(Tensor x, Tensor y, int64_t step, bool per_band, bool per_sample) {
  const Geometry g = geometry_of(x, y, step);
  const Tensor in = with_unit_columns(x), measured = dense(y);
  const Tensor out = empty_mask(y, g, per_band, per_sample);
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    const T* image = in.const_data_ptr<T>();
    const W* beside = measured.const_data_ptr<W>();
    W* to = out.mutable_data_ptr<W>();
    const ImageStrides s = strides_of(in);
    const int64_t plane = g.height * g.width, of_band = per_band ? plane : 0;
    const int64_t of_sample = per_sample ? (per_band ? g.bands : 1) * plane : 0;
    const int64_t masks = plane == 0 ? 0 : out.numel() / plane;
    parallel(g.height, g.samples * g.bands * g.width, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) {
        for (int64_t k = 0; k < masks; ++k) {
          std::fill_n(to + k * plane + h * g.width, g.width, W(0));
        }
        for (int64_t c = 0; c < g.bands; ++c) {
          for (int64_t n = 0; n < g.samples; ++n) {
            LORUN_PICK(add_products<T>)(image + n * s.sample + c * s.band + h * s.row,
                                        beside + (n * g.height + h) * g.measured() + c * step,
                                        to + n * of_sample + c * of_band + h * g.width, g.width);
          }
        }
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("cassi", TORCH_BOX(&forward));
  m.impl("cassi_adjoint", TORCH_BOX(&adjoint));
  m.impl("cassi_step", TORCH_BOX(&step));
  m.impl("cassi_grad_mask", TORCH_BOX(&grad_mask));
  m.impl("cassi_prox_weight", TORCH_BOX(&prox_weight));
}

}  // namespace lorun::cassi
