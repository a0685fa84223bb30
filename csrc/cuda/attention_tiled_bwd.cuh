// Attention for more than 64 tokens, backward: one block for each sequence and head.
//
// Each key warp owns 16 or 32 keys, with dK and dV in registers; all go through the queries 16 at a time. A
// helper warp brings queries and dO (three steps ahead), lse and delta (one ahead), and sums dQ from the dS
// of the step before, which lies in shared memory. So a step has one barrier, nothing is computed twice, and
// each sum has one owner and one order. Keys that do not fit pass in rounds; dQ then waits in `Args::sums`.
//
// delta = rowsum(dO * O) (Dao et al., 2022). Scores are transposed, [keys, queries]: P and dS enter the
// products for dV and dK as they lie in registers.
#pragma once

#include "cuda/attention_tiled_helper.cuh"

namespace maefast::cuda {

template <class T, int kDepth, int kBlocks>
struct KeyWarp {
  using B = Bwd<kDepth, kBlocks>;
  static constexpr int kStride = B::kStride, kKeys = B::kKeys;
  const Args& p;
  const BwdShared<kDepth, kBlocks> in;
  const Lane at;
  // Where this lane's rows of fragments begin, matrices side by side down or to the right first, and its
  // words of dS.
  const int down = kept(at.row * kStride + at.col), right = kept(at.row_n * kStride + at.col_n);
  const int word = kept(ds_place(at.g, 0) + 2 * at.t);
  float dk[kBlocks][kDepth / 8][4] = {}, dv[kBlocks][kDepth / 8][4] = {};

  __device__ KeyWarp(const Args& args, const BwdShared<kDepth, kBlocks>& shared) : p(args), in(shared) {}

  __device__ void load(int64_t from, int rows) const {
    uint16_t *const k = in.k(at.warp), *const v = in.v(at.warp);
#pragma unroll 1
    for (int c = at.lane; c < kKeys * (kDepth / 8); c += 32) {
      const int r = c / (kDepth / 8), col = c % (kDepth / 8) * 8;
      const bool wanted = r < rows && col < p.width;
      const int64_t source = wanted ? from + r * p.kv_stride + col : 0;
      copy_in(k + r * kStride + col, p.k + source, wanted);
      copy_in(v + r * kStride + col, p.v + source, wanted);
    }
    copies_done();
  }

  // Queries 16 i.. to 16 i + 15; `first` is this warp's first key, `count` the keys from there to the last.
  __device__ void step(int i, int first, int count) {
    const uint16_t *const q = in.q(i), *const g = in.grad(i);
    const uint16_t *const k = in.k(at.warp) + down, *const v = in.v(at.warp) + down;
    const float* const rows = in.rows(i) + word % 8;  // 2 t
    float s[kBlocks][2][4] = {}, dp[kBlocks][2][4];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float2 delta = *reinterpret_cast<const float2*>(rows + 16 + 8 * c);
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
        dp[r][c][0] = dp[r][c][2] = delta.x;
        dp[r][c][1] = dp[r][c][3] = delta.y;
      }
    }
#pragma unroll
    for (int d = 0; d < kDepth; d += 16) {
      uint32_t a[4], y[4];
      load_matrices<false>(y, q + right + d);
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
        load_matrices<false>(a, k + 16 * r * kStride + d);
        multiply<T>(s[r][0], a, y[0], y[1]);
        multiply<T>(s[r][1], a, y[2], y[3]);
      }
      load_matrices<false>(y, g + right + d);
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
        load_matrices<false>(a, v + 16 * r * kStride + d);
        multiply<T>(dp[r][0], a, y[0], y[1]);
        multiply<T>(dp[r][1], a, y[2], y[3]);
      }
    }
    const float scale2 = p.scale * kLog2E;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float2 lse = *reinterpret_cast<const float2*>(rows + 8 * c);
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[r][c][e] = power_of_two(s[r][c][e] * scale2 - (e % 2 ? lse.y : lse.x));
      }
    }
    if (count < kKeys || (p.causal && 16 * i < first + kKeys)) {
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r) {
        const int n = 8 * r + word / 16, from = n >= count ? 16
                                                : p.causal ? first + n - 16 * i
                                                           : 0;  // this query on
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (8 * (e / 2) + word % 8 + e % 2 < from) s[r / 2][e / 2][r % 2 * 2 + e % 2] = 0.0f;
        }
      }
    }
    uint32_t ps[kBlocks][4], ds[kBlocks][4];
    uint16_t* const half[2] = {in.ds(at.warp, i) + word, in.ds(at.warp, i) + (word ^ 8)};
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // row g or g + 8, left or right eight columns
        const int e = j % 2 * 2, c = j / 2;
        const float p0 = s[r][c][e], p1 = s[r][c][e + 1];
        ps[r][j] = pack<T>(p0, p1);
        ds[r][j] = pack<T>(p0 * dp[r][c][e], p1 * dp[r][c][e + 1]);
        *reinterpret_cast<uint32_t*>(half[c] + 256 * r + 64 * e) = ds[r][j];
      }
    }
