// y = act(conv(x, w) + bias) + residual on Hopper GPUs: 3 x 3, padding 1, images and weights in 16 bits with channels
// innermost, channels in multiples of 16, sums in fp32 rounded once.
//
// The batch is one line of pixels, rows of two columns more than the image and a row between images, zeros there: then
// every tap of the kernel is a shift of the line, and a tile is any 64 pixels of it. A block has a stretch of the line.
// One warp group copies it, 64 pixels at a time, into a ring in shared memory, of which the last rows are there; the
// others take turns with the tiles: 9 * in / 16 products of 64 x 16 by 16 x N, from shared memory and without waiting,
// then what follows a convolution, while the products of the next group run. The weights stay in shared memory; where
// they leave no room for the ring, N is a part of the output channels and blocks share those out.
//
// In shared memory 16 bytes are 8 channels of one pixel, pixels beside each other, then the next 8 channels: what a
// product reads is 64 neighbouring pixels from any one on. The ring's first 64 pixels lie behind its last ones again,
// so that no tile has to wrap around. One more pixel to the next 8 channels puts what a warp copies into all banks.
//
// Bytes and operations: a product of 64 x 16 by 16 x N is N / 2 cycles of a multiprocessor's tensor cores. From shared
// memory come 2 KB of the image and 32 N bytes of weights; measured on an H200, products alone took 43 to 50 cycles for
// N = 32 to 64, as if the image came at 64 bytes a cycle and the weights at 128: 32 + N / 4. So 64 channels are 36
// products of 48 cycles a tile, of which 32 would be arithmetic. In microseconds, 16 images of 256 x 256, 64 channels:
// products alone 119 (by count 119), with what follows and the stores 147, with the copies too 167; x and y once take
// 64 at 4.2 TB/s, the arithmetic 98. 32 channels: 56, 67, 87 (memory 32); 16: 38, 43, 58 (16): there it is the few
// hundred instructions around each tile, and the Triton kernel, which has fewer, is faster.
//
// To go on: the three rows of the kernel side by side, N = 192, would read the image once for three products, at the
// price of three rows of sums and tiles that go down the image.
//
// Every sum is of the same products in the same order wherever its pixel lies: bitwise repeatable, and independent of
// batch mates.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "common/cuda.cuh"
#include "common/divisor.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "common/tensor.h"

namespace lorun::fused_conv2d {
namespace {

constexpr int kTaps = 9;
constexpr int kGroup = 128;  // threads
constexpr int kWarps = kGroup / 32;
constexpr int kGroups = 4;     // of warps that multiply, beside the one that copies: as many as registers allow
constexpr int kPixels = 64;    // of a tile, and of a place in the ring
constexpr int kChunk = 16;     // bytes: 8 channels of a pixel
constexpr int kMostShift = 6;  // of places

// The line of pixels. Wide images are strips of columns, each an image of its own but for what lies beside it.
struct Line {
  int height, width, columns, images;  // columns: of a strip; images: strips of all images
  Divisor pitch, rows, strips;

  // Which pixel of the batch position q is, or -1. inner: of the strip itself, not beside it.
  __device__ int64_t pixel(int q, bool inner) const {
    const int row = pitch.quotient(max(q, 0)), column = q - row * pitch.value() - 1;
    const int image = rows.quotient(row), top = row - image * rows.value() - 1;
    const int sample = strips.quotient(image), left = (image - sample * strips.value()) * columns + column;
    const bool beside = inner && (column < 0 || column >= columns);
    const bool inside = q >= 0 && image < images && top >= 0 && left >= 0 && left < width && !beside;
    return inside ? (static_cast<int64_t>(sample) * height + top) * width + left : -1;
  }
};

struct Shape {
  int depth, out;  // channels
  int tiles;
  int shift;  // of the number of places: it is a power of two, and place and use of the p-th filling are bits of p
  int plane;  // bytes from 8 channels of the ring to the next

