// Single-disperser CASSI on the CPU (formulas in cassi.h).
//
// The step moves few bytes per operation, so what counts is that x is read and z written once. A thread takes a run of
// rows; of a row it needs all bands twice, first for the sum over bands, then for z. Between the two only one row of
// all bands passes, which the second-level cache holds; a and r, one row of a measurement each, stay in the first.
// The gradient never exists. Results too large for the caches go past them, so that z is not read before it is written.

#include "cassi/cassi.h"

#include <torch/csrc/stable/library.h>
#include <unistd.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>

#include "cassi/checks.h"
#include "common/convert.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "common/tensor.h"

#ifdef LORUN_X86
#include <immintrin.h>
#endif

namespace lorun::cassi {

// What happens to a row: kGather adds it up, kSpread writes its z, kBoth writes its z and adds up the next row,
// kAdjoint writes Phi^T.
enum class Part { kGather, kSpread, kBoth, kAdjoint };

// One band of one row, and the same band of the row to gather, x_row after which another follows. A second band, the
// partner, is reached by offsets that take a column of the first to the one that lies under it on the detector.
template <class T>
struct Band {
  T* z;
  const T *x, *next_x;
  const Wide<T>*m, *next_m, *r;
  Wide<T>* a;
  Wide<T> k, partner_k;
  int64_t x_row, partner_z, partner_x, partner_m;
};

// All bands of one row, and of the row to gather.
template <class T>
struct Line {
  int64_t bands, width, step, z_band, x_band, x_row, m_band, k_band;
  T* z;
  const T *x, *next_x;
  const Wide<T>*m, *next_m, *r, *k;
  Wide<T>* a;

  Band<T> band(int64_t c, int64_t partner) const {
    const int64_t bands_on = partner - c, back = bands_on * step;
    return {z + c * z_band,
            x + c * x_band,
            next_x + c * x_band,
            m + c * m_band,
            next_m + c * m_band,
            r + c * step,
            a + c * step,
            k[c * k_band],
            k[partner * k_band],
            x_row,
            bands_on * z_band - back,
            bands_on * x_band - back,
            bands_on * m_band - back};
  }
};

}  // namespace lorun::cassi

#define LORUN_KERNELS "cassi/rows.inl"
#include "common/for_each_variant.h"

namespace lorun::cassi {
namespace {

// An image as the kernels take it, its row pointers, and its mask.
template <class T>
struct Coded {
  using W = Wide<T>;
  Geometry g;
  ImageStrides strides;
  const T* x;
  const W* mask;
  int64_t m_band;

  const T* row_of_x(int64_t row) const {
    return x + row / g.height * strides.sample + row % g.height * strides.row;
  }

  const W* row_of_mask(int64_t row) const {
    return mask + row % g.height * g.width;
  }

  int64_t row_of_z(int64_t row) const {
    return (row / g.height * g.bands * g.height + row % g.height) * g.width;
  }

  Line<T> line() const {
    static constexpr W kOne = 1;
    Line<T> l{};
    l.bands = g.bands, l.width = g.width, l.step = g.step;
    l.z_band = g.height * g.width, l.x_band = strides.band, l.x_row = strides.row, l.m_band = m_band;
    l.k = &kOne;
    return l;
  }

