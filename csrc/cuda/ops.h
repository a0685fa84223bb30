// The CUDA ops: one declaration for each schema of maefast/ops/_registry.py that csrc/cuda implements.
#pragma once

#include "common.h"

namespace maefast::cuda {

// embed.cu
Tensor gather_tokens(const Tensor& x, const Tensor& index, const Tensor& cu, int64_t max_count,
                     int64_t prefix, bool keep_prefix);
Tensor gather_tokens_backward(const Tensor& grad, const Tensor& slot, const Tensor& cu, int64_t prefix,
                              bool keep_prefix, bool masked);

}  // namespace maefast::cuda
