// What the ops' arguments must look like, for the CPU and the CUDA implementation.
#pragma once

#include "blur_downsample/blur_downsample.h"
#include "common/tensor.h"

namespace lorun::blur_downsample {

template <class T>
Planes<T> planes_of(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.size(1), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline void check_kernel(const Tensor& kernel, int64_t samples, ScalarType image) {
  check_type("kernel", kernel, wide_type(image));
  const bool shared = kernel.dim() == 2, each = kernel.dim() == 3 && kernel.size(0) == samples;
  STD_TORCH_CHECK((shared || each) && kernel.size(-1) > 0 && kernel.size(-2) > 0, "kernel: expected (kh, kw) or (",
                  samples, ", kh, kw), got ", shape_of(kernel));
}

inline Shape shape_of_image(const Tensor& x, int64_t kh, int64_t kw, bool per_sample, int64_t scale) {
  STD_TORCH_CHECK(scale > 0, "scale: expected at least 1, got ", scale);
  STD_TORCH_CHECK(kh > 0 && kw > 0, "kernel: expected at least one tap, got ", kh, "x", kw);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(2) > 0 && x.size(3) > 0 && x.size(2) % scale == 0 && x.size(3) % scale == 0,
                  "x: expected (N, C, H, W) with H and W divisible by ", scale, ", got ", shape_of(x));
  const Axis rows{x.size(2) / scale, scale, kh}, cols{x.size(3) / scale, scale, kw};
  return {x.size(0), x.size(1), rows, cols, per_sample};
}

inline Shape check_image(const Tensor& x, const Tensor& kernel, int64_t scale) {
  check_kernel(kernel, x.size(0), x.scalar_type());
  return shape_of_image(x, kernel.size(-2), kernel.size(-1), kernel.dim() == 3, scale);
}

inline Shape check_measurement(const Tensor& y, const Tensor& kernel, int64_t scale) {
  STD_TORCH_CHECK(scale > 0, "scale: expected at least 1, got ", scale);
  STD_TORCH_CHECK(y.dim() == 4 && y.size(2) > 0 && y.size(3) > 0, "y: expected (N, C, H/s, W/s), got ", shape_of(y));
  check_kernel(kernel, y.size(0), y.scalar_type());
  const Axis rows{y.size(2), scale, kernel.size(-2)}, cols{y.size(3), scale, kernel.size(-1)};
  return {y.size(0), y.size(1), rows, cols, kernel.dim() == 3};
}

// y beside the image x, in the accumulation type.
inline void check_beside(const char* name, const Tensor& y, const Tensor& x, const Shape& shape) {
  check_type(name, y, wide_type(x.scalar_type()));
  check_shape(name, y, {shape.samples, shape.channels, shape.rows.count, shape.cols.count});
}

inline Tensor empty_image(const Tensor& like, const Shape& shape) {
  return empty_beside(like, {shape.samples, shape.channels, shape.rows.pixels(), shape.cols.pixels()},
                      like.scalar_type());
}

inline Tensor empty_measurement(const Tensor& like, const Shape& shape, ScalarType type) {
  return empty_beside(like, {shape.samples, shape.channels, shape.rows.count, shape.cols.count}, type);
}

inline Tensor empty_kernel(const Tensor& like, const Shape& shape) {
  const int64_t kh = shape.rows.taps, kw = shape.cols.taps;
  return shape.per_sample ? empty_beside(like, {shape.samples, kh, kw}, like.scalar_type())
                          : empty_beside(like, {kh, kw}, like.scalar_type());
}

}  // namespace lorun::blur_downsample
