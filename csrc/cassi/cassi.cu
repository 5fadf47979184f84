// Single-disperser CASSI on CUDA (formulas in cassi.h).
//
// Memory traffic is all that counts: 2 operations a byte. A step is one launch, which reads x once and writes z once.
// A block of threads takes one row of a measurement, or as many of its columns as fit, and what lies under them in all
// bands; nothing else reaches those columns. It works in three phases:
//   load    the rows of x into shared memory, 16 bytes at a time, asynchronously; a warp takes a band;
//   gather  a thread takes a column of the measurement: r = w (sum over bands - y), into shared memory;
//   spread  a warp takes a band: z = x - k m r, 16 bytes of z at a time.
// The dispersion moves r against z by any number of columns, the same for a whole band: spread reads whole 16 bytes of
// r around the ones it needs. Phi x is load and gather, Phi^T y is spread. Every sum has one order: no atomics.
//
// Rows that are not aligned to 16 bytes go element by element. More bands than shared memory holds at 32 columns are
// not kept: x is then read twice, the second time from the caches.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cassi/cassi.h"
#include "cassi/checks.h"
#include "common/cuda.cuh"
#include "common/tensor.h"

namespace lorun::cassi {
namespace {

constexpr int kMostThreads = 384;
constexpr int64_t kSharedBytes = 46 << 10;
constexpr int64_t kFewestColumns = 32;

enum class Part { kForward, kAdjoint, kStep };

// 16 bytes of values.
template <class V>
struct Pack {
  static constexpr int kCount = 16 / sizeof(V);
  V at[kCount];
};

int64_t round_up(int64_t value, int64_t to) {
  return (value + to - 1) / to * to;
}

// A block's part: `columns` of a row that is cut into `tiles`. Shared memory holds r, then x, if that is kept, with
// bands `pitch` apart. All are whole packs; spread reads up to 16 bytes of r beyond the columns.
struct Tiling {
  int columns, tiles, pitch, r_bytes;

  static Tiling of(const Geometry& g, int64_t tiles, int64_t bytes_of_x, int64_t bytes_of_r) {
    const int64_t pack = 16 / bytes_of_x, columns = round_up((g.measured() + tiles - 1) / tiles, pack);
    return {static_cast<int>(columns), static_cast<int>(tiles), static_cast<int>(columns + pack),
            static_cast<int>(round_up(columns * bytes_of_r, 16) + 16)};
  }
};

template <class T>
struct Task {
  using W = Wide<T>;
  Geometry g;
  ImageStrides strides;
  const T* x;
  const W* mask;
  int64_t m_band;
  StepArguments<W> with;
  const T* measured;  // of the adjoint
  T* y;               // of the forward op
  T* z;
  W* residual;
  int bands, width, step, columns;  // 32-bit, for the loops; columns: of a measurement
  Tiling tiling;
};

// The columns of one band that a block handles. z and m are at [column], r at [column + to_r], and x, where it is kept
// in shared memory, at [column - kept_from]: so the value of band c that adds to column j of the measurement is
// (-c step) % kCount places from j. 32-bit: 64-bit arithmetic here was most of what a block did.
struct Band {
  int begin, end, to_r, kept_from;
};

// first is a multiple of Count.
template <int Count, class T>
__device__ Band band_of(const Task<T>& t, int c, int first, int last) {
  const int shift = c * t.step;
  return {min(max(first - shift, 0), t.width), min(max(last - shift, 0), t.width), shift - first,
          first - (shift + Count - 1) / Count * Count};
}

// z = x - k m r for 16 bytes of z from column j, whose r begins Off values after 16-byte boundaries.
template <class T, Part P, int Off>
__device__ void spread_pack(T* z, const T* x, const Wide<T>* m, const Wide<T>* r, Wide<T> k) {
  using W = Wide<T>;
  constexpr int kCount = Pack<T>::kCount, kQuad = Pack<W>::kCount, kPacks = kCount / kQuad;
  W around[kCount + kQuad];
  W masks[kCount];
#pragma unroll
  for (int q = 0; q < kPacks + (Off > 0); ++q) {
    const Pack<W> part = load16<Pack<W>>(r - Off + q * kQuad);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      around[q * kQuad + i] = part.at[i];
    }
  }
#pragma unroll
  for (int q = 0; q < kPacks; ++q) {
    const Pack<W> part = load16<Pack<W>>(m + q * kQuad);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      masks[q * kQuad + i] = part.at[i];
    }
  }
  Pack<T> in, out;
  if constexpr (P == Part::kStep) {
    in = load16<Pack<T>>(x);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    W value = k * around[Off + i] * masks[i];
    if constexpr (P == Part::kStep) {
      value = static_cast<W>(in.at[i]) - value;
    }
    out.at[i] = static_cast<T>(value);
  }
  store16(z, out);
}

