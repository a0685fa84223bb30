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
  const void* shift;   // [D] added to delta, or null; in the arithmetic type, as weight, bias, mean and rstd
  const void* weight;  // [D]
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
  const void* bias;  // only for y
  void* grad_x;      // [R, D] in residual's type
  void* grad_delta;  // [R, D], grad_x in 16 bits; or null
  void* y;           // [R, D], the norm once more, in grad_y's type; or null
  void* sums;        // [units, tables, D]: weight, bias, and with three tables grad_x; or null
  int64_t rows, width, units, tables;
  DType x_type, y_type, delta_type;
};

struct NormKernels {
  void (*add_norm)(const AddNormArgs& args, int64_t begin, int64_t end);                   // rows
  void (*add_norm_backward)(const AddNormBackwardArgs& args, int64_t begin, int64_t end);  // units of rows
  void (*sum_pieces)(const SumArgs& args, int64_t begin, int64_t end);                     // elements
};

MAEFAST_KERNELS(NormKernels, norm_kernels)

}  // namespace maefast
