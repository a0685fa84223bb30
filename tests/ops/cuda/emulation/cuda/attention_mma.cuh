// Stands in for csrc/cuda/attention_mma.cuh on a CPU: the same functions, by the layouts that the PTX manual
// gives for ldmatrix and mma.m16n8k16.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "simt.h"

namespace maefast::cuda {

using Half = c10::Half;
using Bfloat = c10::BFloat16;

inline int kept(int x) {
  return x;
}

inline void block_barrier() {
  __syncthreads();
}

inline void copy_in(uint16_t* to, const uint16_t* from, bool wanted) {
  simt::check_shared(to);
  simt::Copy copy{to, {}};
  if (wanted) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0)
      simt::fail("a source that is not a multiple of 16 bytes");
    std::memcpy(copy.bytes, from, 16);
  }
  simt::current->copies.back().push_back(copy);
  if (!simt::late) std::memcpy(to, copy.bytes, 16);
}

inline void copies_done() {
  simt::land(simt::current->copies.size());
}

inline void copies_end() {
  simt::current->copies.emplace_back();
}

template <int kPending>
inline void copies_but() {
  const size_t ended = simt::current->copies.size() - 1;
  if (ended > kPending) simt::land(ended - kPending);
}

template <bool kTranspose>
inline void load_matrices(uint32_t (&r)[4], const uint16_t* row) {
  simt::check_shared(row);
  uint32_t words[4];
  std::memcpy(words, row, 16);
  const auto all = simt::meet(3 + kTranspose, words, 4);
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const auto half = [&](int matrix, unsigned i, unsigned j) {
    return all[8 * matrix + i][j / 2] >> j % 2 * 16 & 0xffff;
  };
  for (int m = 0; m < 4; ++m) {
    r[m] = kTranspose ? half(m, 2 * t, g) | half(m, 2 * t + 1, g) << 16
                      : half(m, g, 2 * t) | half(m, g, 2 * t + 1) << 16;
  }
}

template <class T>
inline float widen(uint32_t word, int half) {
  return static_cast<float>(T(static_cast<uint16_t>(word >> half * 16), T::from_bits()));
}

template <class T>
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto all = simt::meet(5, words, 6);
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int e = 0; e < 4; ++e) {
    const int lower = e / 2;  // row g or g + 8
    const unsigned n = 2 * t + e % 2;
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2, right = k / 8;
      c[e] += widen<T>(all[4 * g + pair][lower + 2 * right], k % 2) *
              widen<T>(all[4 * n + pair][4 + right], k % 2);
    }
  }
}

template <class T>
inline uint32_t pack(float low, float high) {
  return T(low).x | static_cast<uint32_t>(T(high).x) << 16;
}

template <class T>
inline float2 unpack(uint32_t pair) {
  return {widen<T>(pair, 0), widen<T>(pair, 1)};
}

inline float power_of_two(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace maefast::cuda