template <class T, Part P>
__device__ void spread_one(T* z, const T* x, const Wide<T>* m, const Wide<T>* r, Wide<T> k) {
  Wide<T> value = k * *r * __ldg(m);
  if constexpr (P == Part::kStep) {
    value = static_cast<Wide<T>>(*x) - value;
  }
  *z = static_cast<T>(value);
}

// One band of one row by one warp; pointers are to column 0 (r's to the value under it).
template <class T, Part P, int Off>
__device__ void spread_packs(const Band& b, T* z, const T* x, const Wide<T>* m, const Wide<T>* r, Wide<T> k, int lane) {
  constexpr int kCount = Pack<T>::kCount;
  for (int j = b.begin / kCount * kCount + lane * kCount; j < b.end; j += 32 * kCount) {
    if (j >= b.begin && j + kCount <= b.end) {
      spread_pack<T, P, Off>(z + j, x + j, m + j, r + j, k);
    } else {
      for (int i = max(j, b.begin); i < min(j + kCount, b.end); ++i) {
        spread_one<T, P>(z + i, x + i, m + i, r + i, k);
      }
    }
  }
}

template <class T, Part P>
__device__ void spread(const Band& b, T* z, const T* x, const Wide<T>* m, const Wide<T>* r, Wide<T> k, int lane) {
  constexpr int kQuad = Pack<Wide<T>>::kCount;
  switch ((b.to_r % kQuad + kQuad) % kQuad) {
    case 0:
      return spread_packs<T, P, 0>(b, z, x, m, r, k, lane);
    case 1:
      return spread_packs<T, P, 1>(b, z, x, m, r, k, lane);
    case 2:
      if constexpr (kQuad > 2) {
        return spread_packs<T, P, 2>(b, z, x, m, r, k, lane);
      }
      break;
    case 3:
      if constexpr (kQuad > 2) {
        return spread_packs<T, P, 3>(b, z, x, m, r, k, lane);
      }
      break;
  }
}

