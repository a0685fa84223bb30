// Kernels of the attention family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace maefast {

// Sequences of one call. Row r of head h starts at base + r * row + h * width elements. Without cu, sequence
// b holds rows b * max .. (b + 1) * max.
struct Sequences {
  int64_t batch, heads, width, max_q, max_k;
  int64_t q_row, k_row, out_row;  // elements between rows of q, of k and v, of out
  const int32_t* cu_q;
  const int32_t* cu_k;
  const void* q;
  const void* k;
  const void* v;
  const float* key_bias;  // [Tk, H] or null
  // Of pairs, in base 2, a row for each key: [groups, H, max_k, bias_row] or null. Sequence b takes group
  // b % groups. Lanes beyond the last query, up to a multiple of the vector's, are zero.
  const float* bias;
  int64_t groups, bias_row;
  const float* cos;  // rows [D] for each of q's or, with `shared_turn`, for each of a sequence; or null
  const float* sin;
  bool shared_turn, interleaved;
  const uint8_t* marked;  // [Tk] or null
  float scale;
  bool causal;
  DType type;  // float32, float16 or bfloat16
};

struct AttentionArgs : Sequences {
  void* out;       // [Tq, H, D]
  float* lse;      // [Tq, H]
  float* entropy;  // the same, or null
  float* mass;     // the same, or null
  int64_t chunk;   // queries of a task
  int64_t chunks;  // tasks of a sequence and head
};

struct AttentionBackwardArgs : Sequences {
  const void* grad;  // [Tq, H, D]
  const void* out;
  const float* lse;
  const float* entropy;
  const float* mass;
  const float* grad_lse;  // these three [Tq, H] or null
  const float* grad_entropy;
  const float* grad_mass;
  void* grad_q;  // rows as those of q, k and v
  void* grad_k;
  void* grad_v;
  float* grad_key_bias;  // [Tk, H] or null
  // Sums of dS, laid out as `bias`, over `pieces` parts of the sequences of a group: [pieces, ...] or null.
  float* grad_bias;
  int64_t pieces;
};

// A task is a sequence and head, in the order of place_of; in the forward also a chunk of its queries; in the
// backward with grad_bias a piece, a group and head. `scratch` belongs to the task, is aligned to 64 bytes
// and holds the floats that scratch_floats asks for.
struct AttentionKernels {
  int64_t (*scratch_floats)(const AttentionArgs& args);
  void (*forward)(const AttentionArgs& args, int64_t task, float* scratch);
};
struct AttentionBackwardKernels {
  int64_t (*scratch_floats)(const AttentionBackwardArgs& args);
  void (*backward)(const AttentionBackwardArgs& args, int64_t task, float* scratch);
};

// From a bias [groups * H, max_q, max_k] to that of Sequences, and back from the pieces of its gradient.
struct AttentionBiasArgs {
  int64_t queries, keys, row;  // max_q, max_k, bias_row
  int64_t pieces, piece;       // and floats from one to the next
  const float* from;
  float* to;
};

// [begin, end): matrices, one for each group and head.
struct AttentionBiasKernels {
  void (*columns)(const AttentionBiasArgs& args, int64_t begin, int64_t end);
  void (*rows)(const AttentionBiasArgs& args, int64_t begin, int64_t end);
};

MAEFAST_KERNELS_WITH_BF16(AttentionKernels, attention_kernels)
MAEFAST_KERNELS_WITH_BF16(AttentionBackwardKernels, attention_backward_kernels)
MAEFAST_KERNELS(AttentionBiasKernels, attention_bias_kernels)

}  // namespace maefast
