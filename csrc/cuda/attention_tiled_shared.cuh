// The backward above 64 tokens (attention_tiled_bwd.cuh): how a launch divides its keys, and where things lie
// in shared memory.
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

}  // namespace maefast::cuda
