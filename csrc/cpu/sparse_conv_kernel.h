// Kernels of the sparse_conv family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace maefast {

constexpr int64_t kMaxReach =
    15;  // of a neighbour table: (2 radius + 1), for the lists of the backward kernels

// Where a convolution reads in the cells: [rows, columns] each.
struct ConvWindow {
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// Kernels set *failed where the neighbour table points outside the cells.
struct HaloArgs {
  const void* src;  // forward: cells [T, h, w, C]; backward: gradient of the framed cells
  void* dst;        // forward: framed cells [T, top + h + bottom, left + w + right, C]; backward: cells
  const int32_t* neighbours;  // [T, reach * reach]
  int32_t* failed;
  int64_t cells, height, width, channels, reach;
  int64_t top, left, bottom, right;
  DType type;
};

struct TapsArgs {
  const void* src;  // forward: cells [T, h, w, C]; backward: gradient of the taps
  void* dst;        // forward: taps [T, h / sh, w / sw, kh, kw, C]; backward: cells
  const int32_t* neighbours;
  int32_t* failed;
  int64_t cells, height, width, channels, reach;
  ConvWindow window;
  DType type;
};

struct SparseConvKernels {
  void (*halo)(const HaloArgs& args, int64_t begin, int64_t end);           // lines of framed cells
  void (*halo_backward)(const HaloArgs& args, int64_t begin, int64_t end);  // lines of cells
  void (*taps)(const TapsArgs& args, int64_t begin, int64_t end);           // lines of outputs
  void (*taps_backward)(const TapsArgs& args, int64_t begin, int64_t end);  // lines of cells
};

MAEFAST_KERNELS(SparseConvKernels, sparse_conv_kernels)

}  // namespace maefast
