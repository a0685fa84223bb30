// The device code of attention.cu for up to 64 tokens: one block for each sequence and head, one warp for
// every 16 rows, everything in shared memory, one pass, sums in float32, no atomics. Longer ones:
// attention_tiled_*.cuh.
//
// Widths are padded to a multiple of 16 and lengths to one of 16 with zeros in shared memory, which add
// nothing to a sum.
#pragma once

#include <cmath>

#include "cuda/attention_mma.cuh"

namespace maefast::cuda {

constexpr int kLongest = 256;        // tokens; above 64 in attention_tiled_*.cuh
constexpr int kShort = 64;           // whose scores a warp holds at once
constexpr int kTiles = kShort / 16;  // of 16 keys or queries
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct Args {
  const uint16_t *q, *k, *v, *grad;  // row 0, head 0
  uint16_t *out, *dq, *dk, *dv;
  float* lse;                      // [Tq, heads], written by the forward, read by the backward
  const int32_t *cu_q, *cu_k;      // null: equal lengths
  int64_t q_stride, kv_stride;     // elements between rows of q (dq) and of k and v (dk, dv)
  int heads, width, max_q, max_k;  // width: elements of a head, in steps of 8
  float scale;
  bool causal;
  const uint16_t* o;  // the output, for the backward above 64 tokens
  float* sums;        // dQ between its rounds over the keys
};

struct Span {
  int64_t first;
  int length;
};

__device__ inline Span span(const int32_t* cu, int b, int longest) {
  if (cu == nullptr) return {static_cast<int64_t>(b) * longest, longest};
  const int32_t first = cu[b];
  const int32_t length = cu[b + 1] - first;
  return {first, length < longest ? length : longest};
}

__host__ __device__ constexpr int padded(int n) {
  return (n + 15) / 16 * 16;
}

// A warp's and a lane's place, and the fragments that start at row r, column c of a tile with rows of kRow.
struct Lane {
  int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  int g = lane / 4, t = lane % 4;
  int row = lane % 16, col = lane / 16 * 8;                        // matrices side by side down, then right
  int row_n = lane / 16 * 8 + lane % 8, col_n = lane / 8 % 2 * 8;  // first right, then down

  __device__ void a(uint32_t (&r)[4], const uint16_t* tile, int stride, int m, int k) const {
    load_matrices<false>(r, tile + (m + row) * stride + k + col);
  }
  __device__ void a_by_k(uint32_t (&r)[4], const uint16_t* tile, int stride, int k, int m) const {
    load_matrices<true>(r, tile + (k + row_n) * stride + m + col_n);
  }
  // Two fragments of B: columns n to n+7 in r[0] and r[1], n+8 to n+15 in r[2] and r[3].
  __device__ void b_by_k(uint32_t (&r)[4], const uint16_t* tile, int stride, int k, int n) const {
    load_matrices<true>(r, tile + (k + row) * stride + n + col);
  }
  __device__ void b_by_n(uint32_t (&r)[4], const uint16_t* tile, int stride, int n, int k) const {
    load_matrices<false>(r, tile + (n + row_n) * stride + k + col_n);
  }
};

template <int kDepth>
__device__ void load_tile(uint16_t* tile, const uint16_t* from, int64_t stride, int rows, int all,
                          int width) {
  constexpr int kChunks = kDepth / 8;
  for (int i = threadIdx.x; i < all * kChunks; i += blockDim.x) {
    const int row = i / kChunks, col = i % kChunks * 8;
    const bool wanted = row < rows && col < width;
    copy_in(tile + row * (kDepth + 8) + col, wanted ? from + row * stride + col : from, wanted);
  }
}

// Writes a warp's 16 rows of fragments, through rows m.. of a tile that only this warp uses by now.
template <class T, int kDepth>
__device__ void store_rows(const Lane& at, uint16_t* tile, int m, const uint32_t (&x)[kDepth / 8][2],
                           uint16_t* to, int64_t stride, int rows, int width) {
  constexpr int kStride = kDepth + 8, kChunks = kDepth / 8;
  __syncwarp();
  for (int j = 0; j < kDepth / 8; ++j) {
    uint16_t* const word = tile + (m + at.g) * kStride + 8 * j + 2 * at.t;
    *reinterpret_cast<uint32_t*>(word) = x[j][0];
    *reinterpret_cast<uint32_t*>(word + 8 * kStride) = x[j][1];
  }
  __syncwarp();
  for (int i = at.lane; i < 16 * kChunks; i += 32) {
    const int row = m + i / kChunks, col = i % kChunks * 8;
    if (row < rows && col < width) {
      *reinterpret_cast<uint4*>(to + row * stride + col) =
          *reinterpret_cast<const uint4*>(tile + row * kStride + col);
    }
  }
  __syncwarp();
}

template <class T, int kDepth>
__device__ void round_rows(uint32_t (&to)[kDepth / 8][2], const float (&x)[kDepth / 8][4], float low,
                           float high) {
#pragma unroll
  for (int j = 0; j < kDepth / 8; ++j) {
    to[j][0] = pack<T>(x[j][0] * low, x[j][1] * low);
    to[j][1] = pack<T>(x[j][2] * high, x[j][3] * high);
  }
}

// s = rows m.. of `a` times all rows of `b`, transposed, over the depth of the tiles.
template <class T, int kDepth>
__device__ void scores(const Lane& at, float (&s)[2 * kTiles][4], const uint16_t* a, int m, const uint16_t* b,
                       int tiles) {
#pragma unroll
  for (int j = 0; j < 2 * kTiles; ++j) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t x[4], y[4];
    at.a(x, a, kDepth + 8, m, k);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j < tiles) {
        at.b_by_n(y, b, kDepth + 8, 16 * j, k);
        multiply<T>(s[2 * j], x, y[0], y[1]);
        multiply<T>(s[2 * j + 1], x, y[2], y[3]);
      }
    }
  }
}

