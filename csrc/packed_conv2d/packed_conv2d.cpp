// Convolution with a packed weight on the CPU (formulas in packed_conv2d.h).
//
// A thread walks down a band of columns. The rows that its results need lie in a ring in its second-level cache,
// padded with zeros, so that no strip has an edge. In a residual block the first convolution's rows go to a second
// ring and never to memory.

#include "packed_conv2d/packed_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>

#include "common/convert.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "common/tensor.h"
#include "lora_merge/one.h"
#include "packed_conv2d/tiles.h"

#define LORUN_KERNELS "packed_conv2d/strips.inl"
#include "common/for_each_variant.h"

namespace lorun::packed_conv2d {
namespace {

struct Slot;

constexpr int64_t kRingBytes = 512 << 10;  // of all rings of a thread: a part of the second-level cache
constexpr int64_t kMaxStep = INT32_MAX;    // of strides and padding, whose products with sizes are then represented
constexpr int64_t kNearBytes = 2 << 20;    // of an image and its results that the caches may hold from call to call

// Computes strips with plain loops.
template <class T>
class PlainStrips {
 public:
  static constexpr int64_t kSums = kStrip * kChannels;

  explicit PlainStrips(Wide<T>* sums) : sums_(sums) {}

  void compute(const Filter<T>& f, const T* const* rows, int64_t first, int64_t pixels, int64_t block, int64_t blocks,
               const Finish<T>& to) {
    LORUN_PICK(multiply<T>)(f, rows, first * f.stride * f.in, pixels, block, blocks, sums_);
    LORUN_PICK(finish<T>)(sums_, pixels, to);
  }

  void fetch(const Filter<T>&, int64_t, const T*, int64_t) {}

  void flush() {}

 private:
  Wide<T>* sums_;
};

// One row of results. to(first pixel, first channel) tells where they go, but for the number of channels.
template <class T, class Strips, class To>
void convolve_row(Strips& strips, const Filter<T>& f, const T* const* rows, int64_t width, const To& to) {
  const int64_t blocks = f.blocks();
  const auto strip = [&](int64_t first, int64_t block, int64_t count) {
    const int64_t channel = block * kChannels;
    Finish<T> where = to(first, channel);
    where.channels = std::min(count * kChannels, f.out - channel);
    where.bias = f.bias == nullptr ? nullptr : f.bias + channel;
    where.relu = f.relu;
    strips.compute(f, rows, first, std::min(kStrip, width - first), block, count, where);
  };
  for (int64_t first = 0; first < width; first += kStrip) {
    // Where a row ends, more blocks of channels fill what pixels do not: four tiles in all, unless blocks lie in two
    // rows of a shuffled result.
    const int64_t tiles = (std::min(kStrip, width - first) + kPixels - 1) / kPixels;
    int64_t together = tiles > 2 ? 1 : 4 / tiles;
    while (f.shuffle > 1 && f.out / f.shuffle % (together * kChannels) != 0) {
      together /= 2;
    }
    for (int64_t block = 0; block < blocks; block += together) {
      strip(first, block, std::min(together, blocks - block));
    }
  }
}

// Rows of an image, or of what lies between two convolutions, each with zeros around it.
template <class T>
struct Ring {
  int64_t count, capacity;  // rows, values of each
  T* at;
  const T* zeros;

  T* slot(int64_t row) const {
    return at + row % count * capacity;
  }

