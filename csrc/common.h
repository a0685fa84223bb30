// Host-side helpers shared by the CPU and the CUDA ops. Not for kernel files (csrc/cpu/isa.h says why).
//
// Only the LibTorch stable ABI is used (torch/csrc/stable, torch/headeronly), so that one build serves every
// torch from 2.10 on. Schemas are defined in Python (the families in maefast/ops); C++ only implements them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace maefast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Uninitialised contiguous tensor on the device of `like`. This shim goes through the dispatcher, so it
// poisons the memory where the user asked torch for that (torch.utils.deterministic), at a third of the cost
// of torch::stable::empty, which boxes its arguments.
inline Tensor empty(const int64_t* sizes, int64_t count, ScalarType dtype, const Tensor& like) {
  int32_t scalar_type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes, count, &scalar_type, nullptr, nullptr,
                                                   0, nullptr, &handle));
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, like);
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  return empty(sizes.data(), static_cast<int64_t>(sizes.size()), dtype, like);
}

// f(begin, end) over [0, rows) on torch's threads; each thread gets at least about 32 KiB of work, below
// which waking it costs more than it saves. f must not throw.
template <class F>
inline void parallel_rows(int64_t rows, int64_t bytes_per_row, const F& f) {
  constexpr int64_t kGrainBytes = 32 * 1024;
  const int64_t grain = kGrainBytes / (bytes_per_row > 0 ? bytes_per_row : 1);
  if (rows > 0) torch::stable::parallel_for(0, rows, grain > 0 ? grain : 1, f);
}

}  // namespace maefast
