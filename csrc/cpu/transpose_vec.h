// Transposition of a square of float32 registers; internal linkage, as vec.h.
#pragma once

#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

// x[i][j] becomes x[j][i].
#if defined(__AVX512F__)
MAEFAST_INLINE void transpose(vec_f32 (&x)[16]) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_maskz_unpacklo_ps(-1, (__m512)x[i], (__m512)x[i + 1]);
    a[i + 1] = _mm512_maskz_unpackhi_ps(-1, (__m512)x[i], (__m512)x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // b[i + c]: lane 4g + r is x[i + r][4g + c]
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even_low = _mm512_maskz_shuffle_f32x4(-1, b[c], b[4 + c], 0x88);
    const __m512 odd_low = _mm512_maskz_shuffle_f32x4(-1, b[c], b[4 + c], 0xdd);
    const __m512 even_high = _mm512_maskz_shuffle_f32x4(-1, b[8 + c], b[12 + c], 0x88);
    const __m512 odd_high = _mm512_maskz_shuffle_f32x4(-1, b[8 + c], b[12 + c], 0xdd);
    x[c] = (vec_f32)_mm512_maskz_shuffle_f32x4(-1, even_low, even_high, 0x88);
    x[4 + c] = (vec_f32)_mm512_maskz_shuffle_f32x4(-1, odd_low, odd_high, 0x88);
    x[8 + c] = (vec_f32)_mm512_maskz_shuffle_f32x4(-1, even_low, even_high, 0xdd);
    x[12 + c] = (vec_f32)_mm512_maskz_shuffle_f32x4(-1, odd_low, odd_high, 0xdd);
  }
}
#elif defined(__AVX2__)
MAEFAST_INLINE void transpose(vec_f32 (&x)[8]) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)x[i], (__m256)x[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)x[i], (__m256)x[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    x[c] = (vec_f32)_mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
    x[4 + c] = (vec_f32)_mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
  }
}
#else
MAEFAST_INLINE void transpose(vec_f32 (&x)[4]) {
  const vec_f32 a = {x[0][0], x[1][0], x[2][0], x[3][0]}, b = {x[0][1], x[1][1], x[2][1], x[3][1]};
  const vec_f32 c = {x[0][2], x[1][2], x[2][2], x[3][2]}, d = {x[0][3], x[1][3], x[2][3], x[3][3]};
  x[0] = a;
  x[1] = b;
  x[2] = c;
  x[3] = d;
}
#endif

}  // namespace
}  // namespace maefast::MAEFAST_ISA