  // The rows that a result begins at `first` with.
  void rows(int64_t first, int64_t kernel, int64_t height, const T** out) const {
    for (int64_t i = 0; i < kernel; ++i) {
      out[i] = first + i >= 0 && first + i < height ? slot(first + i) : zeros;
    }
  }
};

// Values of a row that strips of `columns` results touch, to whole cache lines.
template <class T>
int64_t row_capacity(const Filter<T>& f, int64_t columns) {
  const int64_t strips = (columns + kStrip - 1) / kStrip * kStrip;
  const int64_t values = (strips - 1) * f.stride * f.in + f.steps() * kDepth;
  return (values + 63) / 64 * 64;
}

// The most columns of results whose rings fit, `bytes(columns)` telling what they take: all, or whole strips.
template <class Bytes>
int64_t band_columns(int64_t width, const Bytes& bytes) {
  const int64_t all = std::max<int64_t>(width, 1);  // bands are counted by it
  int64_t columns = (all + kStrip - 1) / kStrip * kStrip;
  while (columns > kStrip && bytes(columns) > kRingBytes) {
    columns = (columns / 2 + kStrip - 1) / kStrip * kStrip;
  }
  return std::min(columns, all);
}

// Calls segment(image, first row, last row + 1, first column, last column + 1) for the rows [begin, end) of all bands.
template <class Segment>
void each_segment(int64_t begin, int64_t end, int64_t height, int64_t width, int64_t columns, const Segment& segment) {
  const int64_t bands = (width + columns - 1) / columns;
  for (int64_t i = begin; i < end;) {
    const int64_t band = i / height, row = i % height, rows = std::min(height - row, end - i);
    const int64_t left = band % bands * columns;
    segment(band / bands, row, row + rows, left, std::min(width, left + columns));
    i += rows;
  }
}

// Runs body(strips, rings, begin, end) over all rows of all bands on the thread pool; rings: `bytes` of work space.
template <class T, class Body>
void over_rows(int64_t rows, int64_t work, int64_t bytes, const Body& body) {
  const auto run = [&](auto make) {
    using Strips = typename decltype(make)::type;
    parallel(rows, work, [&](int64_t begin, int64_t end) {
      Wide<T>* sums = static_cast<Wide<T>*>(scratch<Slot>(Strips::kSums * sizeof(Wide<T>) + bytes));
      Strips strips(sums);
      body(strips, reinterpret_cast<T*>(sums + Strips::kSums), begin, end);
    });
  };
#ifdef LORUN_AMX
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (has_amx()) {
      return run(TypeTag<TileStrips>{});
    }
  }
#endif
  run(TypeTag<PlainStrips<T>>{});
}

struct Shifted;

// Forms the shifted weights of filters that are computed by pairs of pixels, for as long as this thread calls nothing.
template <class T, class... Filters>
void shift_weights(Filters&... filters) {
#ifdef LORUN_AMX
  if constexpr (std::is_same_v<T, BFloat16>) {
    const auto values = [](const Filter<T>& f) {
      return has_amx() && takes_pairs(f) ? f.blocks() * f.block_values() : 0;
    };
    T* to = static_cast<T*>(scratch<Shifted>((values(filters) + ...) * sizeof(T)));
    const auto shift = [&](Filter<T>& f) {
      if (values(f) > 0) {
        shift_weight(f, to);
        f.shifted = to;
        to += values(f);
      }
    };
    (shift(filters), ...);
  }
#endif
}

// Whether so many values are more than the caches hold: then their lines are asked for before they are needed.
template <class T>
bool is_far(int64_t values) {
  return values * static_cast<int64_t>(sizeof(T)) > kNearBytes;
}

template <class T>
void convolve(const Image<T>& image, const Filter<T>& f, const Added<T>& added, const T* gate, T* y) {
  const int64_t height = f.result(image.height), width = f.result(image.width);
  const auto bytes = [&](int64_t columns) {
    return (f.kernel + 1) * row_capacity(f, columns) * static_cast<int64_t>(sizeof(T));
  };
  const int64_t columns = band_columns(width, bytes), capacity = row_capacity(f, columns);
  const int64_t bands = (width + columns - 1) / columns, work = columns * (f.in * f.stride * f.stride + f.out);
  const int64_t row_channels = f.out / f.shuffle;  // of one pixel in one row of the result
  const bool far = is_far<T>(image.n * (image.height * image.width * f.in + height * width * f.out));
  over_rows<T>(image.n * bands * height, work, bytes(columns), [&](auto& strips, T* base, int64_t begin, int64_t end) {
    const Ring<T> ring{f.kernel, capacity, base + capacity, base};
    const auto segment = [&](int64_t n, int64_t top, int64_t bottom, int64_t left, int64_t right) {
      std::fill_n(base, (f.kernel + 1) * capacity, T{});
      const int64_t from = left * f.stride - f.padding;
      const int64_t first = std::max<int64_t>(from, 0);
      const int64_t last = std::min(image.width, (right - 1) * f.stride - f.padding + f.kernel);
      int64_t ready = std::max<int64_t>(top * f.stride - f.padding, 0);
      std::array<const T*, kMaxKernel> rows;
      for (int64_t h = top; h < bottom; ++h) {
        const int64_t begins = h * f.stride - f.padding;
        for (; ready < std::min(image.height, begins + f.kernel); ++ready) {
          std::copy_n(image.at(n, ready, first, f.in), (last - first) * f.in, ring.slot(ready) + (first - from) * f.in);
        }
        ring.rows(begins, f.kernel, image.height, rows.data());
        if (const int64_t next = std::min(f.stride, image.height - ready); far && next > 0) {
          const int64_t pixels = (next - 1) * image.width + last - first;
          strips.fetch(f, right - left, image.at(n, ready, first, f.in), pixels * f.in);
        }
        convolve_row(strips, f, rows.data(), right - left, [&](int64_t pixel, int64_t channel) {
          const int64_t row = (n * height + h) * f.shuffle + channel / row_channels;
          const int64_t at = (row * width + left + pixel) * row_channels + channel % row_channels;
          return Finish<T>{
              y + at, row_channels, 0, nullptr, false, added.from(at), gate == nullptr ? nullptr : gate + at, far};
        });
      }
    };
    each_segment(begin, end, height, width, columns, segment);
    strips.flush();
  });
}

// y = second(first(x)) + added, both 3 x 3 with stride and padding 1.
template <class T>
void convolve_twice(const Image<T>& image, const Filter<T>& f, const Filter<T>& g, const Added<T>& added, T* y) {
  const int64_t height = image.height, width = image.width;
  const auto bytes = [&](int64_t columns) {
    return 4 * (row_capacity(f, columns + 2) + row_capacity(g, columns)) * static_cast<int64_t>(sizeof(T));
  };
  const int64_t columns = band_columns(width, bytes);
  const bool far = is_far<T>(2 * image.n * height * width * f.in);
  const int64_t capacity = row_capacity(f, columns + 2), middle_capacity = row_capacity(g, columns);
  const int64_t bands = (width + columns - 1) / columns, work = columns * (f.in + g.in + g.out);
  over_rows<T>(image.n * bands * height, work, bytes(columns), [&](auto& strips, T* base, int64_t begin, int64_t end) {
    T* middle_base = base + 4 * capacity;
    const Ring<T> ring{3, capacity, base + capacity, base};
    const Ring<T> middle{3, middle_capacity, middle_base + middle_capacity, middle_base};
    const auto segment = [&](int64_t n, int64_t top, int64_t bottom, int64_t left, int64_t right) {
      strips.flush();
      std::fill_n(base, 4 * (capacity + middle_capacity), T{});
      // Columns of the middle that exist, and of the image that they need.
      const int64_t middle_first = std::max<int64_t>(left - 1, 0), middle_last = std::min(width, right + 1);
      const int64_t first = std::max<int64_t>(middle_first - 1, 0), last = std::min(width, middle_last + 1);
      int64_t ready = std::max<int64_t>(top - 2, 0), middle_ready = std::max<int64_t>(top - 1, 0);
      std::array<const T*, kMaxKernel> rows;
      for (int64_t h = top; h < bottom; ++h) {
        for (; middle_ready < std::min(height, h + 2); ++middle_ready) {
          for (; ready < std::min(height, middle_ready + 2); ++ready) {
            std::copy_n(image.at(n, ready, first, f.in), (last - first) * f.in,
                        ring.slot(ready) + (first - middle_first + 1) * f.in);
          }
          ring.rows(middle_ready - 1, 3, height, rows.data());
          if (far && ready < height) {
            strips.fetch(f, middle_last - middle_first, image.at(n, ready, first, f.in), (last - first) * f.in);
          }
          T* to = middle.slot(middle_ready) + (middle_first - left + 1) * g.in;
          convolve_row(strips, f, rows.data(), middle_last - middle_first, [&](int64_t pixel, int64_t channel) {
            return Finish<T>{to + pixel * g.in + channel, g.in, 0, nullptr, false, {}, nullptr, false};
          });
        }
        strips.flush();  // the middle is read next
        middle.rows(h - 1, 3, height, rows.data());
        convolve_row(strips, g, rows.data(), right - left, [&](int64_t pixel, int64_t channel) {
          const int64_t at = ((n * height + h) * width + left + pixel) * g.out + channel;
          return Finish<T>{y + at, g.out, 0, nullptr, false, added.from(at), nullptr, far};
        });
      }
    };
    each_segment(begin, end, height, width, columns, segment);
    strips.flush();
  });
}

template <class T>
const T* data_of(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// What packed_weight() returned for these sizes, of x's dtype, dense.
template <class T>
Tensor checked_weight(const char* name, const Tensor& weight, const Filter<T>& f, ScalarType type) {
  check_shape(name, weight, {f.blocks(), f.kernel * f.steps(), kPixels, kDepth});
  STD_TORCH_CHECK(weight.scalar_type() == type, name, ": expected x's dtype, got another one");
  return dense(weight);
}

std::optional<Tensor> checked_bias(const char* name, const std::optional<Tensor>& bias, int64_t out, ScalarType type) {
  if (!bias) {
    return std::nullopt;
  }
  check_shape(name, *bias, {out});
  check_type(name, *bias, wide_type(type));
  return dense(*bias);
}

Tensor convolution(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual, int64_t out,
                   int64_t kernel, int64_t stride, int64_t padding, int64_t shuffle, bool relu,
                   std::optional<Tensor> gate) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) >= 1, "x: expected (N, C, H, W) with channels, got shape ", shape_of(x));
  STD_TORCH_CHECK(
      kernel >= 1 && kernel <= kMaxKernel && stride >= 1 && stride <= kMaxStep && padding >= 0 && padding <= kMaxStep,
      "expected a kernel of 1 to 7 pixels, a stride of 1 to ", kMaxStep, " and a padding of 0 to ", kMaxStep, ", got ",
      kernel, ", ", stride, " and ", padding);
  STD_TORCH_CHECK(shuffle >= 1 && out >= 1 && out % shuffle == 0 && out / shuffle % shuffle == 0,
                  "out: expected channels in whole cells of the shuffle, got ", out, " and ", shuffle);
  STD_TORCH_CHECK(shuffle == 1 || out / shuffle % kChannels == 0,
                  "out: expected rows of a cell in multiples of 16 channels, got ", out, " in ", shuffle, " rows");
  const int64_t n = x.size(0), in = x.size(1), height = x.size(2), width = x.size(3);
  const ScalarType type = x.scalar_type();
  return dispatch_storage(type, "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    // A stride past the image is as good as any other, and a row's work space grows with it.
    const int64_t past = std::max(height, width) + 2 * padding;
    Filter<T> f{in,      out,     kernel, std::min(stride, std::max<int64_t>(past, 1)), padding, shuffle,
                nullptr, nullptr, relu};
    const int64_t y_height = f.result(height) * shuffle, y_width = f.result(width) * shuffle;
    const int64_t y_channels = out / (shuffle * shuffle);
    STD_TORCH_CHECK(height + 2 * padding >= kernel && width + 2 * padding >= kernel, "x: expected at least ", kernel,
                    " pixels with the padding, got shape ", shape_of(x));
    const Tensor tiles = checked_weight("weight", weight, f, type);
    const std::optional<Tensor> offset = checked_bias("bias", bias, out, type);
    const auto check_beside = [&](const char* name, const std::optional<Tensor>& t) {
      if (t) {
        check_shape(name, *t, {n, y_channels, y_height, y_width});
        STD_TORCH_CHECK(t->scalar_type() == type, name, ": expected x's dtype, got another one");
      }
    };
    check_beside("residual", residual);
    check_beside("gate", gate);
    STD_TORCH_CHECK(!gate || !(relu || residual), "gate: expected neither an activation nor a residual beside it");
    const Tensor image = channels_inside(x);
    const std::optional<Tensor> added = channels_inside(residual), passed = channels_inside(gate);
    const Tensor y = empty_channels_last(x, n, y_channels, y_height, y_width, type);
    f.w = tiles.const_data_ptr<T>();
    f.bias = data_of<Wide<T>>(offset);
    shift_weights<T>(f);
    convolve(Image<T>{n, height, width, image.const_data_ptr<T>()}, f, Added<T>{data_of<T>(added), nullptr},
             data_of<T>(passed), y.mutable_data_ptr<T>());
    return y;
  });
}

