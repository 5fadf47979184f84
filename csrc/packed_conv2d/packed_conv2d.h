// Convolution with a weight packed for matrix tiles of 16 pixels, 32 products and 16 channels (AMX), and a residual
// block of two of them in one pass over the image.
//
// With channels innermost, the values that one row of the kernel covers, `kernel` pixels of `in` channels, lie next to
// each other in a row of the image, for any number of channels, and those for the next result `stride` pixels further.
// So a row of the kernel is a matrix product straight from the image, its K = kernel * in rounded up to 32:
//
//   y[pixel, :] = sum over kernel rows of image[row, pixel * stride * in + (0 ... K - 1)] . w[row]
//
// where w is zero beyond kernel * in. The packed weight is (blocks of 16 channels, kernel rows, steps of 32, 16 pairs
// of products, 16 channels, 2): a step is a tile as the instructions take it.
//
// A transposed convolution whose stride is its kernel's size s is one of 1 x 1 with s * s * out channels, in the order
// (row, column, channel): those of one row are neighbours in the result ("shuffle").
//
// Bytes: x read and y written once (twice and once more with a residual); products: N H W out kernel K.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/convert.h"
#include "common/tensor.h"

namespace lorun::packed_conv2d {

constexpr int64_t kPixels = 16, kDepth = 32, kChannels = 16;  // of a tile
constexpr int64_t kTileValues = kDepth * kChannels;
constexpr int64_t kStrip = 4 * kPixels;  // results of a row that are computed together
constexpr int64_t kMaxKernel = 7;

template <class T>
struct Filter {
  int64_t in, out, kernel, stride, padding, shuffle;
  const T* w;
  const Wide<T>* bias;  // may be null
  bool relu;
  const T* shifted = nullptr;  // the weight for pixels at odd places, see tiles.h; may be null

  int64_t steps() const {
    return (kernel * in + kDepth - 1) / kDepth;
  }

  int64_t blocks() const {
    return (out + kChannels - 1) / kChannels;
  }

  int64_t block_values() const {
    return kernel * steps() * kTileValues;
  }

  int64_t result(int64_t length) const {
    return (length + 2 * padding - kernel) / stride + 1;
  }
};

// A weight (out, in, kernel, kernel) as it lies in memory.
template <class T>
struct Strided {
  const T* w;
  int64_t by_out, by_in, by_row, by_column;
};

// Row `i` of (blocks, kernel rows) of the packed weight: f.steps() tiles.
template <class T>
void pack_row(const Filter<T>& f, const Strided<T>& weight, int64_t i, T* tiles) {
  const int64_t block = i / f.kernel, row = i % f.kernel, first = block * kChannels;
  const int64_t count = std::min(kChannels, f.out - first);
  const T* from = weight.w + row * weight.by_row + first * weight.by_out;
  std::fill_n(tiles, f.steps() * kDepth * kChannels, T{});
  int64_t k = 0;
  for (int64_t column = 0; column < f.kernel; ++column) {
    for (int64_t in = 0; in < f.in; ++in, ++k) {
      T* pair = tiles + k / 2 * (2 * kChannels) + k % 2;
      const T* values = from + column * weight.by_column + in * weight.by_in;
      for (int64_t c = 0; c < count; ++c) {
        pair[2 * c] = values[c * weight.by_out];
      }
    }
  }
}

// Channels innermost: x (n, height, width, in); y and the residuals alike with the result's sizes.
template <class T>
struct Image {
  int64_t n, height, width;
  const T* x;

  const T* at(int64_t sample, int64_t row, int64_t column, int64_t channels) const {
    return x + ((sample * height + row) * width + column) * channels;
  }
};

// Added to a result after its activation; either may be null.
template <class T>
struct Added {
  const T *first, *second;

  Added from(int64_t at) const {
    return {first == nullptr ? nullptr : first + at, second == nullptr ? nullptr : second + at};
  }
};

// Where the sums of a strip go: y[p * pitch + c] = act(sum + bias[c]) + added[p * pitch + c]. The gate lies as y does.
template <class T>
struct Finish {
  T* y;
  int64_t pitch, channels;
  const Wide<T>* bias;  // may be null
  bool relu;
  Added<T> added;
  const T* gate;  // instead of ReLU and what is added: zeros where its values are not positive; may be null
  bool far;       // y is no work space, which the caches hold
};

}  // namespace lorun::packed_conv2d
