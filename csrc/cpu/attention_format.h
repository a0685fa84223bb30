// What forward and backward share: a sequence and head, the scores, and the two formats of the matrix
// products.
//
// Scores stand transposed: a row for each key, a lane for each query. Then everything that belongs to a query
// (maximum, sum, logarithm, statistics) is vertical, and lanes beyond the last query need no mask: nothing
// reads what they give.
#pragma once

#include "cpu/attention_amx.h"
#include "cpu/attention_kernel.h"
#include "cpu/attention_tile.h"
#include "cpu/attention_turn.h"

namespace maefast::MAEFAST_ISA {
namespace {

constexpr int64_t kQueries = 64;    // of a block
constexpr int64_t kMostKeys = 256;  // of a block: its scores stay in the second-level cache

// Floats from one row of scores to the next: an odd number of cache lines, so that the rows of a column do
// not all fall into the same few sets of the first-level cache.
constexpr int64_t kRowFloats = kQueries + 16;
MAEFAST_INLINE int64_t row_stride(int64_t lanes) {
  return (round_up(lanes, 16) / 16 | 1) * 16;
}

// Even blocks of at most `most`, a multiple of `unit` each; 0 for n = 0.
MAEFAST_INLINE int64_t block_size(int64_t n, int64_t most, int64_t unit) {
  const int64_t blocks = (n + most - 1) / most;
  return blocks > 0 ? round_up((n + blocks - 1) / blocks, unit) : 0;
}

// Cuts a task's scratch memory into arrays of floats, each on a cache line.
struct Cutter {
  float* at;
  MAEFAST_INLINE float* operator()(int64_t floats) {
    float* const here = at;
    at += round_up(floats, 16);
    return here;
  }
};

template <class T>
struct Head {
  int64_t q0, nq, k0, nk;  // first row and number of queries, of keys
  int64_t h, offset;       // elements from the start of a row to this head
  const T* q;
  const T* k;
  const T* v;

  MAEFAST_INLINE Head(const Sequences& s, int64_t b, int64_t head) : h(head), offset(head * s.width) {
    q0 = s.cu_q ? s.cu_q[b] : b * s.max_q;
    nq = s.cu_q ? s.cu_q[b + 1] - q0 : s.max_q;
    k0 = s.cu_k ? s.cu_k[b] : b * s.max_k;
    nk = s.cu_k ? s.cu_k[b + 1] - k0 : s.max_k;
    q = static_cast<const T*>(s.q) + q0 * s.q_row + offset;
    k = static_cast<const T*>(s.k) + k0 * s.k_row + offset;
    v = static_cast<const T*>(s.v) + k0 * s.k_row + offset;
  }
};

// Which sequence, head and chunk of queries a task is. With a bias the sequences that share a matrix follow
// one another, so that it stays in the cache.
struct Place {
  int64_t b, h, chunk;
};
MAEFAST_INLINE Place place_of(const Sequences& s, int64_t task, int64_t chunks) {
  if (!s.bias) return {task / (chunks * s.heads), task % s.heads, task / s.heads % chunks};
  const int64_t turns = s.batch / s.groups, matrix = task / chunks / turns;
  return {task / chunks % turns * s.groups + matrix / s.heads, matrix % s.heads, task % chunks};
}

// Scores as exp2 wants them: times log2(e). -inf where the key comes after the query.
struct Scores {
  float factor;  // scale * log2(e)
  const float* key_bias;
  int64_t key_bias_row;
  const float* bias;
  int64_t bias_row;
  bool causal;
  int64_t ahead;  // first key - first query of the block

  MAEFAST_INLINE Scores(const Sequences& s, int64_t b, int64_t first_key_row, int64_t head, int64_t first_key,
                        int64_t first_query)
      : factor(s.scale * kLog2E),
        key_bias(s.key_bias ? s.key_bias + first_key_row * s.heads + head : nullptr),
        key_bias_row(s.heads),
        bias(nullptr),
        bias_row(s.bias_row),
        causal(s.causal),
        ahead(first_key - first_query) {
    if (s.bias) {
      const int64_t matrix = b % s.groups * s.heads + head;
      bias = s.bias + (matrix * s.max_k + first_key) * bias_row + first_query;
    }
  }

  // Whether they are but a positive multiple of the products.
  MAEFAST_INLINE bool plain() const {
    return key_bias == nullptr && bias == nullptr && !causal && factor >= 0;
  }

  MAEFAST_INLINE vec_f32 of(vec_f32 product, int64_t key, int64_t lane) const {
    vec_f32 s = product * all(factor);
    if (key_bias) s = s + all(key_bias[key * key_bias_row] * kLog2E);
    if (bias) s = s + load<float>(bias + key * bias_row + lane);
    if (causal) {
      vec_i32 query;
      for (int i = 0; i < kLane; ++i) query[i] = i;
      s = query >= int32_t(ahead + key - lane) ? s : all(-kInfinity);
    }
    return s;
  }
};

// Products of float32 words; 16-bit rows are widened.
template <class T>
struct Wide {
  using Element = T;
  using Step = Fma;
  static constexpr int64_t kPair = 1;  // elements of a word along the depth

  // dst[w * ld + i] = word w of row i.
  static MAEFAST_INLINE void columns(const T* rows, int64_t stride, int64_t count, int64_t width, float* dst,
                                     int64_t ld) {
    transpose_rows(rows, stride, count, width, dst, ld);
  }
  // Rows as vectors: in place where they are such, else in `space`.
  static MAEFAST_INLINE Right right(const T* rows, int64_t stride, int64_t count, int64_t width,
                                    float* space) {
    if constexpr (is_same<T, float>) {
      if (width % kLane == 0) return {rows, stride};
    }
    widen_rows(rows, stride, count, width, space);
    return {space, round_up(width, kLane)};
  }
  // Rows as words to broadcast; `packed` is what right() gave for them.
  static MAEFAST_INLINE Left left(const T*, int64_t, Right packed) { return {packed.p, packed.row, 1}; }
};

#if defined(__AVX512BF16__)
// Products of bfloat16 pairs, exact and summed in float32. Probabilities and dS are rounded to bfloat16.
struct Pairs {
  using Element = bf16;
  using Step = Dot;
  static constexpr int64_t kPair = 2;

  static MAEFAST_INLINE void columns(const bf16* rows, int64_t stride, int64_t count, int64_t width,
                                     float* dst, int64_t ld) {
    transpose_rows(reinterpret_cast<const float*>(rows), stride / 2, count, width / 2, dst, ld);
  }
  static MAEFAST_INLINE Right right(const bf16* rows, int64_t stride, int64_t count, int64_t width,
                                    float* space) {
    pair_rows(rows, stride, count, width, space);
    return {space, round_up(width, kLane)};
  }
  static MAEFAST_INLINE Left left(const bf16* rows, int64_t stride, Right) {
    return {reinterpret_cast<const float*>(rows), stride / 2, 1};
  }
};
#endif

#if defined(__AMX_BF16__)
struct PairTiles : Pairs {
  using Step = TileDot;
};
using BFloat16 = PairTiles;
#elif defined(__AVX512BF16__)
using BFloat16 = Pairs;
#else
using BFloat16 = Wide<bf16>;
#endif

// Words that n elements along the depth fill.
template <class Format>
MAEFAST_INLINE int64_t words(int64_t n) {
  return (n + Format::kPair - 1) / Format::kPair;
}

}  // namespace
}  // namespace maefast::MAEFAST_ISA
