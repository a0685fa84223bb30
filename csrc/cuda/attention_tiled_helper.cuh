// The helper warp of attention_tiled_bwd.cuh: brings queries, dO, lse and delta, and sums dQ.
#pragma once

#include "cuda/attention_tiled_shared.cuh"

namespace maefast::cuda {

template <class T, int kDepth, int kBlocks>
struct Helper {
  using B = Bwd<kDepth, kBlocks>;
  static constexpr int kStride = B::kStride, kUnits = kDepth / 16;
  const Args& p;
  const BwdShared<kDepth, kBlocks> in;
  const int steps, length, q_step, row_step;  // elements from a query to the next in q, and in out and dO
  // Two lanes share a row, with alternate eights of its columns: this one's first in q, in out and dO, and in
  // lse.
  int64_t q_at, row_at, lse_at;
  const int row = kept(threadIdx.x % 32 / 2), tile_at = kept(row * kStride + 8 * (threadIdx.x % 2));
  int columns;                 // of the head, from this lane's first
  uint4 o[kUnits], g[kUnits];  // of two steps ahead
  float lse;

  __device__ Helper(const Args& args, const BwdShared<kDepth, kBlocks>& shared, const Span& sq, int h)
      : p(args),
        in(shared),
        steps((sq.length + 15) / 16),
        length(sq.length),
        q_step(static_cast<int>(p.q_stride)),
        row_step(p.heads * p.width) {
    const int64_t n = sq.first + row;
    const int column = 8 * static_cast<int>(threadIdx.x % 2);
    q_at = n * q_step + h * p.width + column;
    row_at = n * row_step + h * p.width + column;
    lse_at = n * p.heads + h;
    columns = p.width - column;
  }

  __device__ void bring(int i) const {
    if (i < steps) {
      const uint16_t *const q = p.q + q_at + 16 * i * q_step, *const grad =
                                                                  p.grad + row_at + 16 * i * row_step;
      uint16_t *const to_q = in.q(i) + tile_at, *const to_grad = in.grad(i) + tile_at;
#pragma unroll
      for (int c = 0; c < kDepth; c += 16) {
        const bool wanted = 16 * i + row < length && c < columns;
        copy_in(to_q + c, q + c, wanted);
        copy_in(to_grad + c, grad + c, wanted);
      }
    }
    copies_end();
  }

  __device__ void fetch(int i) {
    const bool there = 16 * i + row < length;
    const int64_t at = row_at + 16 * i * row_step;
#pragma unroll
    for (int c = 0; c < kUnits; ++c) {
      o[c] = g[c] = uint4{0, 0, 0, 0};
      if (there && 16 * c < columns) {
        o[c] = *reinterpret_cast<const uint4*>(p.o + at + 16 * c);
        g[c] = *reinterpret_cast<const uint4*>(p.grad + at + 16 * c);
      }
    }
    lse = there ? p.lse[lse_at + 16 * i * p.heads] : INFINITY;
  }

  __device__ void put(int i) const {
    if (i >= steps) return;
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < kUnits; ++c) {
      const uint32_t a[4] = {o[c].x, o[c].y, o[c].z, o[c].w}, b[4] = {g[c].x, g[c].y, g[c].z, g[c].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 left = unpack<T>(a[j]), right = unpack<T>(b[j]);
        sum += left.x * right.x + left.y * right.y;
      }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if (threadIdx.x % 2 == 0) {
      in.rows(i)[row] = lse == -INFINITY ? INFINITY : lse * kLog2E;  // no key: all P are 0
      in.rows(i)[16 + row] = -sum;
    }
  }

  // dQ of 16 queries: += dS K over the keys of this round.
  __device__ void grad_q(int i, int warps, bool first_round, bool last_round) const {
    const Lane at;
    float x[2 * kUnits][4] = {};
    float4* const sums = reinterpret_cast<float4*>(p.sums) +
                         (static_cast<int64_t>(blockIdx.x) * (padded(p.max_q) / 16) + i) * (2 * kUnits * 32) +
                         at.lane;
    if (!first_round) {
#pragma unroll
      for (int j = 0; j < 2 * kUnits; ++j) {
        const float4 y = sums[32 * j];
        x[j][0] = y.x, x[j][1] = y.y, x[j][2] = y.z, x[j][3] = y.w;
      }
    }
    const uint16_t* k = in.k(0) + at.row * kStride + at.col;
    const uint16_t* ds = in.ds(0, i) + ds_place(at.row_n, at.col_n / 8);
    for (int w = 0; w < warps; ++w) {  // keys that are not there have dS = 0
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
        uint32_t a[4], y[4];
        load_matrices<true>(a, ds + 256 * r);
#pragma unroll
        for (int j = 0; j < kUnits; ++j) {
          load_matrices<true>(y, k + 16 * (r * kStride + j));
          multiply<T>(x[2 * j], a, y[0], y[1]);
          multiply<T>(x[2 * j + 1], a, y[2], y[3]);
        }
      }
      k += B::kRegion;
      ds += B::kRegion;
    }
    if (!last_round) {
#pragma unroll
      for (int j = 0; j < 2 * kUnits; ++j) sums[32 * j] = float4{x[j][0], x[j][1], x[j][2], x[j][3]};
      return;
    }
    __syncwarp();  // the last one has been read
    write_rows<T, kDepth>(in.out(), x, p.scale);
    __syncwarp();
    uint16_t* const to = p.dq + q_at + 16 * i * q_step;
#pragma unroll
    for (int c = 0; c < kDepth; c += 16) {
      if (16 * i + row >= length || c >= columns) continue;
      *reinterpret_cast<uint4*>(to + c) = *reinterpret_cast<const uint4*>(in.out() + tile_at + c);
    }
  }

  __device__ void round(int warps, bool first_round, bool last_round) {
    for (int i = 0; i < kStages - 1; ++i) bring(i);
    fetch(0);
    put(0);
    fetch(1);
    for (int i = 0; i <= steps; ++i) {
      copies_but<kStages - 2>();
      block_barrier();
      bring(i + kStages - 1);
      if (i > 0) grad_q(i - 1, warps, first_round, last_round);
      put(i + 1);
      fetch(i + 2);
    }
    block_barrier();  // K has been read
  }
};

}  // namespace maefast::cuda
