// Kernels of the sparse_conv family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace maefast {

// Of a neighbour table, 2 radius + 1, and the cells in it, for the lists of the backward kernels.
constexpr int64_t kMaxReach = 15, kMaxReach3d = 7, kMaxAround = 343;

// Where a convolution reads in the cells: [planes, rows, columns] each. Maps of two sides have one plane.
struct ConvWindow {
  int64_t kernel[3], stride[3], padding[3], dilation[3];
};

// Cells of d x h x w sites, and the packed indices of those around each one.
struct CellTable {
  const int32_t* neighbours;  // [T, planes * reach * reach]
  int32_t* failed;
  int64_t cells, depth, height, width, reach, planes;  // planes: reach, or 1 of flat maps
};

// Kernels set *failed where the neighbour table points outside the cells.
struct HaloArgs : CellTable {
  const void* src;  // forward: cells [T, d, h, w, C]; backward: gradient of the framed cells
  void* dst;        // forward: framed cells [T, front + d + back, top + h + bottom, left + w + right, C]
  int64_t channels;
  int64_t front, top, left, back, bottom, right;
  DType type;
};

struct TapsArgs : CellTable {
  const void* src;  // forward: cells [T, d, h, w, C]; backward: gradient of the taps
  void* dst;        // forward: taps [T, d / sd, h / sh, w / sw, kd, kh, kw, C]; backward: cells
  int64_t channels;
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