// Packed: all rows are aligned to 16 bytes, and hold whole packs. Staged: x waits in shared memory.
template <class T, Part P, bool Packed, bool Staged>
__global__ void __launch_bounds__(kMostThreads, sizeof(Wide<T>) == 8 ? 2 : 3) row_of_measurements(const Task<T> t) {
  using W = Wide<T>;
  constexpr int kCount = Packed ? Pack<T>::kCount : 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const unsigned tile_row = blockIdx.x / static_cast<unsigned>(t.tiling.tiles);
  const unsigned image = tile_row / static_cast<unsigned>(t.g.height);
  const int64_t row = tile_row, sample = image, i = tile_row - image * static_cast<unsigned>(t.g.height);
  const int64_t measured = t.columns;
  const int first = static_cast<int>(blockIdx.x - tile_row * t.tiling.tiles) * t.tiling.columns;
  const int last = min(first + t.tiling.columns, t.columns);
  W* const r = reinterpret_cast<W*>(dynamic_shared());
  T* const staged = reinterpret_cast<T*>(dynamic_shared() + t.tiling.r_bytes);
  const T* const x = t.x + sample * t.strides.sample + i * t.strides.row;
  const W* const mask = t.mask + i * t.g.width;
  const int64_t plane = t.g.height * t.g.width, corner = (sample * t.g.bands * t.g.height + i) * t.g.width;

  if constexpr (Staged) {
    for (int c = warp; c < t.bands; c += warps) {
      const Band b = band_of<kCount>(t, c, first, last);
      const T* const in = x + c * t.strides.band;
      T* const to = staged + c * t.tiling.pitch - b.kept_from;
#pragma unroll 1
      for (int j = b.begin / kCount * kCount + lane * kCount; j < b.end; j += 32 * kCount) {
        if constexpr (Packed) {
          __pipeline_memcpy_async(to + j, in + j, 16);
        } else {
          to[j] = in[j];
        }
      }
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
  }

  for (int j = first + static_cast<int>(threadIdx.x); j < last; j += static_cast<int>(blockDim.x)) {
    if constexpr (P == Part::kAdjoint) {
      r[j - first] = static_cast<W>(t.measured[row * measured + j]);
    } else {
      W sum = 0;
      int shift = 0;
      const T* in = Staged ? staged + (j - first) : x + j;
      const W* m = mask + j;
      const auto add = [&] {
        const bool inside = static_cast<unsigned>(j - shift) < static_cast<unsigned>(t.width);
        const T* const at = in + (Staged ? -shift & (kCount - 1) : 0);
        sum += (inside ? static_cast<W>(*at) : W(0)) * (inside ? __ldg(m) : W(0));
        shift += t.step;
        in += Staged ? t.tiling.pitch : t.strides.band - t.step;
        m += t.m_band - t.step;
      };
      int c = 0;
      if constexpr (Staged) {
        // As many bands as repeat the alignment; most groups have the column in all of their windows.
        constexpr int kGroup = kCount > 4 ? kCount : 4;
        int offsets[kGroup];
#pragma unroll
        for (int u = 0; u < kGroup; ++u) {
          offsets[u] = u * t.tiling.pitch + static_cast<int>((0u - u * static_cast<unsigned>(t.step)) % kCount);
        }
        const int64_t next_mask = t.m_band - t.step;
        for (; c + kGroup <= t.bands; c += kGroup) {
          if (j - shift < t.width && j - shift >= (kGroup - 1) * t.step) {
#pragma unroll
            for (int u = 0; u < kGroup; ++u) {
              sum += static_cast<W>(in[offsets[u]]) * __ldg(m + u * next_mask);
            }
            shift += kGroup * t.step;
            in += kGroup * t.tiling.pitch;
            m += kGroup * next_mask;
          } else {
#pragma unroll
            for (int u = 0; u < kGroup; ++u) {
              add();
            }
          }
        }
      }
#pragma unroll 1
      for (; c < t.bands; ++c) {
        add();
      }
      if constexpr (P == Part::kForward) {
        t.y[row * measured + j] = static_cast<T>(sum);
      } else {
        if (t.with.y != nullptr) {
          sum -= t.with.y[row * measured + j];
        }
        if (t.residual != nullptr) {
          t.residual[row * measured + j] = sum;
        }
        if (t.with.weight != nullptr) {
          sum *= t.with.weight[tile_row % static_cast<unsigned>(t.with.weight_rows) * measured + j];
        }
        r[j - first] = sum;
      }
    }
  }

  if constexpr (P != Part::kForward) {
    __syncthreads();
    for (int c = warp; c < t.bands; c += warps) {
      const Band b = band_of<kCount>(t, c, first, last);
      const W k = P == Part::kStep ? t.with.rho[sample * t.with.rho_sample + c * t.with.rho_band] : W(1);
      const T* const in = Staged ? staged + c * t.tiling.pitch - b.kept_from : x + c * t.strides.band;
      T* const z = t.z + (corner + c * plane);
      const W *const m = mask + c * t.m_band, *const under = r + b.to_r;
      if constexpr (Packed) {
        spread<T, P>(b, z, in, m, under, k, lane);
      } else {
        for (int j = b.begin + lane; j < b.end; j += 32) {
          spread_one<T, P>(z + j, in + j, m + j, under + j, k);
        }
      }
    }
  }
}

// out = sum over samples (and, unless per_band, over bands) of x y: one thread an element.
template <class T>
__global__ void __launch_bounds__(256)
    sum_of_products(const Geometry g, const ImageStrides s, const T* x, const Wide<T>* y, Wide<T>* out, bool per_band) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= (per_band ? g.bands : 1) * g.height * g.width) {
    return;
  }
  const int64_t j = index % g.width, i = index / g.width % g.height, band = index / g.width / g.height;
  const int64_t bands = per_band ? band + 1 : g.bands;
  Wide<T> sum = 0;
  for (int64_t c = band; c < bands; ++c) {
    for (int64_t n = 0; n < g.samples; ++n) {
      sum += static_cast<Wide<T>>(x[n * s.sample + c * s.band + i * s.row + j]) *
             y[(n * g.height + i) * g.measured() + c * g.step + j];
    }
  }
  out[index] = sum;
}

bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