  __device__ int places() const {
    return 1 << shift;
  }
  __device__ int place(int p) const {
    return p & (places() - 1);
  }
  __device__ uint32_t parity(int p) const {
    return p >> shift & 1;
  }
};

__host__ __device__ constexpr int header_bytes(int places) {
  return ((2 * places + 1) * static_cast<int>(sizeof(uint64_t)) + 127) / 128 * 128;
}

__host__ __device__ constexpr int plane_bytes(int places) {
  return ((places + 1) * kPixels + 1) * kChunk;
}

// Places that a tile reads, but for its first one.
__host__ __device__ constexpr int reach(int pitch) {
  return (2 * pitch + 2 + kPixels - 1) / kPixels;
}

template <class T>
__device__ uint32_t pack(float first, float second) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return pack_bf16(first, second);
  } else {
    const T both[2] = {static_cast<T>(first), static_cast<T>(second)};
    uint32_t out;
    memcpy(&out, both, sizeof(out));
    return out;
  }
}

template <class T>
__device__ void unpack(uint32_t words, float& first, float& second) {
  T both[2];
  memcpy(both, &words, sizeof(both));
  first = static_cast<float>(both[0]), second = static_cast<float>(both[1]);
}

// Of four neighbouring lanes with four words each, lane t gets every lane's word t.
__device__ inline void turn_four(uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (threadIdx.x & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) == 0) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? words[i] : words[i | bit], bit);
        words[i] = upper ? got : words[i];
        words[i | bit] = upper ? words[i | bit] : got;
      }
    }
  }
}

struct Shared {
  uint64_t *full, *empty, *weights_there;
  unsigned char *weights, *ring;
};

// All warp groups but the last copy these N output channels' weights: eight of them by four chunks at a time, so that
// what a warp writes lies together, and what it reads in pieces of 64 bytes.
template <class T, int N>
__device__ void copy_weights(const T* weight, unsigned char* to, const Shape& shape) {
  const int lane = static_cast<int>(threadIdx.x) % 32, chunks = kTaps * shape.depth / 8;
  for (int u = static_cast<int>(threadIdx.x) / 32; u < (chunks + 3) / 4 * (N / 8); u += kGroups * kWarps) {
    const int chunk = u / (N / 8) * 4 + lane / 8, n = u % (N / 8) * 8 + lane % 8;
    if (chunk < chunks) {
      copy_async<16>(to + (chunk * N + n) * kChunk, weight + static_cast<int64_t>(n) * chunks * 8 + chunk * 8, true);
    }
  }
}

// The last warp group's part: `count` places, the first of which begins at position `from` of the line. Its warps take
// turns: a place is one warp's, two pixels a lane, whose addresses lanes then give each other.
template <class T>
__device__ void copy_line(const T* x, const Line& line, const Shape& shape, const Shared& shared, int from, int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32, chunks = shape.depth / 8;
  const int at0 = lane / chunks, chunk0 = lane % chunks, at_step = 32 / chunks, chunk_step = 32 % chunks;
  for (int j = static_cast<int>(threadIdx.x) / 32 % kWarps; j < count; j += kWarps) {
    int pixels[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      pixels[half] = static_cast<int>(line.pixel(from + j * kPixels + half * 32 + lane, false));
    }
    const int place = shape.place(j);
    if (j >= shape.places()) {
      barrier_wait(&shared.empty[place], shape.parity(j) ^ 1);
    }
    unsigned char* const ring = shared.ring + place * kPixels * kChunk;
    const int again = place == 0 ? shape.places() * kPixels * kChunk : 0;
    int at = at0, chunk = chunk0;
#pragma unroll 4
    for (int i = 0; i < 2 * chunks; ++i) {
      const int low = __shfl_sync(0xffffffffu, pixels[0], at % 32), high = __shfl_sync(0xffffffffu, pixels[1], at % 32);
      const int pixel = at < 32 ? low : high;
      const T* const source = x + (pixel < 0 ? 0 : static_cast<int64_t>(pixel) * shape.depth + chunk * 8);
      unsigned char* const to = ring + chunk * shape.plane + at * kChunk;
      copy_async<16>(to, source, pixel >= 0);
      if (again != 0) {
        copy_async<16>(to + again, source, pixel >= 0);
      }
      at += at_step, chunk += chunk_step;
      if (chunk >= chunks) {
        ++at, chunk -= chunks;
      }
    }
    barrier_arrive_after_copies(&shared.full[place]);
  }
}

