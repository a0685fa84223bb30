// Kernel of the mask family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace maefast {

struct MaskArgs {
  const void* scores;  // [B, N]
  const int32_t* cu;   // [B+1], checked
  int32_t* visible;    // [T]
  int32_t* masked;     // [B*N - T]
  int32_t* slot;       // [B*N]
  int64_t batch, tokens;
  bool by_position;
  DType type;
};

struct MaskKernels {
  // Bytes of working memory that a thread needs, aligned to 64.
  int64_t (*workspace)(const MaskArgs& args);
  void (*token_mask)(const MaskArgs& args, void* workspace, int64_t begin, int64_t end);  // samples
};

MAEFAST_KERNELS(MaskKernels, mask_kernels)

}  // namespace maefast
