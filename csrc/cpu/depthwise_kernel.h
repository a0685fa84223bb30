// Kernels of the depthwise family; torch-free, see cpu/isa.h for the rules.
//
// Channels go in blocks of one register: block b starts at channel min(b * L, C - L), so the last two overlap
// where L does not divide C (C >= L; the host widens narrower tensors). Groups of up to `most` blocks are
// worked on together, the small ones first, so that overlapping blocks always share a group and with it a
// thread.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace maefast {

struct DepthwiseArgs {
  const void* x;              // [T, h, w, C]
  const int32_t* neighbours;  // [T, (2 radius + 1)^2]
  const void* weight;         // [k * k, C] in the arithmetic type, as bias
  const void* bias;           // [C] or null
  void* y;                    // [T, h, w, C]
  const void* grad;           // [T, h, w, C], for the gradient of the weight
  void* sums;                 // [pieces, blocks, k * k + 1, L] in the arithmetic type
  void* grad_weight;          // [k * k, C]
  void* grad_bias;            // [C]
  int64_t cells, h, w, width, radius, size, pieces;
  bool flip;
  DType type;
  // Made by the first two kernels: see `sites` and `pack` in depthwise_kernel.cpp.
  int32_t* table;
  void* taps;
  int32_t* failed;
};

// What the host has to allocate and to split, for a type and a level.
struct DepthwisePlan {
  int64_t lanes, blocks;
  int64_t groups, grad_groups;  // of channels: forward, gradient of the weight
  int64_t chunk;                // cells in an item of the forward pass
  int64_t table_row;            // int32 values in `table` for each cell
  int64_t taps;                 // values in `taps`
  int64_t work;                 // bytes of scratch of one thread, gradient of the weight
};

struct DepthwiseKernels {
  DepthwisePlan (*plan)(const DepthwiseArgs& args);
  void (*sites)(const DepthwiseArgs& args, int64_t begin, int64_t end);                    // cells
  void (*pack)(const DepthwiseArgs& args, int64_t begin, int64_t end);                     // groups
  void (*forward)(const DepthwiseArgs& args, int64_t begin, int64_t end);                  // chunk x group
  void (*grad_weight)(const DepthwiseArgs& args, int64_t begin, int64_t end, void* work);  // piece x group
  void (*grad_weight_finish)(const DepthwiseArgs& args, int64_t begin, int64_t end);       // taps and bias
};

MAEFAST_KERNELS(DepthwiseKernels, depthwise_kernels)

}  // namespace maefast
