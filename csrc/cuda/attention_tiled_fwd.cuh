// Attention for more than 64 tokens, forward: one block for up to 128 queries of a sequence and head, one
// warp for every 16 of them. Keys and values pass through shared memory in tiles of 64, the next one on its
// way while this one is computed (Milakov and Gimelshein, 2018: the softmax of a row in one pass; Dao et al.,
// 2022: of tiles).
#pragma once

#include "cuda/attention_kernel.cuh"

namespace maefast::cuda {

constexpr int kFwdWarps = 8;
constexpr int kTileKeys = kShort;

// Blocks on a multiprocessor: three leave 80 registers, which do for width 32 from sm_90 on.
template <int kDepth>
__host__ __device__ constexpr int fwd_resident() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return kDepth <= 16 ? 3 : kDepth <= 96 ? 2 : 1;
#else
  return kDepth <= 32 ? 3 : 2;
#endif
}

// How a launch divides its queries.
struct FwdShape {
  int parts, warps;  // blocks of a sequence and head, warps of a block
  size_t bytes;      // of shared memory
};

__host__ __device__ constexpr size_t fwd_bytes(int depth, int warps) {
  return sizeof(uint16_t) * (depth + 8) * (16 * warps + 4 * kTileKeys);
}

// The fewest blocks that fit into `limit` bytes of shared memory each, all with nearly as many warps.
__host__ inline FwdShape fwd_shape(int depth, int max_q, size_t limit) {
  const int tiles = max_q > 16 ? padded(max_q) / 16 : 1;
  int most = kFwdWarps;
  while (most > 1 && fwd_bytes(depth, most) > limit) --most;
  const int parts = (tiles + most - 1) / most, warps = (tiles + parts - 1) / parts;
  return {parts, warps, fwd_bytes(depth, warps)};
}

template <int kDepth>
__device__ void load_keys(const Args& p, uint16_t* tile, int64_t key, int first, int length) {
  const int rows = length - first < kTileKeys ? length - first : kTileKeys;
  const int64_t from = key + first * p.kv_stride;
  load_tile<kDepth>(tile, p.k + from, p.kv_stride, rows, padded(rows), p.width);
  load_tile<kDepth>(tile + kTileKeys * (kDepth + 8), p.v + from, p.kv_stride, rows, padded(rows), p.width);
}

