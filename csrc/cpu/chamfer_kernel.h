// Kernels of the chamfer family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace maefast {

struct ChamferArgs {
  const void* a;  // [G, n, D]
  const void* b;  // [G, m, D]
  void* to_b;     // [G, n], squared distance to the nearest of b
  void* to_a;     // [G, m]
  int32_t* at_b;  // [G, n], which it is
  int32_t* at_a;  // [G, m]
  int64_t n, m, coordinates;
  bool wide;  // float64
};

struct ChamferBackwardArgs {
  const void* grad_to_b;
  const void* grad_to_a;
  const void* a;
  const void* b;
  const int32_t* at_b;
  const int32_t* at_a;
  void* grad_a;
  void* grad_b;
  int32_t* failed;
  int64_t n, m, coordinates;
  bool wide;
};

struct ChamferKernels {
  // Groups [begin, end). workspace: (D + 1) * m values, m padded to 16, of one task.
  void (*chamfer)(const ChamferArgs& args, void* workspace, int64_t begin, int64_t end);
  void (*chamfer_backward)(const ChamferBackwardArgs& args, int64_t begin, int64_t end);
};

MAEFAST_KERNELS(ChamferKernels, chamfer_kernels)

}  // namespace maefast
