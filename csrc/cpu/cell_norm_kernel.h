// Kernels of the cell_norm family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace maefast {

// Rows [cu[b] * sites, cu[b + 1] * sites) are segment b; without cu all rows are segment 0. For sums each
// segment is cut into pieces, which depend on the sizes alone: unit u is piece u % pieces of segment u /
// pieces.
struct Segments {
  const int32_t* cu;
  int64_t sites, count, rows, pieces;
};

struct RowRange {
  int64_t first, last;
};

static inline RowRange segment_rows(const Segments& s, int64_t b) {
  if (!s.cu) return {0, s.rows};
  return {s.cu[b] * s.sites, s.cu[b + 1] * s.sites};
}

static inline RowRange unit_rows(const Segments& s, int64_t unit) {
  const RowRange all = segment_rows(s, unit / s.pieces);
  const int64_t n = all.last - all.first, piece = unit % s.pieces;
  return {all.first + n * piece / s.pieces, all.first + n * (piece + 1) / s.pieces};
}

enum class Act { none = 0, relu = 1, relu6 = 2 };

struct SegmentStatsArgs {
  const void* x;   // [R, C]
  double* pieces;  // [units, 2, C]: mean, sum of squared deviations
  void* mean;      // [segments, C] in the arithmetic type
  void* var;
  Segments segments;
  int64_t width;
  DType type;
};

struct NormActArgs {
  const void* x;         // [R, C]
  const void* residual;  // [R, C] or null
  const void* mean;      // [segments, C] in the arithmetic type, as scale
  const void* scale;
  const void* bias;  // [C]
  void* y;           // [R, C]
  Segments segments;
  int64_t width;
  DType type;
  Act act;
};

struct NormActSumsArgs {
  const void* grad;  // [R, C]
  const void* x;
  const void* gate;  // null; y where act is relu, the residual where it is relu6
  const void* mean;
  const void* scale;
  const void* bias;
  void* passed;    // [R, C], the gradient behind the activation; with gate
  double* pieces;  // [units, 2, C]: of the passed gradient g, and of g * (x - mean)
  void* sums;      // [2, segments, C] in the arithmetic type
  Segments segments;
  int64_t width;
  DType type;
  Act act;
};

struct NormActBackwardArgs {
  const void* grad;  // [R, C]
  const void* x;
  const void* mean;
  const void* scale;
  const void* bias;
  const void* offset;  // [segments, C] or null, as slope
  const void* slope;
  void* grad_x;  // [R, C]
  Segments segments;
  int64_t width;
  DType type;
  Act act;
};

struct CellNormKernels {
  void (*stats)(const SegmentStatsArgs& args, int64_t begin, int64_t end);                 // units
  void (*stats_total)(const SegmentStatsArgs& args, int64_t begin, int64_t end);           // channels
  void (*norm_act)(const NormActArgs& args, int64_t begin, int64_t end);                   // rows
  void (*sums)(const NormActSumsArgs& args, int64_t begin, int64_t end);                   // units
  void (*sums_total)(const NormActSumsArgs& args, int64_t begin, int64_t end);             // channels
  void (*norm_act_backward)(const NormActBackwardArgs& args, int64_t begin, int64_t end);  // rows
};

MAEFAST_KERNELS(CellNormKernels, cell_norm_kernels)

}  // namespace maefast