Tensor block(Tensor x, Tensor first, std::optional<Tensor> first_bias, Tensor second, std::optional<Tensor> second_bias,
             std::optional<Tensor> residual, int64_t middle) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) >= 1, "x: expected (N, C, H, W) with channels, got shape ", shape_of(x));
  STD_TORCH_CHECK(middle >= 1, "middle: expected channels, got ", middle);
  const int64_t n = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  const ScalarType type = x.scalar_type();
  if (residual) {
    check_shape("residual", *residual, {n, channels, height, width});
    STD_TORCH_CHECK(residual->scalar_type() == type, "residual: expected x's dtype, got another one");
  }
  return dispatch_storage(type, "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    Filter<T> f{channels, middle, 3, 1, 1, 1, nullptr, nullptr, true};
    Filter<T> g{middle, channels, 3, 1, 1, 1, nullptr, nullptr, false};
    const Tensor tiles = checked_weight("first", first, f, type), others = checked_weight("second", second, g, type);
    const std::optional<Tensor> offset = checked_bias("first_bias", first_bias, middle, type);
    const std::optional<Tensor> other_offset = checked_bias("second_bias", second_bias, channels, type);
    const Tensor image = channels_inside(x);
    const std::optional<Tensor> added = channels_inside(residual);
    const Tensor y = empty_channels_last(x, n, channels, height, width, type);
    f.w = tiles.const_data_ptr<T>();
    f.bias = data_of<Wide<T>>(offset);
    g.w = others.const_data_ptr<T>();
    g.bias = data_of<Wide<T>>(other_offset);
    shift_weights<T>(f, g);
    const T* pixels = image.const_data_ptr<T>();
    convolve_twice(Image<T>{n, height, width, pixels}, f, g, Added<T>{pixels, data_of<T>(added)},
                   y.mutable_data_ptr<T>());
    return y;
  });
}