#pragma unroll
    for (int j = 0; j < kDepth / 16; ++j) {
      uint32_t y[4];
      load_matrices<true>(y, g + down + 16 * j);
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
        multiply<T>(dv[r][2 * j], ps[r], y[0], y[1]);
        multiply<T>(dv[r][2 * j + 1], ps[r], y[2], y[3]);
      }
      load_matrices<true>(y, q + down + 16 * j);
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
        multiply<T>(dk[r][2 * j], ds[r], y[0], y[1]);
        multiply<T>(dk[r][2 * j + 1], ds[r], y[2], y[3]);
      }
    }
  }

  // Queries that come before all keys of this warp.
  __device__ void no_step(int i) const {
#pragma unroll
    for (int c = 0; c < kBlocks; ++c) {
      *reinterpret_cast<uint4*>(in.ds(at.warp, i) + 8 * (32 * c + at.lane)) = uint4{0, 0, 0, 0};
    }
  }

  __device__ void round(int steps, int first, const Span& sk, int h) {
    const int count = sk.length - first;
    const int64_t from = (sk.first + first) * p.kv_stride + static_cast<int64_t>(h) * p.width;
    if (count > 0) load(from, count);
    for (int i = 0; i <= steps; ++i) {
      block_barrier();
      if (i == steps || count <= 0) continue;
      if (p.causal && 16 * i + 15 < first) {
        no_step(i);
      } else {
        step(i, first, count);
      }
    }
    block_barrier();
    if (count > 0) store(from, count);
  }

  // Through the rows of k and v, which nobody reads any more.
  __device__ void store(int64_t from, int rows) const {
    uint16_t *const k = in.k(at.warp), *const v = in.v(at.warp);
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      write_rows<T, kDepth>(k + 16 * r * kStride, dk[r], p.scale);
      write_rows<T, kDepth>(v + 16 * r * kStride, dv[r], 1.0f);
    }
    __syncwarp();
#pragma unroll 1
    for (int c = at.lane; c < kKeys * (kDepth / 8); c += 32) {
      const int r = c / (kDepth / 8), col = c % (kDepth / 8) * 8;
      if (r >= rows || col >= p.width) continue;
      const int64_t to = from + r * p.kv_stride + col;
      *reinterpret_cast<uint4*>(p.dk + to) = *reinterpret_cast<const uint4*>(k + r * kStride + col);
      *reinterpret_cast<uint4*>(p.dv + to) = *reinterpret_cast<const uint4*>(v + r * kStride + col);
    }
  }
};

template <class T, int kDepth, int kBlocks>
__global__ void __launch_bounds__(Bwd<kDepth, kBlocks>::kThreads, 1) attention_tiled_bwd_kernel(Args p) {
  extern __shared__ __align__(16) uint16_t shared[];
  using B = Bwd<kDepth, kBlocks>;
  const BwdShared<kDepth, kBlocks> in{{}, shared};
  const int b = blockIdx.x / p.heads, h = blockIdx.x % p.heads;
  const int key_warps = static_cast<int>(blockDim.x) / 32 - 1, warp = static_cast<int>(threadIdx.x) / 32;
  const int keys = key_warps * B::kKeys;
  int n = 0;
  // The rounds are within the roles, so that neither keeps registers for the other.
  if (warp == key_warps) {
    Helper<T, kDepth, kBlocks> helper(p, in, span(p.cu_q, b, p.max_q), h);
    const int length = span(p.cu_k, b, p.max_k).length;
    do {
      if (n > 0) block_barrier();  // all have left the round before
      const int left = length - n;
      helper.round(left < keys ? (left + B::kKeys - 1) / B::kKeys : key_warps, n == 0, left <= keys);
      n += keys;
    } while (!B::kOneRound && n < length);
  } else {
    const int steps = (span(p.cu_q, b, p.max_q).length + 15) / 16;
    const Span sk = span(p.cu_k, b, p.max_k);
    do {
      if (n > 0) block_barrier();
      KeyWarp<T, kDepth, kBlocks> key(p, in);
      key.round(steps, n + warp * B::kKeys, sk, h);
      n += keys;
    } while (!B::kOneRound && n < sk.length);
  }
}

}  // namespace maefast::cuda
