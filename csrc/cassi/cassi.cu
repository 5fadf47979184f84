// Single-disperser CASSI on CUDA (formulas in cassi.h).
//
// A step reads x once and writes z once, two operations a byte: the time of a copy is the limit, and what stands in its
// way is the number of instructions and how many loads are under way. A thread owns V neighbouring columns of one row
// of a measurement, and with them what lies under them in all bands: no two threads meet. It asks for x and the mask of
// all bands at once, into registers, sums r = w (sum over bands - y), and writes z = x - k m r: no shared memory, no
// warp waits for another, every value is read once. Phi x is the first half, Phi^T y the second. Every sum has
// one order: no atomics. On an H200 the step of 16 images takes 65 us in fp32, a copy of x 58; in bf16 38 and 31.
//
// V = 2 where step, width, strides and addresses let all pairs be read and written at once, which halves the accesses
// and the arithmetic of addresses. Not 4: at step 2 every other band would split a quadruple in two accesses again, for
// twice the registers. bf16 and fp16 wait in pairs of 16 bits, and a thread widens them twice.
//
// Loads are ordinary ones. Warps begin anywhere within 32 bytes, and neighbours share those that they split through the
// first-level cache; z is what the next layer reads.
//
// Bands are unrolled up to a count known when compiled. With more of them than kMostBandsKept, and where x is not
// needed again, a thread takes kBandsAtOnce after another; a step then reads x and the mask twice, the second time from
// the caches.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <type_traits>

#include "cassi/cassi.h"
#include "cassi/checks.h"
#include "common/cuda.cuh"
#include "common/tensor.h"

namespace lorun::cassi {
namespace {

// Registers hold ten warps or more of a multiprocessor: two blocks of this size fit, and so one image of 256 rows,
// whose 310 columns at 28 bands and step 2 are 155 pairs, is one wave of 132 multiprocessors.
constexpr int kMostThreads = 160;
constexpr int kMostBandsKept = 32;
constexpr int kBandsAtOnce = 8;  // where they are not kept

enum class Part { kForward, kAdjoint, kStep };

// V neighbours of a row.
template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  T at[V];
};

template <int V, class T>
__device__ auto pack_at(T* first) {
  using Values = Pack<std::remove_const_t<T>, V>;
  return reinterpret_cast<std::conditional_t<std::is_const_v<T>, const Values, Values>*>(first);
}

// A pair of bf16 by hand: CUDA's conversion takes two instructions for the upper one.
template <class T, int V>
__device__ Pack<Wide<T>, V> widened(const WordsOf<Pack<T, V>>& words) {
  Pack<Wide<T>, V> out;
  if constexpr (std::is_same_v<T, BFloat16> && V == 2) {
    const unsigned bits[] = {words << 16, words & 0xffff0000u};
    memcpy(&out, bits, sizeof(out));
  } else {
    const auto values = from_words<Pack<T, V>>(words);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out.at[v] = static_cast<Wide<T>>(values.at[v]);
    }
  }
  return out;
}

template <class T, int V>
__device__ Pack<T, V> narrowed(const Pack<Wide<T>, V>& values) {
  Pack<T, V> out;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    out.at[v] = static_cast<T>(values.at[v]);
  }
  return out;
}

// Bytes from one sample, row and band to the next. To the next band: one band on and one shift back, which stays under
// the same column of the measurement.
struct Strides {
  int64_t sample, row, band;
};

// V neighbours in one band, then in the next. By additions of bytes: a 64-bit product for each band was most of what a
// thread did.
template <class T, int V>
class Walk {
 public:
  __device__ Walk(T* tensor, const Strides& by, unsigned sample, unsigned row, int column)
      : at_(reinterpret_cast<Byte*>(tensor + column) + sample * by.sample + row * by.row), band_(by.band) {}

  __device__ auto pack() const {
    return pack_at<V>(reinterpret_cast<T*>(at_));
  }

  __device__ void next() {
    at_ += band_;
  }

 private:
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  Byte* at_;
  int64_t band_;
};