struct Rounded;

// fp32 values in storage of 16 bits, for as long as this thread calls nothing.
template <class T>
const T* rounded(const float* from, int64_t count) {
  T* to = static_cast<T*>(scratch<Rounded>(count * sizeof(T)));
  parallel(count, 1, [&](int64_t begin, int64_t end) {
    multiversion([&](auto) LORUN_INLINE {
      for (int64_t i = begin; i < end; ++i) {
        to[i] = narrow<T>(from[i]);
      }
    });
  });
  return to;
}

// Whether a tensor's values fill its memory in some order of its axes, contiguous or with channels innermost.
bool is_dense(const Tensor& t) {
  return t.is_contiguous() || channels_lie_inside(t);
}

Tensor pack(Tensor base, std::optional<Tensor> down, std::optional<Tensor> up, double scale,
            std::optional<ScalarType> dtype, bool adjoint) {
  STD_TORCH_CHECK(base.dim() == 4 && base.size(2) == base.size(3) && base.size(2) >= 1 && base.size(2) <= kMaxKernel,
                  "weight: expected (out, in, k, k) with k from 1 to 7, got ", shape_of(base));
  STD_TORCH_CHECK(down.has_value() == up.has_value(), "down, up: expected both or neither");
  const ScalarType type = dtype.value_or(base.scalar_type());
  const bool rounds = !down && base.scalar_type() == ScalarType::Float && type != base.scalar_type() && is_dense(base);
  const Tensor weight = down                                   ? lora_merge::merge_one(base, *down, *up, scale, type)
                        : rounds || base.scalar_type() == type ? base
                                                               : dense_in_type(base, type);
  const int64_t out = weight.size(adjoint ? 1 : 0), in = weight.size(adjoint ? 0 : 1), kernel = weight.size(2);
  const int64_t by_out = weight.stride(adjoint ? 1 : 0), by_in = weight.stride(adjoint ? 0 : 1);
  const int64_t sign = adjoint ? -1 : 1, by_row = sign * weight.stride(2), by_column = sign * weight.stride(3);
  const int64_t start = adjoint ? (kernel - 1) * (weight.stride(2) + weight.stride(3)) : 0;
  return dispatch_storage(type, "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Filter<T> f{in, out, kernel, 1, 0, 1, nullptr, nullptr, false};
    const int64_t steps = f.steps();
    const Tensor packed = empty_beside(weight, {f.blocks(), kernel * steps, kPixels, kDepth}, type);
    T* to = packed.mutable_data_ptr<T>();
    const T* values = nullptr;
    if constexpr (sizeof(T) == 2) {
      values = rounds ? rounded<T>(weight.const_data_ptr<float>(), weight.numel()) : nullptr;
    }
    const Strided<T> from{(values == nullptr ? weight.const_data_ptr<T>() : values) + start, by_out, by_in, by_row,
                          by_column};
    parallel(f.blocks() * kernel, steps * kTileValues, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        pack_row(f, from, i, to + i * steps * kTileValues);
      }
    });
    return packed;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("packed_conv2d", TORCH_BOX(&convolution));
  m.impl("packed_block", TORCH_BOX(&block));
  m.impl("packed_weight", TORCH_BOX(&pack));
}

}  // namespace lorun::packed_conv2d
