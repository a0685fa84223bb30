// Kernels of the restore family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"
#include "cpu/units.h"
#include "plan.h"

namespace maefast {

// Kernels set *failed where the content of a plan points outside its tensors.
struct RestoreArgs {
  const void* x;           // [T + B*P, D]
  const void* mask_token;  // [D]
  const void* prefix_pos;  // [P, D] or null
  const void* pos;         // [N, D] or null
  void* out;               // [B, P+N, D], or [T + M + B*P, D] with cu_masked
  const int32_t* visible;
  const int32_t* masked;
  const int32_t* cu;
  const int32_t* cu_masked;  // where each sample's masked tokens start, or null where none are absent
  int32_t* failed;
  int64_t batch, tokens, prefix, width;
  bool visible_first, pos_on_masked;
  DType x_type, out_type;
};

struct RestoreBackwardArgs {
  const void* grad;  // like `out` of the forward
  void* grad_x;      // [T + B*P, D]
  void* mask_sums;   // [units, D] in the arithmetic type, or null
  const int32_t* slot;
  const int32_t* cu;
  const int32_t* cu_masked;
  int32_t* failed;
  int64_t batch, tokens, prefix, packed, width;
  bool visible_first, pos_on_masked;
  Units units;
  DType grad_type, x_type;
};

struct RestoreKernels {
  // Rows [begin, end) of the rows of `out`, counted in visible-first order, whatever order they are written
  // in.
  void (*restore_tokens)(const RestoreArgs& args, int64_t begin, int64_t end);
  void (*restore_tokens_backward)(const RestoreBackwardArgs& args, int64_t begin, int64_t end);  // units
  void (*sum_pieces)(const SumArgs& args, int64_t begin, int64_t end);                           // elements
};

MAEFAST_KERNELS(RestoreKernels, restore_kernels)

}  // namespace maefast