template <class T>
struct Task {
  using W = Wide<T>;
  const T* x;
  const W* mask;
  T* z;
  Strides of_x, of_mask, of_z;
  const T* measured;  // of the adjoint
  T* y;               // of the forward op
  StepArguments<W> with;
  W* residual;
  unsigned height;
  int bands, width, step, columns, tiles;  // columns: of a measurement, of which a block takes one of `tiles` parts
};

// What a thread holds of B bands under its V columns. Bit c of `under`: band c has values there. Whole: all have.
template <class T, Part P, int V, int B>
struct Bands {
  using W = Wide<T>;
  WordsOf<Pack<T, V>> x[B];
  Pack<W, V> m[B];

  template <bool Whole>
  __device__ void read(Walk<const T, V>& image, Walk<const W, V>& mask, unsigned under) {
    if constexpr (P != Part::kAdjoint) {
#pragma unroll
      for (int c = 0; c < B; ++c) {
        x[c] = Whole || (under >> c & 1) ? load_words(image.pack()) : WordsOf<Pack<T, V>>{};
        image.next();
      }
    }
#pragma unroll
    for (int c = 0; c < B; ++c) {
      m[c] = Whole || (under >> c & 1) ? load(mask.pack()) : Pack<W, V>{};
      mask.next();
    }
  }

  __device__ void add_to(Pack<W, V>& sum) const {
#pragma unroll
    for (int c = 0; c < B; ++c) {
      const Pack<W, V> values = widened<T, V>(x[c]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum.at[v] += values.at[v] * m[c].at[v];
      }
    }
  }

  template <bool Whole, bool PerBand>
  __device__ void spread(Walk<T, V>& z, const Pack<W, V>& r, const W* rho, unsigned under) const {
#pragma unroll
    for (int c = 0; c < B; ++c) {
      const bool here = Whole || (under >> c & 1);
      const W k = !PerBand ? 1 : here ? rho[c] : 0;
      Pack<W, V> out;
      if constexpr (P == Part::kStep) {
        WordsOf<Pack<T, V>> words = x[c];
        recompute(words);
        out = widened<T, V>(words);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const W kr = PerBand ? k * r.at[v] : r.at[v];
        out.at[v] = P == Part::kStep ? out.at[v] - kr * m[c].at[v] : kr * m[c].at[v];
      }
      store(z.pack(), narrowed<T, V>(out), here);
      z.next();
    }
  }
};

// The lowest `count` bits, of 32.
__device__ inline unsigned low_bits(int count) {
  return static_cast<unsigned>((uint64_t{1} << min(max(count, 0), 32)) - 1);
}

