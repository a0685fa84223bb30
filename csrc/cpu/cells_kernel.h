// Kernels of the cells family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"
#include "cpu/units.h"

namespace maefast {

// A map of B x (planes * d) x (rows * h) x (columns * w) sites and its T packed cells of d x h x w sites; a
// flat map has one plane of depth one. Kernels set *failed where the content of a plan points outside its
// tensors.
struct CellsArgs {
  const void* in;        // the map, or the packed cells [T, d, h, w, C]
  void* out;             // the other one
  const void* fill;      // [C] or null, for masked sites
  const int32_t* index;  // `cells` [T] (pack) or `slot` [B * planes * rows * columns] (unpack)
  int32_t* failed;
  int64_t planes, rows, columns, d, h, w, channels;
  int64_t limit;       // index values are below it
  bool channels_last;  // the map is [B, D, H, W, C], not [B, C, D, H, W]
  int64_t bytes;       // of an element: a copy does not care for more
};

struct FillSumArgs {
  const void* grad;  // [B, D, H, W, C]
  void* sums;        // [units, C] in the arithmetic type
  const int32_t* slot;
  int64_t map_rows, rows, columns, d, h, w, channels, units;  // map_rows: B * D * H
  DType type;
};

struct CellsKernels {
  void (*pack_cells)(const CellsArgs& args, int64_t begin, int64_t end);  // the T * d * h rows of sites
  void (*unpack_cells)(const CellsArgs& args, int64_t begin,
                       int64_t end);                                      // the B * D * H rows of the map
  void (*fill_sum)(const FillSumArgs& args, int64_t begin, int64_t end);  // units
  void (*sum_pieces)(const SumArgs& args, int64_t begin, int64_t end);    // elements
};

MAEFAST_KERNELS(CellsKernels, cells_kernels)

}  // namespace maefast
