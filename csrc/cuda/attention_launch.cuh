// What the launches of attention.cu and attention_tiled.cu share.
#pragma once

#include <type_traits>

#include "cuda/attention_kernel.cuh"
#include "cuda/common.cuh"

namespace maefast::cuda {

// f(std::integral_constant<int, depth>) with the width of a head rounded up to a multiple of 16.
template <class F>
void with_depth(int width, F f) {
  switch ((width + 15) / 16) {
    case 1:
      return f(std::integral_constant<int, 16>{});
    case 2:
      return f(std::integral_constant<int, 32>{});
    case 3:
      return f(std::integral_constant<int, 48>{});
    case 4:
      return f(std::integral_constant<int, 64>{});
    case 5:
      return f(std::integral_constant<int, 80>{});
    case 6:
      return f(std::integral_constant<int, 96>{});
    case 7:
      return f(std::integral_constant<int, 112>{});
    default:
      return f(std::integral_constant<int, 128>{});
  }
}

// Shared memory above what every kernel may have must be asked for.
template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  STD_TORCH_CHECK(error == cudaSuccess, "attention: ", bytes,
                  " bytes of shared memory: ", cudaGetErrorString(error));
}

// attention_tiled.cu; `like` names device and dtype.
void run_tiled(Args p, int64_t batch, bool backward, const Tensor& like);

}  // namespace maefast::cuda