  // Phi x of one row.
  void gather(int64_t row, W* a) const {
    std::fill_n(a, g.measured(), W(0));
    Line<T> l = line();
    l.next_x = row_of_x(row), l.next_m = row_of_mask(row), l.a = a;
    LORUN_PICK(line<T, Part::kGather, false>)(l);
  }
};

template <class T>
Coded<T> coded(const Tensor& x, const OperatorTensors& op) {
  return {op.g, strides_of(x), x.const_data_ptr<T>(), op.mask.const_data_ptr<Wide<T>>(), op.m_band};
}

// f(begin, end) over the rows of all samples.
template <class F>
void parallel_rows(const Geometry& g, const F& f) {
  parallel(g.rows(), g.bands * g.width, f);
}

// Whether a result of this size would not stay in the caches beside what it was made from.
bool past_caches(int64_t bytes) {
  static const int64_t last_level = [] {
    int64_t size = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    size = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return size > 0 ? size : int64_t{32} << 20;
  }();
  return bytes > last_level / 2;
}

// Streaming stores are not ordered with what follows; the thread that reads z next must see them.
void finish_streaming() {
#ifdef LORUN_X86
  _mm_sfence();
#endif
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
    parallel_rows(g, [&](int64_t begin, int64_t end) {
      W* a = static_cast<W*>(scratch<Geometry>(g.measured() * sizeof(W)));
      for (int64_t row = begin; row < end; ++row) {
        image.gather(row, a);
        LORUN_PICK(narrow_row<T>)(a, out + row * g.measured(), g.measured());
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
    parallel_rows(g, [&](int64_t begin, int64_t end) {
      W* r = static_cast<W*>(scratch<Geometry>(g.measured() * sizeof(W)));
      for (int64_t row = begin; row < end; ++row) {
        LORUN_PICK(widen_row<T>)(measured + row * g.measured(), r, g.measured());
        Line<T> l = image.line();
        l.z = out + image.row_of_z(row), l.m = image.row_of_mask(row), l.r = r;
        (stream ? LORUN_PICK(line<T, Part::kAdjoint, true>) : LORUN_PICK(line<T, Part::kAdjoint, false>))(l);
      }
      finish_streaming();
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
    parallel_rows(g, [&](int64_t begin, int64_t end) {
      const int64_t pitch = (g.measured() + 63) / 64 * 64;
      W* r = static_cast<W*>(scratch<Geometry>(2 * pitch * sizeof(W)));
      W* a = r + pitch;
      image.gather(begin, a);
      for (int64_t row = begin; row < end; ++row) {
        std::swap(r, a);
        LORUN_PICK(weigh_row<W>)(
            r, with.y ? with.y + row * g.measured() : nullptr, keep ? keep + row * g.measured() : nullptr,
            with.weight ? with.weight + row % with.weight_rows * g.measured() : nullptr, g.measured());
        Line<T> l = image.line();
        l.z = out + image.row_of_z(row), l.x = image.row_of_x(row), l.m = image.row_of_mask(row), l.r = r;
        l.k = with.rho + row / g.height * with.rho_sample, l.k_band = with.rho_band;
        if (row + 1 < end) {
          std::fill_n(a, g.measured(), W(0));
          l.next_x = image.row_of_x(row + 1), l.next_m = image.row_of_mask(row + 1), l.a = a;
          (stream ? LORUN_PICK(line<T, Part::kBoth, true>) : LORUN_PICK(line<T, Part::kBoth, false>))(l);
        } else {
          (stream ? LORUN_PICK(line<T, Part::kSpread, true>) : LORUN_PICK(line<T, Part::kSpread, false>))(l);
        }
      }
      finish_streaming();
    });
  });
  return {z, residual};
}

// Samples and, for a mask (H, W), bands are added up in order, whatever the number of threads.
Tensor grad_mask(Tensor x, Tensor y, int64_t step, bool per_band) {
  const Geometry g = geometry_of(x, y, step);
  const ScalarType wide = y.scalar_type();
  const Tensor in = with_unit_columns(x), measured = dense(y);
  const Tensor out =
      per_band ? empty_beside(y, {g.bands, g.height, g.width}, wide) : empty_beside(y, {g.height, g.width}, wide);
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    const T* image = in.const_data_ptr<T>();
    const W* beside = measured.const_data_ptr<W>();
    W* to = out.mutable_data_ptr<W>();
    const ImageStrides s = strides_of(in);
    parallel(g.height, g.samples * g.bands * g.width, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) {
        for (int64_t c = 0; c < g.bands; ++c) {
          W* sum = to + (per_band ? c * g.height + h : h) * g.width;
          if (per_band || c == 0) {
            std::fill_n(sum, g.width, W(0));
          }
          for (int64_t n = 0; n < g.samples; ++n) {
            LORUN_PICK(add_products<T>)(image + n * s.sample + c * s.band + h * s.row,
                                        beside + (n * g.height + h) * g.measured() + c * step, sum, g.width);
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
}

}  // namespace lorun::cassi
