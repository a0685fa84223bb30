// Kernels of the norm family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"
#include "cpu/units.h"

namespace maefast {

struct AddNormArgs {
  const void* x;       // [R, D]
  const void* delta;   // [R, D] or null
  const void* weight;  // [D] in the arithmetic type, as bias, mean and rstd
  const void* bias;
  void* residual;  // [R, D], or null without delta
  void* y;         // [R, D]
  void* mean;      // [R]
  void* rstd;
  int64_t width;
  double eps;
  DType x_type, delta_type, y_type;
};

struct AddNormBackwardArgs {
  const void* grad_y;         // [R, D]
  const void* grad_residual;  // [R, D] in residual's type, or null
  const void* residual;
  const void* mean;
  const void* rstd;
  const void* weight;
  void* grad_x;  // [R, D] in residual's type
  void* sums;    // [units, 2, D]: weight, bias; or null
  int64_t rows, width, units;
  DType x_type, y_type;
};

struct NormKernels {
  void (*add_norm)(const AddNormArgs& args, int64_t begin, int64_t end);                   // rows
  void (*add_norm_backward)(const AddNormBackwardArgs& args, int64_t begin, int64_t end);  // units of rows
  void (*sum_pieces)(const SumArgs& args, int64_t begin, int64_t end);                     // elements
};

MAEFAST_KERNELS(NormKernels, norm_kernels)

}  // namespace maefast
