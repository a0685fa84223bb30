// Kernels of the pool family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace maefast {

constexpr int64_t kMaxTaps = 1024;  // of a window

// One axis of the windows. Position p of a cell reads `count[p]` entries n from p * taps on: place `at[n]` of
// the cell that is `cell[n]` cells away, through tap `tap[n]` of the window.
struct PoolAxis {
  const int32_t* count;
  const int32_t* cell;
  const int32_t* at;
  const int32_t* tap;
  int64_t taps;
};

struct PoolArgs {
  const void* in;        // forward: x [T, in_d, in_h, in_w, C]; backward: the gradient of y, the same shape
  void* out;             // forward: y [T, out_d, out_h, out_w, C]; backward: the gradient of x
  uint8_t* argmax;       // of y's shape; max only
  const void* zeros;     // [C] of the type of `in`: a masked site; forward only
  const int32_t* table;  // [T, deep * side * side]; deep: side, or 1 where cells have no depth
  int32_t* failed;
  int64_t cells, in_d, in_h, in_w, out_d, out_h, out_w, channels, side, deep;
  PoolAxis planes, rows, columns;                       // from `out` to `in`
  PoolAxis window_planes, window_rows, window_columns;  // from y to x; the same in the forward
  bool max, include_pad;
  DType type;
};

struct PoolKernels {
  void (*pool)(const PoolArgs& args, int64_t begin, int64_t end);  // the T * out_d * out_h rows of y
  void (*pool_backward)(const PoolArgs& args, int64_t begin,
                        int64_t end);  // the T * out_d * out_h rows of x's gradient
};

MAEFAST_KERNELS(PoolKernels, pool_kernels)

}  // namespace maefast