// Kept: all bands are among these B, and stay in registers.
template <class T, Part P, int V, int B, bool Kept>
__global__ void __launch_bounds__(kMostThreads, 2) columns_of_measurements(const Task<T> t) {
  using W = Wide<T>;
  const unsigned row = blockIdx.x / static_cast<unsigned>(t.tiles), tile = blockIdx.x - row * t.tiles;
  const unsigned sample = row / t.height, i = row - sample * t.height;
  const int j = static_cast<int>(tile * blockDim.x + threadIdx.x) * V;
  if (j >= t.columns) {
    return;
  }
  // A warp with values of all bands under all of its columns needs no tests.
  const int first = j - static_cast<int>(threadIdx.x % 32) * V;
  const bool inside = first >= t.columns - t.width && first + 32 * V <= t.width;
  int begin = 0, end = t.bands;  // of the bands with values under this thread's
  if (!inside && t.step > 0) {
    const unsigned step = t.step;
    begin = j < t.width ? 0 : (j - t.width) / step + 1;
    end = min(end, static_cast<int>(j / step) + 1);
  }
  const auto for_all_bands = [&](const auto& work) {
    for (int c = 0; c < (Kept ? 1 : t.bands); c += B) {
      if (inside && c + B <= t.bands) {
        work(std::true_type{}, c, 0u);
      } else {
        work(std::false_type{}, c, low_bits(end - c) & ~low_bits(begin - c));
      }
    }
  };

  Walk<const T, V> x(t.x, t.of_x, sample, i, j);
  Walk<const W, V> mask(t.mask, t.of_mask, sample, i, j);
  const int64_t at = static_cast<int64_t>(row) * t.columns + j;
  const W* const rho = P == Part::kStep ? t.with.rho + sample * t.with.rho_sample : nullptr;
  const bool per_band = P == Part::kStep && t.with.rho_band != 0;
  Bands<T, P, V, B> bands;
  Pack<W, V> r{};
  if constexpr (P == Part::kAdjoint) {
    r = widened<T, V>(load_words(pack_at<V>(t.measured + at)));
  } else {
    Pack<W, V> y{}, weight;
    W k = 1;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      weight.at[v] = 1;
    }
    for_all_bands([&](auto whole, int c, unsigned under) {
      bands.template read<whole.value>(x, mask, under);
      if (P == Part::kStep && c == 0) {
        if (t.with.y != nullptr) {
          y = load(pack_at<V>(t.with.y + at));
        }
        if (t.with.weight != nullptr) {
          const int64_t weight_row = t.with.weight_rows == t.height ? i : row;
          weight = load(pack_at<V>(t.with.weight + weight_row * t.columns + j));
        }
        if (!per_band) {
          k = *rho;
        }
      }
      __syncwarp();  // for the compiler, which would wait for the first values before it asks for the last
      bands.add_to(r);
    });
    if constexpr (P == Part::kForward) {
      store(pack_at<V>(t.y + at), narrowed<T, V>(r));
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        r.at[v] -= y.at[v];
      }
      if (t.residual != nullptr) {
        store(pack_at<V>(t.residual + at), r);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        r.at[v] *= k * weight.at[v];
      }
    }
  }

  if constexpr (P != Part::kForward) {
    Walk<T, V> z(t.z, t.of_z, sample, i, j);
    if constexpr (!Kept) {
      x = Walk<const T, V>(t.x, t.of_x, sample, i, j);
      mask = Walk<const W, V>(t.mask, t.of_mask, sample, i, j);
    }
    for_all_bands([&](auto whole, int c, unsigned under) {
      if constexpr (!Kept) {
        bands.template read<whole.value>(x, mask, under);
      }
      if (per_band) {
        bands.template spread<whole.value, true>(z, r, rho + c, under);
      } else {
        bands.template spread<whole.value, false>(z, r, rho, under);
      }
    });
  }
}

// out = sum over samples, unless per_sample, and over bands, unless per_band, of x y: one thread an element.
template <class T>
__global__ void __launch_bounds__(256) sum_of_products(const Geometry g, const ImageStrides s, const T* x,
                                                       const Wide<T>* y, Wide<T>* out, bool per_band, bool per_sample) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t masks = per_band ? g.bands : 1;
  if (index >= (per_sample ? g.samples : 1) * masks * g.height * g.width) {
    return;
  }
  const int64_t j = index % g.width, i = index / g.width % g.height, mask = index / g.width / g.height;
  const int64_t sample = mask / masks, band = mask - sample * masks;
  const int64_t bands = per_band ? band + 1 : g.bands, samples = per_sample ? sample + 1 : g.samples;
  Wide<T> sum = 0;
  for (int64_t c = band; c < bands; ++c) {
    for (int64_t n = sample; n < samples; ++n) {
      sum += static_cast<Wide<T>>(x[n * s.sample + c * s.band + i * s.row + j]) *
             y[(n * g.height + i) * g.measured() + c * g.step + j];
    }
  }
  out[index] = sum;
}

