// What every CUDA launcher needs from torch: the tensor's device, the current stream, an error for a bad launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>

#include "common/tensor.h"

namespace lorun {

// Makes the tensor's device current while it lives, and knows that device's current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const {
    return stream_;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// A one-dimensional grid; the limit is the hardware's.
inline unsigned grid_size(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "expected at most 2^31 - 1 thread blocks, got ", blocks);
  return static_cast<unsigned>(blocks);
}

}  // namespace lorun