template <class T, int kDepth>
__global__ void __launch_bounds__(32 * kFwdWarps, fwd_resident<kDepth>())
    attention_tiled_fwd_kernel(Args p, int parts) {
  extern __shared__ __align__(16) uint16_t shared[];
  constexpr int kStride = kDepth + 8, kStage = 2 * kTileKeys * kStride;
  constexpr bool kHold = kDepth <= 64;  // Q in registers, or read again for each tile
  const int part = blockIdx.x % parts, block = blockIdx.x / parts;
  const int b = block / p.heads, h = block % p.heads;
  const Span sq = span(p.cu_q, b, p.max_q), sk = span(p.cu_k, b, p.max_k);
  const int queries = blockDim.x / 2, first_q = part * queries;  // 16 for each warp
  if (first_q >= sq.length) return;
  uint16_t *const stages = shared, *const q = stages + 2 * kStage;
  const int64_t head = static_cast<int64_t>(h) * p.width, key = sk.first * p.kv_stride + head;
  load_tile<kDepth>(q, p.q + (sq.first + first_q) * p.q_stride + head, p.q_stride, sq.length - first_q,
                    queries, p.width);
  const Lane at;
  const int m = 16 * at.warp, row_m = first_q + m;
  const int last_row = first_q + queries - 1;
  const int stop =
      p.causal && last_row + 1 < sk.length ? last_row + 1 : sk.length;  // keys that a query may see
  if (stop > 0) load_keys<kDepth>(p, stages, key, 0, sk.length);
  // Maxima are taken before scaling: the scale is positive, its sign is Q's.
  const uint32_t flip = p.scale < 0.0f ? 0x80008000u : 0u;
  const float scale2 = fmaxf(fabsf(p.scale) * kLog2E, 1e-37f);
  float x[kDepth / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  uint32_t held[kHold ? kDepth / 16 : 1][4];
  // Where this lane's rows of fragments begin, matrices side by side down or to the right first.
  const int down = kept(at.row * kStride + at.col), right = kept(at.row_n * kStride + at.col_n);
  if (stop <= 0) {
    copies_done();
    __syncthreads();
  }
  for (int n0 = 0; n0 < stop; n0 += kTileKeys) {
    copies_done();
    __syncthreads();  // this tile is there for all, and all have left the one before
    const int stage = n0 / kTileKeys % 2;
    if (n0 + kTileKeys < stop) {
      load_keys<kDepth>(p, stages + (1 - stage) * kStage, key, n0 + kTileKeys, sk.length);
    }
    if (kHold && n0 == 0) {
#pragma unroll
      for (int k = 0; k < kDepth / 16 && kHold; ++k) {
        at.a(held[k], q, kStride, m, 16 * k);
#pragma unroll
        for (int i = 0; i < 4; ++i) held[k][i] ^= flip;
      }
    }
    if (row_m >= sq.length || (p.causal && n0 > row_m + 15)) continue;
    const uint16_t* const k_rows = stages + stage * kStage + right;
    const uint16_t* const v_rows = stages + stage * kStage + kTileKeys * kStride + down;
    const int left = sk.length - n0, tiles = left < kTileKeys ? padded(left) / 16 : kTiles;
    float s[2 * kTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[4];
      if constexpr (kHold) {
        for (int i = 0; i < 4; ++i) a[i] = held[k][i];
      } else {
        at.a(a, q, kStride, m, 16 * k);
        for (int i = 0; i < 4; ++i) a[i] ^= flip;
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j < tiles) {
          uint32_t y[4];
          load_matrices<false>(y, k_rows + 16 * (j * kStride + k));
          multiply<T>(s[2 * j], a, y[0], y[1]);
          multiply<T>(s[2 * j + 1], a, y[2], y[3]);
        }
      }
    }
    if (left < kTileKeys || (p.causal && n0 + kTileKeys - 1 > row_m)) {
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int n = 8 * j + 2 * at.t + e % 2;
          if (n >= left || (p.causal && n0 + n > row_m + at.g + e / 2 * 8)) s[j][e] = -INFINITY;
        }
      }
    }
    float low[2];  // exponents are counted from here
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float now = top[r];
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) now = fmaxf(now, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      now = quad_max(now);
      low[r] = now == -INFINITY ? 0.0f : now * scale2;
      const float shrink = power_of_two(top[r] * scale2 - low[r]);
      top[r] = now;
      total[r] *= shrink;
#pragma unroll
      for (int j = 0; j < kDepth / 8; ++j) {
        x[j][2 * r] *= shrink;
        x[j][2 * r + 1] *= shrink;
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j < tiles) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // row g or g + 8, left or right eight columns
          const int r = i % 2, c = 2 * j + i / 2;
          const float e0 = power_of_two(s[c][2 * r] * scale2 - low[r]);
          const float e1 = power_of_two(s[c][2 * r + 1] * scale2 - low[r]);
          total[r] += e0 + e1;
          a[i] = pack<T>(e0, e1);
        }
#pragma unroll
        for (int n = 0; n < kDepth / 16; ++n) {
          uint32_t y[4];
          load_matrices<true>(y, v_rows + 16 * (j * kStride + n));
          multiply<T>(x[2 * n], a, y[0], y[1]);
          multiply<T>(x[2 * n + 1], a, y[2], y[3]);
        }
      }
    }
  }
  if (row_m >= sq.length) return;
  const int64_t first = span(p.cu_q, b, p.max_q).first + first_q;  // read again rather than kept in registers
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] = quad_sum(total[r]);
    inverse[r] = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
    const int row = m + at.g + 8 * r;
    if (at.t == 0 && first_q + row < sq.length) {
      p.lse[(first + row) * p.heads + h] =
          total[r] == 0.0f ? -INFINITY : (top[r] * scale2 + log2f(total[r])) * kLn2;
    }
  }
  uint32_t rounded[kDepth / 8][2];
  round_rows<T, kDepth>(rounded, x, inverse[0], inverse[1]);
  const int64_t stride = static_cast<int64_t>(p.heads) * p.width;
  store_rows<T, kDepth>(at, q, m, rounded, p.out + first * stride + h * p.width, stride, sq.length - first_q,
                        p.width);
}

}  // namespace maefast::cuda