// weight = 1 / (mu + Phi_s) of every sample, zeros of Phi_s set to 1: one thread a pixel of the detector.
template <class W>
__global__ void __launch_bounds__(256)
    inverse_of_diagonal(const Geometry g, const W* mask, int64_t m_sample, int64_t m_band, const W* mu, W* weight) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= g.height * g.measured()) {
    return;
  }
  const int64_t j = index % g.measured(), i = index / g.measured();
  W diagonal = 1;
  for (int64_t n = 0; n < g.samples; ++n) {
    if (n == 0 || m_sample != 0) {
      W sum = 0;
      for (int64_t c = 0; c < g.bands; ++c) {
        const int64_t column = j - c * g.step;
        if (column >= 0 && column < g.width) {
          const W m = mask[n * m_sample + c * m_band + i * g.width + column];
          sum += m * m;
        }
      }
      diagonal = sum == W(0) ? W(1) : sum;
    }
    weight[n * g.height * g.measured() + index] = W(1) / (mu[n] + diagonal);
  }
}

// Whether rows that begin here and have this many elements between them can be read and written by pairs.
template <class T>
bool paired(const T* first, int64_t between = 0) {
  return reinterpret_cast<uintptr_t>(first) % (2 * sizeof(T)) == 0 && between % 2 == 0;
}

template <class T, Part P>
void run(const OnDeviceOf& device, const OperatorTensors& op, const ImageStrides& s, Task<T> t) {
  const Geometry& g = op.g;
  if (g.rows() * g.measured() == 0) {
    return;
  }
  STD_TORCH_CHECK(g.measured() <= 0x3fffffff, "expected at most 2^30 - 1 columns, got ", g.measured());
  const int64_t step = g.bands > 1 ? g.step : 0;
  t.height = static_cast<unsigned>(g.height);
  t.bands = static_cast<int>(g.bands), t.width = static_cast<int>(g.width), t.step = static_cast<int>(step);
  t.columns = static_cast<int>(g.measured());
  const auto bytes = [](auto* of, int64_t sample, int64_t row, int64_t band) {
    const int64_t each = sizeof(*of);
    return Strides{sample * each, row * each, band * each};
  };
  const int64_t plane = g.height * g.width;
  t.of_x = bytes(t.x, s.sample, s.row, s.band - step);
  t.mask = op.mask.const_data_ptr<Wide<T>>();
  t.of_mask = bytes(t.mask, op.m_sample, g.width, op.m_band - step);
  t.of_z = bytes(t.z, g.bands * plane, g.width, plane - step);
  const auto start = [&](auto v) {
    constexpr int V = decltype(v)::value;
    const int64_t groups = g.measured() / V;
    t.tiles = static_cast<int>((groups + kMostThreads - 1) / kMostThreads);
    const int64_t threads = ((groups + t.tiles - 1) / t.tiles + 31) / 32 * 32;
    const auto with = [&](auto kernel) { launch(device, kernel, g.rows() * t.tiles, threads, 0, t); };
    if constexpr (P == Part::kStep) {
      if (t.bands <= 8) {
        return with(&columns_of_measurements<T, P, V, 8, true>);
      }
      if (t.bands <= 16) {
        return with(&columns_of_measurements<T, P, V, 16, true>);
      }
      if (t.bands <= 28) {
        return with(&columns_of_measurements<T, P, V, 28, true>);
      }
      if (t.bands <= kMostBandsKept) {
        return with(&columns_of_measurements<T, P, V, kMostBandsKept, true>);
      }
    }
    with(&columns_of_measurements<T, P, V, kBandsAtOnce, false>);
  };
  if constexpr (sizeof(T) <= 4) {
    if (step % 2 == 0 && paired(t.x, s.sample | s.band | s.row) && paired(t.mask, g.width | op.m_band | op.m_sample) &&
        paired(t.z) && paired(t.y) && paired(t.measured) && paired(t.with.y) && paired(t.with.weight) &&
        paired(t.residual)) {
      return start(std::integral_constant<int, 2>{});
    }
  }
  start(std::integral_constant<int, 1>{});
}

Tensor forward(Tensor x, Tensor mask, int64_t step) {
  const OnDeviceOf device(x);
  const OperatorTensors op = operator_of_image(x, mask, step);
  const Geometry& g = op.g;
  const Tensor in = with_unit_columns(x);
  const Tensor y = empty_beside(x, {g.samples, g.height, g.measured()}, x.scalar_type());
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    Task<T> t{};
    t.x = in.const_data_ptr<T>(), t.y = y.mutable_data_ptr<T>();
    run<T, Part::kForward>(device, op, strides_of(in), t);
  });
  return y;
}

