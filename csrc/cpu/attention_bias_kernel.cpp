// The bias of pairs as the attention kernels read it, a row for each key in base 2, and its gradient back.
#include "cpu/attention_kernel.h"
#include "cpu/attention_math.h"

namespace maefast::MAEFAST_ISA {
namespace {

void columns(const AttentionBiasArgs& a, int64_t begin, int64_t end) {
  const vec_f32 factor = all(kLog2E);
  const int64_t lanes = round_up(a.queries, kLane);
  for (int64_t m = begin; m < end; ++m) {
    float* to = a.to + m * a.keys * a.row;
    transpose_rows(a.from + m * a.queries * a.keys, a.keys, a.queries, a.keys, to, a.row);
    for (int64_t j = 0; j < a.keys; ++j, to += a.row)
      for (int64_t i = 0; i < lanes; i += kLane) store<float>(to + i, load<float>(to + i) * factor);
  }
}

// kLane keys and kLane queries of the sums, added up piece after piece.
MAEFAST_INLINE void tile_of_rows(const AttentionBiasArgs& a, const float* from, float* to, int64_t keys,
                                 int64_t queries) {
  vec_f32 x[kLane];
#pragma GCC unroll 16
  for (int j = 0; j < kLane; ++j) {  // keys beyond the last one repeat it, then are dropped
    const float* row = from + (j < keys ? j : keys - 1) * a.row;
    vec_f32 sum = load<float>(row);
    for (int64_t piece = 1; piece < a.pieces; ++piece) sum = sum + load<float>(row + piece * a.piece);
    x[j] = sum;
  }
  transpose(x);
#pragma GCC unroll 16
  for (int i = 0; i < kLane; ++i) {
    if (i >= queries) continue;
    if (keys == kLane) {
      store<float>(to + i * a.keys, x[i]);
    } else {
      store_some(to + i * a.keys, x[i], keys);
    }
  }
}

void rows(const AttentionBiasArgs& a, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const float* from = a.from + m * a.keys * a.row;
    float* to = a.to + m * a.queries * a.keys;
    for (int64_t i = 0; i < a.queries; i += kLane)
      for (int64_t j = 0; j < a.keys; j += kLane)
        tile_of_rows(a, from + j * a.row + i, to + i * a.keys + j, least(kLane, a.keys - j),
                     least(kLane, a.queries - i));
  }
}

}  // namespace

extern const AttentionBiasKernels attention_bias_kernels = {columns, rows};

}  // namespace maefast::MAEFAST_ISA