// x += a (16 x 16) times rows k.. of a tile (16 x kDepth).
template <class T, int kDepth>
__device__ void accumulate(const Lane& at, float (&x)[kDepth / 8][4], const uint32_t (&a)[4],
                           const uint16_t* tile, int k) {
#pragma unroll
  for (int n = 0; n < kDepth / 16; ++n) {
    uint32_t y[4];
    at.b_by_k(y, tile, kDepth + 8, k, 16 * n);
    multiply<T>(x[2 * n], a, y[0], y[1]);
    multiply<T>(x[2 * n + 1], a, y[2], y[3]);
  }
}

template <class T, int kDepth>
__global__ void __launch_bounds__(128) attention_fwd_kernel(Args p) {
  extern __shared__ __align__(16) uint16_t shared[];
  const int b = blockIdx.x / p.heads, h = blockIdx.x % p.heads;
  const Span sq = span(p.cu_q, b, p.max_q), sk = span(p.cu_k, b, p.max_k);
  const int all_q = padded(p.max_q), all_k = padded(p.max_k);
  uint16_t *const q = shared, *const k = q + all_q * (kDepth + 8), *const v = k + all_k * (kDepth + 8);
  const int64_t head = static_cast<int64_t>(h) * p.width;
  const int64_t key = sk.first * p.kv_stride + head;
  load_tile<kDepth>(q, p.q + sq.first * p.q_stride + head, p.q_stride, sq.length, all_q, p.width);
  load_tile<kDepth>(k, p.k + key, p.kv_stride, sk.length, all_k, p.width);
  load_tile<kDepth>(v, p.v + key, p.kv_stride, sk.length, all_k, p.width);
  copies_done();
  __syncthreads();

  const Lane at;
  const int m = 16 * at.warp, tiles = padded(sk.length) / 16;
  if (m >= sq.length) return;
  float s[2 * kTiles][4];
  scores<T, kDepth>(at, s, q, m, k, tiles);
  const float scale2 = p.scale * kLog2E;
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < 2 * kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int n = 8 * j + 2 * at.t + e % 2;
      const bool there = n < sk.length && (!p.causal || n <= m + at.g + e / 2 * 8);
      s[j][e] = there ? s[j][e] * scale2 : -INFINITY;
      top[e / 2] = fmaxf(top[e / 2], s[j][e]);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = quad_max(top[r]);
    if (top[r] == -INFINITY) top[r] = 0.0f;  // no key
  }
#pragma unroll
  for (int j = 0; j < 2 * kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[j][e] = exp2f(s[j][e] - top[e / 2]);
      total[e / 2] += s[j][e];
    }
  }
  float x[kDepth / 8][4] = {};
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    if (j < tiles) {
      const uint32_t a[4] = {pack<T>(s[2 * j][0], s[2 * j][1]), pack<T>(s[2 * j][2], s[2 * j][3]),
                             pack<T>(s[2 * j + 1][0], s[2 * j + 1][1]),
                             pack<T>(s[2 * j + 1][2], s[2 * j + 1][3])};
      accumulate<T, kDepth>(at, x, a, v, 16 * j);
    }
  }
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] = quad_sum(total[r]);
    inverse[r] = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
    const int row = m + at.g + 8 * r;
    if (at.t == 0 && row < sq.length) {
      p.lse[(sq.first + row) * p.heads + h] =
          total[r] == 0.0f ? -INFINITY : (top[r] + log2f(total[r])) * kLn2;
    }
  }
  uint32_t rounded[kDepth / 8][2];
  round_rows<T, kDepth>(rounded, x, inverse[0], inverse[1]);
  const int64_t stride = static_cast<int64_t>(p.heads) * p.width;
  store_rows<T, kDepth>(at, q, m, rounded, p.out + sq.first * stride + head, stride, sq.length, p.width);
}

