// Attention across the channels of an image on the CPU (formulas in spectral_attention.h).

#include "spectral_attention/spectral_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "common/tensor.h"

#define LORUN_KERNELS "spectral_attention/pixels.inl"
#include "common/for_each_variant.h"

namespace lorun::spectral_attention {
namespace {

// Parts of the pixels, each summed by one thread: by their number alone, so that sums depend on nothing else.
constexpr int64_t kMostParts = 32, kLeastPixels = 4 * kPixels;

constexpr double kSmallest = 1e-30;  // of a product of two squared norms, as the definition has it

struct Space;

template <class W>
W* tiles(const Shape& s, int64_t count) {
  return static_cast<W*>(scratch<Space>(count * kPixels * s.pitch() * sizeof(W)));
}

Shape shape_of_call(const Tensor& qkv, const Tensor& temperature, int64_t hidden) {
  STD_TORCH_CHECK(qkv.dim() == 3 && temperature.dim() == 1 && temperature.size(0) > 0,
                  "qkv, temperature: expected (N, pixels, 3 C + hidden) and (heads), got ", shape_of(qkv), " and ",
                  shape_of(temperature));
  const int64_t heads = temperature.size(0), channels = qkv.size(2) - hidden;
  STD_TORCH_CHECK(hidden >= 0 && channels > 0 && channels % (3 * heads) == 0, "qkv: expected 3 C + ", hidden,
                  " values a pixel, C a multiple of ", heads, " heads, got ", qkv.size(2));
  check_type("temperature", temperature, wide_type(qkv.scalar_type()));
  return {qkv.size(0), qkv.size(1), heads, channels / (3 * heads), hidden};
}

// f(sample, first pixel, end) for all of them, in parallel.
template <class F>
void for_each_part(const Shape& s, const Slices& parts, const F& f) {
  parallel_pairs(Slices(s.n, s.n, 1), parts,
                 [&](int64_t i, int64_t part) { f(i, part, parts.begin(part), parts.end(part)); });
}

// What sum_pixels finds, of each sample and head. grad: null forward; without pixels it may be null backward too.
template <class T>
Tensor sums_of(const Shape& s, const Sums& at, const Slices& parts, const Tensor& like, const T* qkv, const T* grad) {
  using W = Wide<T>;
  const int64_t values = s.heads * at.values();
  const Tensor of_parts = empty_beside(like, {s.n, parts.count, values}, wide_type(like.scalar_type()));
  const Tensor total = empty_beside(like, {s.n, values}, wide_type(like.scalar_type()));
  W *some = of_parts.mutable_data_ptr<W>(), *all = total.mutable_data_ptr<W>();
  const auto kernel = LORUN_PICK(sum_pixels<T>);
  for_each_part(s, parts, [&](int64_t i, int64_t part, int64_t begin, int64_t end) {
    kernel(s, qkv + i * s.pixels * s.width(), grad ? grad + i * s.pixels * s.out_width() : nullptr, begin, end,
           tiles<W>(s, 2), some + (i * parts.count + part) * values);
  });
  parallel(s.n * values, parts.count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      W sum = 0;
      for (int64_t part = 0; part < parts.count; ++part) {
        sum += some[(i / values * parts.count + part) * values + i % values];
      }
      all[i] = sum;
    }
  });
  return total;
}

// The small matrices of one head, d x d in rows of `pitch`.
template <class W>
struct Head {
  int64_t d, pitch;
  const W *gram, *of_q, *of_k;
  W temperature;

  // 1 / (|q_i| |k_j|)
  W inverse(int64_t i, int64_t j) const {
    return W(1) / std::sqrt(std::max(of_q[i] * of_k[j], W(kSmallest)));
  }

  // Row i of A.
  void weights(int64_t i, W* row) const {
    W largest = -INFINITY, sum = 0;
    for (int64_t j = 0; j < d; ++j) {
      row[j] = temperature * gram[i * pitch + j] * inverse(i, j);
      largest = std::max(largest, row[j]);
    }
    for (int64_t j = 0; j < d; ++j) {
      sum += row[j] = std::exp(row[j] - largest);
    }
    for (int64_t j = 0; j < d; ++j) {
      row[j] /= sum;
    }
  }
};

template <class W>
Head<W> head_of(const Shape& s, const Sums& at, const W* sums, const W* temperature, int64_t head) {
  const W* own = sums + head * at.values();
  return {s.d, s.pitch(), own, own + at.of_q(), own + at.of_k(), temperature[head]};
}

