// Kernels of the embed family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"
#include "cpu/patch.h"
#include "cpu/units.h"
#include "plan.h"

namespace maefast {

// Packed row r of sample b lies in [cu[b] + b*prefix_kept, cu[b+1] + (b+1)*prefix_kept), prefix rows first.
// Kernels set *failed where the content of a plan points outside its tensors, and write zeros there.
struct GatherArgs {
  const char* src;       // forward: x [B, P+N] rows; backward: grad, packed rows
  char* dst;             // forward: packed rows; backward: grad_x [B, P+N] rows
  const int32_t* index;  // forward: flat token of packed row t, [T]; backward: slot [B*N]
  const int32_t* cu;     // [B+1]
  int32_t* failed;
  int64_t row_bytes;
  int64_t batch;
  int64_t tokens;  // N
  int64_t prefix;  // P
  int64_t packed;  // T
  bool keep_prefix;
  bool masked;  // backward: rows are those of the masked list
  bool zeroed;  // dst is zero already
};

struct PatchRowsArgs {
  PatchGrid grid;
  const void* src;       // forward: images; backward: grad [T, K]
  void* dst;             // forward: rows [R, K]; backward: grad of the images
  const int32_t* index;  // forward: flat token of each row, [R]; backward: slot [B*N]
  int32_t* failed;
  int64_t rows;
  DType src_type, dst_type;
};

struct PlaceArgs {
  const void* y;     // [T, D]
  const void* pos;   // [N, D] or null
  const void* lead;  // prefix tokens [P, D] or null
  void* out;         // [T + B*P, D]
  const int32_t* visible;
  const int32_t* cu;
  int32_t* failed;
  int64_t batch, tokens, prefix, packed, width;
  DType y_type, out_type;
};

struct PlaceBackwardArgs {
  const void* grad;  // [T + B*P, D]
  void* grad_y;      // [T, D]
  const int32_t* slot;
  const int32_t* cu;
  int32_t* failed;
  int64_t batch, tokens, prefix, packed, width;
  Units units;
  DType grad_type, y_type;
};

struct EmbedKernels {
  void (*gather_rows)(const GatherArgs& args, int64_t begin, int64_t end);    // packed rows [begin, end)
  void (*scatter_rows)(const GatherArgs& args, int64_t begin, int64_t end);   // rows [begin, end) of [B, P+N]
  void (*patch_rows)(const PatchRowsArgs& args, int64_t begin, int64_t end);  // rows
  void (*patch_rows_backward)(const PatchRowsArgs& args, int64_t begin,
                              int64_t end);                                 // rows of tokens: B*gt*gh
  void (*place_tokens)(const PlaceArgs& args, int64_t begin, int64_t end);  // packed rows
  void (*place_tokens_backward)(const PlaceBackwardArgs& args, int64_t begin, int64_t end);  // units
  // Only grad_y, where the positions need no gradient.
  void (*unplace_rows)(const PlaceBackwardArgs& args, int64_t begin, int64_t end);  // rows of grad_y
  void (*sum_pieces)(const SumArgs& args, int64_t begin, int64_t end);              // elements
};

MAEFAST_KERNELS(EmbedKernels, embed_kernels)

}  // namespace maefast
