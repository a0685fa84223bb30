// Kernel of the adamw family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace maefast {

// One parameter and what belongs to it, all in the same order in memory.
struct AdamwTensor {
  void* param;
  void* grad;     // written only where it is unscaled
  void* exp_avg;  // in the parameter's type, as the next two
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // or null
  void* shadow;          // 16 bits, or null
  int64_t count;
  DType type, grad_type, shadow_type;
  double step_size;              // lr / (1 - beta1^step)
  double bias_correction2_sqrt;  // sqrt(1 - beta2^step)
};

struct AdamwArgs {
  double decay;  // 1 - lr * weight_decay
  double beta1, beta2, eps;
  double grad_scale;  // what the gradients are divided by, or 0: they are as they are
  bool maximize;
  bool skip;  // a gradient is not finite: only the shadow is written
};

struct AdamwKernels {
  void (*adamw)(const AdamwArgs& args, const AdamwTensor& tensor, int64_t begin, int64_t end);  // elements
};

MAEFAST_KERNELS(AdamwKernels, adamw_kernels)

}  // namespace maefast