Tensor adjoint(Tensor y, Tensor mask, int64_t bands, int64_t step) {
  const OnDeviceOf device(y);
  const OperatorTensors op = operator_of_measurement(y, mask, bands, step);
  const Geometry& g = op.g;
  const Tensor in = dense(y);
  const Tensor x = empty_beside(y, {g.samples, g.bands, g.height, g.width}, y.scalar_type());
  dispatch_storage(y.scalar_type(), "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    Task<T> t{};
    t.measured = in.const_data_ptr<T>(), t.z = x.mutable_data_ptr<T>();
    run<T, Part::kAdjoint>(device, op, {}, t);
  });
  return x;
}

std::tuple<Tensor, Tensor> step(Tensor x, std::optional<Tensor> y, Tensor mask, Tensor rho,
                                std::optional<Tensor> weight, int64_t step, bool keep_residual) {
  const OnDeviceOf device(x);
  const OperatorTensors op = operator_of_image(x, mask, step);
  const Geometry& g = op.g;
  const ScalarType wide = wide_type(x.scalar_type());
  const StepTensors tensors(g, wide, y, rho, weight);
  const Tensor in = with_unit_columns(x);
  const Tensor z = empty_beside(x, {g.samples, g.bands, g.height, g.width}, x.scalar_type());
  const Tensor residual =
      keep_residual ? empty_beside(mask, {g.samples, g.height, g.measured()}, wide) : empty_beside(mask, {0}, wide);
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    Task<T> t{};
    t.x = in.const_data_ptr<T>(), t.z = z.mutable_data_ptr<T>();
    t.with = tensors.arguments<W>(g);
    t.residual = keep_residual ? residual.mutable_data_ptr<W>() : nullptr;
    run<T, Part::kStep>(device, op, strides_of(in), t);
  });
  return {z, residual};
}

Tensor prox_weight(Tensor mask, Tensor mu, int64_t bands, int64_t step) {
  const OnDeviceOf device(mask);
  const OperatorTensors op = operator_of_weight(mask, mu, bands, step);
  const Geometry& g = op.g;
  const Tensor each = dense(mu);
  const Tensor weight = empty_beside(mask, {g.samples, g.height, g.measured()}, mask.scalar_type());
  const int64_t blocks = (g.height * g.measured() + 255) / 256;
  dispatch_wide(mask.scalar_type(), "mask", [&](auto tag) {
    using W = typename decltype(tag)::type;
    if (blocks > 0 && g.samples > 0) {
      launch(device, &inverse_of_diagonal<W>, blocks, 256, 0, g, op.mask.const_data_ptr<W>(), op.m_sample, op.m_band,
             each.const_data_ptr<W>(), weight.mutable_data_ptr<W>());
    }
  });
  return weight;
}

Tensor grad_mask(Tensor x, Tensor y, int64_t step, bool per_band, bool per_sample) {
  const OnDeviceOf device(x);
  const Geometry g = geometry_of(x, y, step);
  const Tensor in = with_unit_columns(x), beside = dense(y);
  const Tensor out = empty_mask(y, g, per_band, per_sample);
  const int64_t blocks = (out.numel() + 255) / 256;
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    if (blocks > 0) {
      launch(device, &sum_of_products<T>, blocks, 256, 0, g, strides_of(in), in.const_data_ptr<T>(),
             beside.const_data_ptr<W>(), out.mutable_data_ptr<W>(), per_band, per_sample);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CUDA, m) {
  m.impl("cassi", TORCH_BOX(&forward));
  m.impl("cassi_adjoint", TORCH_BOX(&adjoint));
  m.impl("cassi_step", TORCH_BOX(&step));
  m.impl("cassi_grad_mask", TORCH_BOX(&grad_mask));
  m.impl("cassi_prox_weight", TORCH_BOX(&prox_weight));
}

}  // namespace lorun::cassi
