// Launch helpers of the CUDA ops. Every launcher makes a Launch first: it selects the device of its tensor
// for the scope and names torch's current stream there.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "common.h"

namespace maefast::cuda {

struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;

  explicit Launch(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &handle));
    stream = static_cast<cudaStream_t>(handle);
  }
};

inline void check(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch that looks would be blamed
  STD_TORCH_CHECK(false, name, ": ", cudaGetErrorString(status));
}

inline void check_launch(const char* name) {
  check(cudaGetLastError(), name);
}

// Blocks for `work` items at `per_block` each. Kernels loop with the grid's stride, so the cap (far above
// what any device holds at once) loses nothing.
inline unsigned grid_size(int64_t work, int64_t per_block) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < (1 << 20) ? blocks : (1 << 20));
}

}  // namespace maefast::cuda
