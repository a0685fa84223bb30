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

#include "cuda/attention_kernel.cuh"

namespace maefast::cuda {

constexpr int kStages = 4;  // of 16 queries

// kBlocks: of 16 keys for each key warp. Two halve the traffic with shared memory and take twice the
// registers: a multiprocessor holds 16 warps of up to 128 registers, 12 of 168 or 8 of 255.
template <int kDepth, int kBlocks>
struct Bwd {
  static constexpr int kRegisters = kDepth <= 32 || (kDepth == 64 && kBlocks == 1) ? 128
                                    : kDepth == 48                                 ? 168
                                                                                   : 255;
  static constexpr int kThreads = kRegisters == 128   ? 512
                                  : kRegisters == 168 ? 384
                                                      : 256;   // give that many each
  static constexpr int kKeyWarps = kRegisters == 255 ? 7 : 8;  // at most
  static constexpr int kKeys = 16 * kBlocks;                   // of a warp
  static constexpr bool kOneRound = kKeyWarps * kKeys >= kLongest;
  static constexpr int kStride = kDepth + 8;  // of rows in shared memory
  // Shared memory, in halves: stages of 16 rows of q and 16 of dO, dQ on its way out, lse and delta of two
  // steps; then for each key warp its rows of k and v and two buffers of dS.
  static constexpr int kStage = 32 * kStride, kOut = 16 * kStride, kRows = 4 * 16 * 2;
  static constexpr int kFirst = kStages * kStage + kOut + kRows;
  static constexpr int kRegion = 2 * kKeys * kStride + 2 * 16 * kKeys;

  __host__ __device__ static constexpr size_t bytes(int key_warps) {
    return sizeof(uint16_t) * (kFirst + key_warps * kRegion);
  }
};

struct BwdShape {
  int threads, rounds;
  size_t bytes;  // of shared memory
  int64_t sums;  // floats for dQ between rounds, for each block
};

// Two blocks where a warp's registers allow it and one round will do.
template <int kDepth>
__host__ constexpr int bwd_blocks(int max_k) {
  return kDepth <= 48 || (kDepth == 64 && max_k > 128 && max_k <= 224) ? 2 : 1;
}

// The fewest rounds whose keys fit into `limit` bytes, all with nearly as many.
template <int kDepth, int kBlocks>
__host__ inline BwdShape bwd_shape(int max_q, int max_k, size_t limit) {
  using B = Bwd<kDepth, kBlocks>;
  const int all = max_k > 0 ? (max_k + B::kKeys - 1) / B::kKeys : 1;
  int most = B::kKeyWarps;
  while (most > 1 && B::bytes(most) > limit) --most;
  const int rounds = (all + most - 1) / most, warps = (all + rounds - 1) / rounds;
  const int64_t sums = static_cast<int64_t>(padded(max_q)) * kDepth;
  return {32 * (warps + 1), rounds, B::bytes(warps), rounds == 1 ? 0 : sums};
}

// Where eight dS of a key begin in a buffer of 16 queries a row: in rows 4-7 of eight the halves change
// places, so that neither the writers' words nor the readers' rows share banks.
__device__ inline int ds_place(int key, int half) {
  return 16 * key + 8 * (half ^ (key / 4 % 2));
}

// A warp's 16 rows of fragments, rounded, into a tile.
template <class T, int kDepth>
__device__ void write_rows(uint16_t* tile, const float (&x)[kDepth / 8][4], float scale) {
  const Lane at;
  uint16_t* const to = tile + at.g * (kDepth + 8) + 2 * at.t;
#pragma unroll
  for (int j = 0; j < kDepth / 8; ++j) {
    *reinterpret_cast<uint32_t*>(to + 8 * j) = pack<T>(x[j][0] * scale, x[j][1] * scale);
    *reinterpret_cast<uint32_t*>(to + 8 * (kDepth + 8) + 8 * j) = pack<T>(x[j][2] * scale, x[j][3] * scale);
  }
}

template <int kDepth, int kBlocks>
struct BwdShared : Bwd<kDepth, kBlocks> {
  using B = Bwd<kDepth, kBlocks>;
  uint16_t* const shared;

  __device__ uint16_t* q(int i) const { return shared + i % kStages * B::kStage; }
  __device__ uint16_t* grad(int i) const { return q(i) + 16 * B::kStride; }
  __device__ uint16_t* out() const { return shared + kStages * B::kStage; }
  __device__ float* rows(int i) const {  // log2 of the sums of exponentials, then -delta of 16 queries
    return reinterpret_cast<float*>(shared + kStages * B::kStage + B::kOut) + i % 2 * 32;
  }
  __device__ uint16_t* k(int warp) const { return shared + B::kFirst + warp * B::kRegion; }
  __device__ uint16_t* v(int warp) const { return k(warp) + B::kKeys * B::kStride; }
  __device__ uint16_t* ds(int warp, int i) const {
    return k(warp) + 2 * B::kKeys * B::kStride + i % 2 * (16 * B::kKeys);
  }
};

// --- the helper warp
// -----------------------------------------------------------------------------------------

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

// --- key warps
// -----------------------------------------------------------------------------------------------

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