// What follows the sums of a tile that begins at position `from`. A thread has two rows of 2 columns in 8; chunks of
// 16 bytes, which it reads and writes, are those of four lanes turned around.
template <class T, int N>
class Ending {
 public:
  __device__ Ending(const Line& line, int from, int out, const T* residual, T* y) : residual_(residual), y_(y) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32 % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t pixel = line.pixel(from + 16 * warp + lane / 4 + 8 * half, true);
      at_[half] = pixel < 0 ? -1 : pixel * out;
    }
    if (residual != nullptr) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const int64_t at = chunk_of(q);
        const uint4 four = at < 0 ? uint4{0, 0, 0, 0} : load16<uint4>(residual + at);
        beside_[q][0] = four.x, beside_[q][1] = four.y, beside_[q][2] = four.z, beside_[q][3] = four.w;
      }
    }
  }

  __device__ void store(const GroupSums<N>& sums, bool relu) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if (residual_ != nullptr) {
        turn_four(beside_[q]);
      }
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = (4 * q + i) / (N / 8), j = (4 * q + i) % (N / 8);
        float first = sums[j][2 * half], second = sums[j][2 * half + 1];
        if (relu) {  // NaN stays
          first = first < 0 ? 0 : first, second = second < 0 ? 0 : second;
        }
        if (residual_ != nullptr) {
          float left, right;
          unpack<T>(beside_[q][i], left, right);
          first += left, second += right;
        }
        words[i] = pack<T>(first, second);
      }
      turn_four(words);
      const int64_t at = chunk_of(q);
      if (at >= 0) {
        *reinterpret_cast<uint4*>(y_ + at) = uint4{words[0], words[1], words[2], words[3]};
      }
    }
  }

 private:
  static constexpr int kQuads = N / 16;  // of the N / 8 chunks of both rows

  const T* residual_;
  T* y_;
  int64_t at_[2];
  uint32_t beside_[kQuads][4];

  // Where this lane's chunk of the q-th four begins, or -1.
  __device__ int64_t chunk_of(int q) const {
    const int u = 4 * q + static_cast<int>(threadIdx.x) % 4, half = u / (N / 8);
    const int64_t row = half == 0 ? at_[0] : at_[1];
    return row < 0 ? -1 : row + (u - half * (N / 8)) * 8;
  }
};