// A warp first has 16 queries: P, dS and dQ; P and dS go to shared memory. Then it has 16 keys: dV and dK.
template <class T, int kDepth>
__global__ void __launch_bounds__(128) attention_bwd_kernel(Args p) {
  extern __shared__ __align__(16) uint16_t shared[];
  constexpr int kStride = kDepth + 8;
  const int b = blockIdx.x / p.heads, h = blockIdx.x % p.heads;
  const Span sq = span(p.cu_q, b, p.max_q), sk = span(p.cu_k, b, p.max_k);
  const int all_q = padded(p.max_q), all_k = padded(p.max_k), wide = all_k + 8;
  uint16_t *const q = shared, *const g = q + all_q * kStride, *const k = g + all_q * kStride,
                  *const v = k + all_k * kStride, *const ps = v + all_k * kStride,
                  *const ds = ps + all_q * wide;
  const int64_t head = static_cast<int64_t>(h) * p.width, stride = static_cast<int64_t>(p.heads) * p.width;
  const int64_t query = sq.first * p.q_stride + head, key = sk.first * p.kv_stride + head;
  load_tile<kDepth>(q, p.q + query, p.q_stride, sq.length, all_q, p.width);
  load_tile<kDepth>(k, p.k + key, p.kv_stride, sk.length, all_k, p.width);
  load_tile<kDepth>(v, p.v + key, p.kv_stride, sk.length, all_k, p.width);
  load_tile<kDepth>(g, p.grad + sq.first * stride + head, stride, sq.length, all_q, p.width);
  copies_done();
  __syncthreads();

  const Lane at;
  const int m = 16 * at.warp;
  const int tiles_q = padded(sq.length) / 16, tiles_k = padded(sk.length) / 16;
  uint32_t dq[kDepth / 8][2];
  if (m < sq.length) {
    float s[2 * kTiles][4], dp[2 * kTiles][4], delta[2] = {0.0f, 0.0f}, lse2[2];
    scores<T, kDepth>(at, s, q, m, k, tiles_k);
    scores<T, kDepth>(at, dp, g, m, v, tiles_k);
    const float scale2 = p.scale * kLog2E;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = m + at.g + 8 * r;
      const float lse = row < sq.length ? p.lse[(sq.first + row) * p.heads + h] : INFINITY;
      lse2[r] = lse == -INFINITY ? INFINITY : lse * kLog2E;  // all P are 0
    }
#pragma unroll
    for (int j = 0; j < 2 * kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int n = 8 * j + 2 * at.t + e % 2;
        const bool there = n < sk.length && (!p.causal || n <= m + at.g + e / 2 * 8);
        s[j][e] = there ? exp2f(s[j][e] * scale2 - lse2[e / 2]) : 0.0f;
        delta[e / 2] += s[j][e] * dp[j][e];
      }
    }
    delta[0] = quad_sum(delta[0]);
    delta[1] = quad_sum(delta[1]);
    float x[kDepth / 8][4] = {};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j >= tiles_k) continue;
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // row g or g + 8, left or right eight columns
        const int r = i % 2, c = 2 * j + i / 2;
        const float low = s[c][2 * r], high = s[c][2 * r + 1];
        a[i] = pack<T>(low * (dp[c][2 * r] - delta[r]), high * (dp[c][2 * r + 1] - delta[r]));
        const int place = (m + at.g + 8 * r) * wide + 8 * c + 2 * at.t;
        *reinterpret_cast<uint32_t*>(ps + place) = pack<T>(low, high);
        *reinterpret_cast<uint32_t*>(ds + place) = a[i];
      }
      accumulate<T, kDepth>(at, x, a, k, 16 * j);
    }
    round_rows<T, kDepth>(dq, x, p.scale, p.scale);
  }
  __syncthreads();  // P and dS are there; k and v have been read
  if (m < sk.length) {
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
      float x[kDepth / 8][4] = {};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (i >= tiles_q) continue;
        uint32_t a[4];
        at.a_by_k(a, turn == 0 ? ps : ds, wide, 16 * i, m);
        accumulate<T, kDepth>(at, x, a, turn == 0 ? g : q, 16 * i);
      }
      uint32_t rounded[kDepth / 8][2];
      round_rows<T, kDepth>(rounded, x, turn == 0 ? 1.0f : p.scale, turn == 0 ? 1.0f : p.scale);
      uint16_t* const to = (turn == 0 ? p.dv : p.dk) + key;
      store_rows<T, kDepth>(at, turn == 0 ? v : k, m, rounded, to, p.kv_stride, sk.length, p.width);
    }
  }
  __syncthreads();  // q has been read
  if (m < sq.length) store_rows<T, kDepth>(at, q, m, dq, p.dq + query, p.q_stride, sq.length, p.width);
}

}  // namespace maefast::cuda
