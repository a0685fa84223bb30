// Kernels of the loss family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"
#include "cpu/patch.h"
#include "plan.h"

namespace maefast {

enum class Norm { none = 0, mae = 1, videomae = 2, layernorm = 3 };
enum class Distance { mse = 0, smooth_l1 = 1 };

// Kernels set *failed where an index points outside the image.
struct LossArgs {
  PatchGrid grid;
  const void* pred;      // [M, K] or, not packed, [B*N, K]
  const void* images;    // [B, C, T, H, W]
  const int32_t* index;  // [M]
  int32_t* failed;
  int64_t rows;  // M
  bool packed, channels_first;
  Norm norm;
  Distance distance;
  double beta;
  DType pred_type, image_type, wide_type;  // wide: of the arithmetic, loss and stats; f32 or f64
  void* loss;                              // [M]; of the backward: its gradient
  void* stats;                             // [M, groups, 2]: mean, 1 / denominator
  // Backward only.
  void* grad_pred;
  void* grad_images;    // or null
  const int32_t* slot;  // [B*N]
};

struct LossKernels {
  // Bytes of working memory that a thread needs, aligned to 64.
  int64_t (*workspace)(const LossArgs& args);
  void (*patch_loss)(const LossArgs& args, void* workspace, int64_t begin, int64_t end);  // rows of index
  // Packed predictions and no gradient of the images: rows of index.
  void (*patch_loss_backward_rows)(const LossArgs& args, void* workspace, int64_t begin, int64_t end);
  // Otherwise all tokens, because each row and each pixel that is not scored gets a zero.
  void (*patch_loss_backward_tokens)(const LossArgs& args, void* workspace, int64_t begin, int64_t end);
};

MAEFAST_KERNELS(LossKernels, loss_kernels)

}  // namespace maefast
