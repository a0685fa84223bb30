// Kernels of the linear family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace maefast {

struct TransposeArgs {
  const float* x;  // [rows, width]
  float* out;      // [width, rows]
  float* sum;      // [width], over the rows, or null
  int64_t rows, width;
};

constexpr int64_t kTransposeColumns = 64;  // of a task: rows are read in whole cache lines, few pages written

struct LinearKernels {
  void (*transpose_sum)(const TransposeArgs& args, int64_t begin, int64_t end);  // blocks of columns
};

MAEFAST_KERNELS(LinearKernels, linear_kernels)

}  // namespace maefast
