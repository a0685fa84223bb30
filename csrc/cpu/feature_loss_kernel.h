// Kernels of the feature_loss family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace maefast {

struct FeatureLossArgs {
  const void* pred;      // [R, D]
  const void* target;    // [N, D]
  const int32_t* index;  // [R], rows of target; or null, N = R
  const void* grad;      // [R], backward only; as loss and stats in the arithmetic type
  void* loss;            // [R]
  void* stats;           // [R, 4]: mean of the target (or 1 - cos), scales of target and pred, whether the
                         // norm of pred has a gradient
  void* grad_pred;       // [R, D], backward only
  int32_t* failed;
  int64_t width, targets;
  int64_t norm;  // 0 none, 1 layernorm, 2 l2
  int64_t kind;  // 0 mse, 1 l1, 2 smooth_l1, 3 cosine
  double beta, eps;
  DType pred_type, target_type;
};

struct FeatureLossKernels {
  // Rows [begin, end). workspace: D values of the arithmetic type, of one task.
  void (*feature_loss)(const FeatureLossArgs& args, void* workspace, int64_t begin, int64_t end);
  void (*feature_loss_backward)(const FeatureLossArgs& args, void* workspace, int64_t begin, int64_t end);
};

MAEFAST_KERNELS(FeatureLossKernels, feature_loss_kernels)

}  // namespace maefast