Tensor forward(Tensor qkv, Tensor temperature, int64_t hidden) {
  const Shape s = shape_of_call(qkv, temperature, hidden);
  const ScalarType type = qkv.scalar_type();
  const Tensor in = dense(qkv), warmth = dense(temperature);
  const Tensor y = empty_beside(in, {s.n, s.pixels, s.out_width()}, type);
  dispatch_storage(type, "qkv", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    const T* values = in.const_data_ptr<T>();
    const Slices parts(s.pixels, kMostParts, kLeastPixels);
    const Sums at{s.pitch(), false};
    const Tensor sums = sums_of<T>(s, at, parts, in, values, nullptr);
    const W *found = sums.const_data_ptr<W>(), *t = warmth.const_data_ptr<W>();
    std::vector<W> mix(s.n * s.heads * s.matrix());
    parallel(s.n * s.heads, 32 * s.d * s.d, [&](int64_t begin, int64_t end) {
      std::vector<W> row(s.d);
      for (int64_t i = begin; i < end; ++i) {
        const Head<W> head = head_of(s, at, found + i / s.heads * s.heads * at.values(), t, i % s.heads);
        for (int64_t j = 0; j < s.d; ++j) {
          head.weights(j, row.data());
          for (int64_t k = 0; k < s.d; ++k) {
            mix[i * s.matrix() + k * s.pitch() + j] = row[k];
          }
        }
      }
    });
    const auto kernel = LORUN_PICK(mix_pixels<T>);
    T* out = y.mutable_data_ptr<T>();
    for_each_part(s, parts, [&](int64_t i, int64_t, int64_t begin, int64_t end) {
      kernel(s, values + i * s.pixels * s.width(), mix.data() + i * s.heads * s.matrix(), begin, end, tiles<W>(s, 2),
             out + i * s.pixels * s.out_width());
    });
  });
  return y;
}

// The matrices that mix_gradients takes for one head, and the head's part of the temperature's gradient.
template <class W>
W gradient_matrices(const Head<W>& head, const W* of_weights, W* to) {
  const int64_t d = head.d, pitch = head.pitch, matrix = pitch * pitch;
  W *for_q = to, *for_k = for_q + matrix, *for_v = for_k + matrix, *q_along = for_v + matrix,
    *k_along = q_along + pitch;
  W of_temperature = 0;
  for (int64_t i = 0; i < d; ++i) {
    W* row = for_v + i * pitch;  // A as it is: dv_j = sum over i of g_i A[i, j]
    head.weights(i, row);
    W mean = 0;
    for (int64_t j = 0; j < d; ++j) {
      mean += row[j] * of_weights[i * pitch + j];
    }
    for (int64_t j = 0; j < d; ++j) {
      const W inverse = head.inverse(i, j), gram = head.gram[i * pitch + j];
      const W of_logit = row[j] * (of_weights[i * pitch + j] - mean), of_gram = of_logit * head.temperature * inverse;
      for_q[j * pitch + i] = for_k[i * pitch + j] = of_gram;
      of_temperature += of_logit * gram * inverse;
      if (head.of_q[i] * head.of_k[j] > W(kSmallest)) {
        q_along[i] -= of_gram * gram / head.of_q[i];
        k_along[j] -= of_gram * gram / head.of_k[j];
      }
    }
  }
  return of_temperature;
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor qkv, Tensor temperature, int64_t hidden) {
  const Shape s = shape_of_call(qkv, temperature, hidden);
  const ScalarType type = qkv.scalar_type();
  check_shape("grad", grad, {s.n, s.pixels, s.out_width()});
  STD_TORCH_CHECK(grad.scalar_type() == type, "grad: expected qkv's dtype, got another");
  const Tensor in = dense(qkv), above = dense(grad), warmth = dense(temperature);
  const Tensor to = empty_beside(in, {s.n, s.pixels, s.width()}, type);
  const Tensor of_temperature = empty_beside(in, {s.heads}, wide_type(type));
  dispatch_storage(type, "qkv", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    const T *values = in.const_data_ptr<T>(), *g = above.const_data_ptr<T>();
    const Slices parts(s.pixels, kMostParts, kLeastPixels);
    const Sums at{s.pitch(), true};
    const Tensor sums = sums_of<T>(s, at, parts, in, values, g);
    const W *found = sums.const_data_ptr<W>(), *t = warmth.const_data_ptr<W>();
    const int64_t block = 3 * s.matrix() + 2 * s.pitch();
    std::vector<W> mix(s.n * s.heads * block), of_heads(s.n * s.heads);
    parallel(s.n * s.heads, 64 * s.d * s.d, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const W* own = found + i / s.heads * s.heads * at.values();
        of_heads[i] = gradient_matrices(head_of(s, at, own, t, i % s.heads),
                                        own + i % s.heads * at.values() + s.matrix(), mix.data() + i * block);
      }
    });
    W* sum = of_temperature.mutable_data_ptr<W>();
    std::fill_n(sum, s.heads, W(0));
    for (int64_t i = 0; i < s.n * s.heads; ++i) {
      sum[i % s.heads] += of_heads[i];
    }
    const auto kernel = LORUN_PICK(mix_gradients<T>);
    T* out = to.mutable_data_ptr<T>();
    for_each_part(s, parts, [&](int64_t i, int64_t, int64_t begin, int64_t end) {
      kernel(s, values + i * s.pixels * s.width(), g + i * s.pixels * s.out_width(), mix.data() + i * s.heads * block,
             begin, end, tiles<W>(s, 4), out + i * s.pixels * s.width());
    });
  });
  return {to, of_temperature};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorun_fast, CPU, m) {
  m.impl("spectral_attention", TORCH_BOX(&forward));
  m.impl("spectral_attention_backward", TORCH_BOX(&backward));
}

}  // namespace lorun::spectral_attention