template <class T, Part P>
void run(const OnDeviceOf& device, Task<T> t) {
  using W = Wide<T>;
  constexpr int64_t kCount = Pack<T>::kCount;
  const Geometry& g = t.g;
  if (g.rows() * g.measured() == 0) {
    return;
  }
  STD_TORCH_CHECK(g.measured() <= 0x3fffffff, "expected at most 2^30 - 1 columns, got ", g.measured());
  t.bands = static_cast<int>(g.bands), t.width = static_cast<int>(g.width);
  t.columns = static_cast<int>(g.measured());
  t.step = g.bands > 1 ? static_cast<int>(g.step) : 0;
  // As few tiles of a row as shared memory allows.
  constexpr bool kKeeps = P != Part::kAdjoint;
  const auto bytes = [&](bool keep) { return t.tiling.r_bytes + (keep ? g.bands * t.tiling.pitch * sizeof(T) : 0); };
  const auto tile = [&](bool keep, int64_t fewest) {
    int64_t tiles = 0;
    do {
      t.tiling = Tiling::of(g, ++tiles, sizeof(T), sizeof(W));
    } while (static_cast<int64_t>(bytes(keep)) > kSharedBytes && t.tiling.columns > fewest);
    return static_cast<int64_t>(bytes(keep)) <= kSharedBytes;
  };
  const bool staged = kKeeps && tile(true, kFewestColumns);
  if (!staged) {
    tile(false, 1);
  }
  const bool packed = g.width % kCount == 0 && aligned(t.mask) && t.m_band % Pack<W>::kCount == 0 &&
                      (!kKeeps || (aligned(t.x) && t.strides.sample % kCount == 0 && t.strides.band % kCount == 0 &&
                                   t.strides.row % kCount == 0)) &&
                      (P == Part::kForward || aligned(t.z));
  const int64_t threads = std::clamp<int64_t>(round_up(t.tiling.columns, 32), 64, kMostThreads);
  const auto start = [&](auto kernel) { launch(device, kernel, g.rows() * t.tiling.tiles, threads, bytes(staged), t); };
  if constexpr (kKeeps) {
    if (staged) {
      return packed ? start(&row_of_measurements<T, P, true, true>) : start(&row_of_measurements<T, P, false, true>);
    }
  }
  return packed ? start(&row_of_measurements<T, P, true, false>) : start(&row_of_measurements<T, P, false, false>);
}

template <class T>
Task<T> task_of(const OperatorTensors& op) {
  Task<T> t{};
  t.g = op.g;
  t.mask = op.mask.const_data_ptr<Wide<T>>();
  t.m_band = op.m_band;
  return t;
}

Tensor forward(Tensor x, Tensor mask, int64_t step) {
  const OnDeviceOf device(x);
  const OperatorTensors op = operator_of_image(x, mask, step);
  const Geometry& g = op.g;
  const Tensor in = with_unit_columns(x);
  const Tensor y = empty_beside(x, {g.samples, g.height, g.measured()}, x.scalar_type());
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    Task<T> t = task_of<T>(op);
    t.x = in.const_data_ptr<T>(), t.strides = strides_of(in), t.y = y.mutable_data_ptr<T>();
    run<T, Part::kForward>(device, t);
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
    Task<T> t = task_of<T>(op);
    t.measured = in.const_data_ptr<T>(), t.z = x.mutable_data_ptr<T>();
    run<T, Part::kAdjoint>(device, t);
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
    Task<T> t = task_of<T>(op);
    t.x = in.const_data_ptr<T>(), t.strides = strides_of(in), t.z = z.mutable_data_ptr<T>();
    t.with = tensors.arguments<W>(g);
    t.residual = keep_residual ? residual.mutable_data_ptr<W>() : nullptr;
    run<T, Part::kStep>(device, t);
  });
  return {z, residual};
}

Tensor grad_mask(Tensor x, Tensor y, int64_t step, bool per_band) {
  const OnDeviceOf device(x);
  const Geometry g = geometry_of(x, y, step);
  const Tensor in = with_unit_columns(x), beside = dense(y);
  const Tensor out = per_band ? empty_beside(y, {g.bands, g.height, g.width}, y.scalar_type())
                              : empty_beside(y, {g.height, g.width}, y.scalar_type());
  const int64_t blocks = (out.numel() + 255) / 256;
  dispatch_storage(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    if (blocks > 0) {
      launch(device, &sum_of_products<T>, blocks, 256, 0, g, strides_of(in), in.const_data_ptr<T>(),
             beside.const_data_ptr<W>(), out.mutable_data_ptr<W>(), per_band);
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
}

}  // namespace lorun::cassi
