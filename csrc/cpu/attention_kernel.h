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
  float* grad_bias;  // [Tk, H] or null
};

// A task is a sequence and head, the heads of one sequence in a row; in the forward also a chunk of its
// queries. `scratch` belongs to the task, is aligned to 64 bytes and holds the floats that scratch_floats
// asks for.
struct AttentionKernels {
  int64_t (*scratch_floats)(const AttentionArgs& args);
  void (*forward)(const AttentionArgs& args, int64_t task, float* scratch);
};
struct AttentionBackwardKernels {
  int64_t (*scratch_floats)(const AttentionBackwardArgs& args);
  void (*backward)(const AttentionBackwardArgs& args, int64_t task, float* scratch);
};

MAEFAST_KERNELS_WITH_BF16(AttentionKernels, attention_kernels)
MAEFAST_KERNELS_WITH_BF16(AttentionBackwardKernels, attention_backward_kernels)

}  // namespace maefast