template <class T, int N>
__device__ void convolve_tiles(const T* bias, const T* residual, T* y, const Line& line, const Shape& shape,
                               const Shared& shared, int first, int count, bool relu) {
  const int group = warp_group(), lane = static_cast<int>(threadIdx.x) % 32;
  const int chunks = shape.depth / 8, pitch = line.pitch.value(), around = shape.places() * kPixels;
  const Factor image(shared.ring, shape.plane, 8 * kChunk), weights(shared.weights, N * kChunk, 8 * kChunk);
  const auto release = [&](int p) {  // by each warp, whose lanes are all done with it
    if (lane == 0) {
      barrier_arrive(&shared.empty[shape.place(p)]);
    }
  };
  for (int i = 0; i < group; ++i) {  // others' tiles
    release(i);
  }
  barrier_wait(shared.weights_there, 0);
  int known = 0;  // places that have been filled
  for (int i = group; i < count; i += kGroups) {
    for (; known <= i + reach(pitch); ++known) {
      barrier_wait(&shared.full[shape.place(known)], shape.parity(known));
    }
    publish_shared();
    const int begin = shape.place(i) * kPixels;
    GroupSums<N> sums;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {  // read anew for each tile: there are no registers to keep it in
      float first = 0, second = 0;
      if (bias != nullptr) {
        unpack<T>(load_words(reinterpret_cast<const uint32_t*>(bias) + 4 * j + lane % 4), first, second);
      }
      sums[j][0] = sums[j][2] = first;
      sums[j][1] = sums[j][3] = second;
    }
#pragma unroll 1
    for (int k = 0; k < chunks; k += 2) {
      products_begin();
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const uint32_t at = (begin + tap / 3 * pitch + tap % 3) & (around - 1);
        products_add<T, N>(sums, image, at + k * (shape.plane / kChunk), weights, (tap * chunks + k) * N);
      }
    }
    products_commit();
    Ending<T, N> ending(line, (first + i) * kPixels, shape.out, residual, y);
    products_wait<N>(sums);
    __syncwarp();
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      release(i + g);
    }
    ending.store(sums, relu);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kGroup*(kGroups + 1), 1)
    convolve(const T* x, const T* weight, const T* bias, const T* residual, T* y, const Line line, const Shape shape,
             bool relu) {
#if defined(LORUN_HOPPER)
  const int parts = shape.out / N, part = static_cast<int>(blockIdx.x) % parts;
  const int64_t run = blockIdx.x / parts, runs = gridDim.x / parts;
  const int first = static_cast<int>(shape.tiles * run / runs);
  const int count = static_cast<int>(shape.tiles * (run + 1) / runs) - first;
  Shared shared;
  shared.full = reinterpret_cast<uint64_t*>(dynamic_shared());
  shared.empty = shared.full + shape.places();
  shared.weights_there = shared.empty + shape.places();
  shared.weights = dynamic_shared() + header_bytes(shape.places());
  shared.ring = shared.weights + kTaps * shape.depth / 8 * N * kChunk;
  if (threadIdx.x == 0) {
    for (int place = 0; place < shape.places(); ++place) {
      barrier_init(&shared.full[place], 32);
      barrier_init(&shared.empty[place], kGroups * kWarps);
    }
    barrier_init(shared.weights_there, kGroups * kGroup);
  }
  __syncthreads();
  if (warp_group() == kGroups) {
    copy_line(x, line, shape, shared, first * kPixels - line.pitch.value() - 1, count + reach(line.pitch.value()));
  } else {
    const int column = part * N;
    copy_weights<T, N>(weight + static_cast<int64_t>(column) * kTaps * shape.depth, shared.weights, shape);
    barrier_arrive_after_copies(shared.weights_there);
    convolve_tiles<T, N>(bias == nullptr ? nullptr : bias + column, residual == nullptr ? nullptr : residual + column,
                         y + column, line, shape, shared, first, count, relu);
  }
#endif
}

// How a call is cut up.
struct Cut {
  int columns = 0;            // of the output, a block's
  int strips = 1, shift = 0;  // of places

  int places() const {
    return 1 << shift;
  }
};

int64_t shared_bytes(int64_t depth, int columns, int places) {
  return header_bytes(places) + kTaps * depth * 2 * columns + depth / 8 * plane_bytes(places);
}

// As many output channels a block as leave room for a ring, where need be of strips, but of no narrower ones than this.
constexpr int64_t kNarrow = 32;

Cut cut_of(int64_t depth, int64_t out, int64_t width) {
  for (const int columns : {64, 48, 32, 16}) {
    int shift = kMostShift;
    while (shift > 0 && shared_bytes(depth, columns, 1 << shift) > kMostSharedHopper) {
      --shift;
    }
    // What a tile reads, a place more for every other group, and one that is being filled.
    const int most_reach = (1 << shift) - kGroups - 1;
    for (int strips = 1; out % columns == 0; ++strips) {
      const int64_t wide = (width + strips - 1) / strips;
      if (reach(static_cast<int>(wide) + 2) <= most_reach) {
        return {columns, strips, shift};
      }
      if (wide <= kNarrow) {
        break;
      }
    }
  }
  return {};
}

