// Kernels of the gelu family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"
#include "cpu/units.h"

namespace maefast {

struct GeluArgs {
  const void* x;     // [R, D]
  const void* bias;  // [D] in the arithmetic type, or null
  void* out;         // [R, D]
  int64_t width;
  bool tanh;
  DType type;
};

struct GeluBackwardArgs {
  const void* grad;  // [R, D]
  const void* x;
  const void* bias;
  void* grad_x;
  void* out;        // [R, D], the GELU once more; or null
  void* bias_sums;  // [units, D] in the arithmetic type, or null
  int64_t rows, width, units;
  bool tanh;
  DType type;
};

struct GeluKernels {
  void (*bias_gelu)(const GeluArgs& args, int64_t begin, int64_t end);                   // rows
  void (*bias_gelu_backward)(const GeluBackwardArgs& args, int64_t begin, int64_t end);  // units of rows
  void (*sum_pieces)(const SumArgs& args, int64_t begin, int64_t end);                   // elements
};

MAEFAST_KERNELS(GeluKernels, gelu_kernels)

}  // namespace maefast
