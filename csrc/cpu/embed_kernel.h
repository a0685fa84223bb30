// Row copies of the embed family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace maefast {

// Packed row r of sample b lies in [cu[b] + b*prefix_kept, cu[b+1] + (b+1)*prefix_kept), prefix rows first.
struct GatherArgs {
  const char* src;       // forward: x [B, P+N] rows; backward: grad, packed rows
  char* dst;             // forward: packed rows; backward: grad_x [B, P+N] rows
  const int32_t* index;  // forward: flat token of packed row t, [T]; backward: slot [B*N]
  const int32_t* cu;     // [B+1]
  int64_t row_bytes;
  int64_t batch;
  int64_t tokens;   // N
  int64_t prefix;   // P
  int64_t packed;   // T
  bool keep_prefix;
  bool masked;      // backward: rows are those of the masked list
};

struct EmbedKernels {
  void (*gather_rows)(const GatherArgs& args, int64_t begin, int64_t end);   // packed rows [begin, end)
  void (*scatter_rows)(const GatherArgs& args, int64_t begin, int64_t end);  // rows [begin, end) of [B, P+N]
};

MAEFAST_KERNELS(EmbedKernels, embed_kernels)

}  // namespace maefast