const void* aligned(Tensor& t) {
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) {
    t = torch::stable::clone(t);
  }
  return t.const_data_ptr();
}

Tensor forward(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual, bool relu) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected (N, C, H, W), got ", shape_of(x));
  const int64_t n = x.size(0), depth = x.size(1), height = x.size(2), width = x.size(3);
  STD_TORCH_CHECK(weight.dim() == 4, "weight: expected (out, in, 3, 3), got ", shape_of(weight));
  const int64_t out = weight.size(0);
  check_shape("weight", weight, {out, depth, 3, 3});
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "x: expected bfloat16 or float16");
  STD_TORCH_CHECK(depth > 0 && depth % 16 == 0 && out > 0 && out % 16 == 0,
                  "x, weight: expected channels in multiples of 16, got ", depth, " and ", out);
  if (bias) {
    check_shape("bias", *bias, {out});
  }
  if (residual) {
    check_shape("residual", *residual, {n, out, height, width});
  }
  STD_TORCH_CHECK(weight.scalar_type() == type && (!bias || bias->scalar_type() == type) &&
                      (!residual || residual->scalar_type() == type),
                  "weight, bias, residual: expected the dtype of x");
  const Cut cut = cut_of(depth, out, width);
  STD_TORCH_CHECK(cut.columns > 0, "x, weight: expected channels that leave room in shared memory, got ", depth);
  STD_TORCH_CHECK(is_hopper(x), "x: expected a GPU of compute capability 9.0");
  const OnDeviceOf device(x);

  Tensor image = channels_inside(x), kernels = channels_inside(weight), offset, beside;
  const Tensor y = empty_channels_last(x, n, out, height, width, type);
  const int64_t columns = (width + cut.strips - 1) / cut.strips, pitch = columns + 2, images = n * cut.strips;
  const int64_t length = images * (height + 1) * pitch;
  STD_TORCH_CHECK(length < 1 << 30, "x: expected at most 2^30 pixels with a margin, got ", shape_of(x));
  const int64_t tiles = (length + kPixels - 1) / kPixels;
  if (y.numel() == 0) {
    return y;
  }
  const Line line{static_cast<int>(height), static_cast<int>(width), static_cast<int>(columns),
                  static_cast<int>(images), Divisor(pitch),          Divisor(height + 1),
                  Divisor(cut.strips)};
  const int64_t parts = out / cut.columns;
  const int64_t runs = std::clamp<int64_t>(device.multiprocessors() / parts, 1, (tiles + kGroups - 1) / kGroups);
  const Shape shape{static_cast<int>(depth), static_cast<int>(out), static_cast<int>(tiles), cut.shift,
                    plane_bytes(cut.places())};
  if (bias) {
    offset = dense(*bias);
  }
  if (residual) {
    beside = channels_inside(*residual);
  }
  const auto run = [&](auto tag, auto kernel) {
    using T = typename decltype(tag)::type;
    launch(device, kernel, runs * parts, kGroup * (kGroups + 1), shared_bytes(depth, cut.columns, cut.places()),
           static_cast<const T*>(aligned(image)), static_cast<const T*>(aligned(kernels)),
           bias ? static_cast<const T*>(aligned(offset)) : nullptr,
           residual ? static_cast<const T*>(aligned(beside)) : nullptr, y.mutable_data_ptr<T>(), line, shape, relu);
  };
  const auto pick = [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (cut.columns) {
      case 16:
        return run(tag, &convolve<T, 16>);
      case 32:
        return run(tag, &convolve<T, 32>);
      case 48:
        return run(tag, &convolve<T, 48>);
      default:
        return run(tag, &convolve<T, 64>);
    }
  };
  if (type == ScalarType::BFloat16) {
    pick(TypeTag<BFloat16>{});
  } else {
    pick(TypeTag<Half>{});
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CUDA, m) {
  m.impl("fused_conv2d", TORCH_BOX(&forward));
}

}  // namespace lorun::fused_conv2d
