// Vector arithmetic and repacking of rows for the attention kernels; internal linkage, as vec.h.
//
// Operands of the matrix products are 32-bit words.
#pragma once

#include "cpu/transpose_vec.h"
#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

constexpr int64_t kLane = kLanes<float>;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = __builtin_inff();

MAEFAST_INLINE int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}
MAEFAST_INLINE int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Unlike vec.h's splat this compiles to a broadcast alone: 0 + a is not a where a is -0.
MAEFAST_INLINE vec_f32 all(float a) {
#if defined(__AVX512F__)
  return (vec_f32)_mm512_set1_ps(a);
#elif defined(__AVX2__)
  return (vec_f32)_mm256_set1_ps(a);
#else
  return vec_f32{a, a, a, a};
#endif
}

// Whether a lane is true.
MAEFAST_INLINE bool any(vec_i32 condition) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)condition, (__m512i)condition) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)condition) != 0;
#else
  return (condition[0] | condition[1] | condition[2] | condition[3]) != 0;
#endif
}

// 2^t for t <= 127, within 1.5 units in the last place; 0 below -126, as no subnormal is worth its time.
MAEFAST_INLINE vec_f32 exp2(vec_f32 t) {
#if defined(__AVX512F__)
  const vec_f32 n = (vec_f32)_mm512_maskz_roundscale_ps(-1, (__m512)t, 8);  // to the nearest integer
#else
  const vec_f32 shift = all(12582912.f);  // 1.5 * 2^23: the integer lands in the low bits
  const vec_f32 shifted = t + shift;
  const vec_f32 n = shifted - shift;
#endif
  const vec_f32 r = t - n;
  vec_f32 p = all(1.5345812e-4f);  // minimax polynomial of 2^r on [-1/2, 1/2], relative error 1.9e-9
  p = fma(p, r, all(1.3399931e-3f));
  p = fma(p, r, all(9.6184890e-3f));
  p = fma(p, r, all(5.5503288e-2f));
  p = fma(p, r, all(2.4022647e-1f));
  p = fma(p, r, all(6.9314721e-1f));
  p = fma(p, r, all(1.f));
#if defined(__AVX512F__)
  const __mmask16 keep = _mm512_cmp_ps_mask((__m512)t, (__m512)all(-126.f), _CMP_NLT_UQ);
  return (vec_f32)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)n);
#else
  const vec_f32 power = (vec_f32)(((vec_u32)shifted << 23) + (127u << 23));
  return (vec_f32)((vec_u32)(p * power) & ~(vec_u32)(t < -126.f));
#endif
}

// Natural logarithm, of normal numbers, 0 and NaN.
MAEFAST_INLINE vec_f32 log(vec_f32 x) {
  const vec_i32 bits = (vec_i32)x;
  const vec_i32 e = (bits - 0x3f3504f3) >> 23;  // x = m * 2^e with m in [sqrt(1/2), sqrt(2))
  const vec_f32 f = (vec_f32)(bits - (e << 23)) - 1.f;
  const vec_f32 s = f / (f + 2.f);  // log(1 + f) = 2 artanh(s)
  const vec_f32 z = s * s;
  vec_f32 p = fma(all(2.f / 9), z, all(2.f / 7));
  p = fma(p, z, all(2.f / 5));
  p = fma(p, z, all(2.f / 3));
  p = fma(p * z, s, s + s);
  const vec_f32 r = fma(__builtin_convertvector(e, vec_f32), all(kLn2), p);
  return x > 0.f ? r : (x == 0.f ? all(-kInfinity) : x);
}

// ---- rows ----

#if defined(__AVX512BF16__)
// In one instruction; subnormals become zero.
MAEFAST_INLINE half_u16 round_bf16(vec_f32 x) {
  return (half_u16)_mm512_cvtneps_pbh((__m512)x);
}
#else
MAEFAST_INLINE half_u16 round_bf16(vec_f32 x) {
  return f32_to_bf16(x);
}
#endif

// The first n < kLane elements of a row; the other lanes are zero.
template <class T>
MAEFAST_INLINE vec_f32 load_some(const T* p, int64_t n) {
#if defined(__AVX512BW__)
  const __mmask16 mask = __mmask16((1u << n) - 1);
  if constexpr (sizeof(T) == 4) {
    return (vec_f32)_mm512_maskz_loadu_ps(mask, p);
  } else {
    const half_u16 h = (half_u16)_mm256_maskz_loadu_epi16(mask, p);
    return is_same<T, bf16> ? bf16_to_f32(h) : f16_to_f32(h);
  }
#else
  return load<float>(p, int(n));
#endif
}

template <class T>
MAEFAST_INLINE void store_some(T* p, vec_f32 v, int64_t n) {
#if defined(__AVX512BW__)
  const __mmask16 mask = __mmask16((1u << n) - 1);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, mask, (__m512)v);
  } else {
    const half_u16 h = is_same<T, bf16> ? round_bf16(v) : f32_to_f16(v);
    _mm256_mask_storeu_epi16(p, mask, (__m256i)h);
  }
#else
  store<float>(p, v, int(n));
#endif
}

// Sum of a[i] * b[i] over n elements.
template <class T>
MAEFAST_INLINE float dot_rows(const T* a, const T* b, int64_t n) {
  vec_f32 sum{};
  int64_t i = 0;
  for (; i + kLane <= n; i += kLane) sum = fma(load<float>(a + i), load<float>(b + i), sum);
  if (i < n) sum = fma(load_some(a + i, n - i), load_some(b + i, n - i), sum);
  return sum_lanes<float>(sum);
}

// out = x * factor, n elements, converted.
template <class T>
MAEFAST_INLINE void scale_row(const float* x, float factor, T* out, int64_t n) {
  const vec_f32 f = all(factor);
  int64_t i = 0;
  for (; i + kLane <= n; i += kLane) {
    const vec_f32 y = load<float>(x + i) * f;
    if constexpr (is_same<T, bf16>) {
      const half_u16 h = round_bf16(y);
      __builtin_memcpy(out + i, &h, sizeof h);
    } else {
      store<float>(out + i, y);
    }
  }
  if (i < n) store_some(out + i, load<float>(x + i) * f, n - i);
}

// dst[i] = row i of src in float32, padded with zeros to a multiple of kLane.
template <class T>
MAEFAST_INLINE void widen_rows(const T* src, int64_t stride, int64_t rows, int64_t width, float* dst) {
  for (int64_t r = 0; r < rows; ++r, src += stride) {
    int64_t i = 0;
    for (; i + kLane <= width; i += kLane, dst += kLane) store<float>(dst, load<float>(src + i));
    if (i < width) {
      store<float>(dst, load_some(src + i, width - i));
      dst += kLane;
    }
  }
}

// dst[w * ld + i] = element w of row i of src in float32; lanes beyond the last row, up to a multiple of
// kLane, are zero.
template <class T>
MAEFAST_INLINE void transpose_rows(const T* src, int64_t stride, int64_t rows, int64_t width, float* dst,
                                   int64_t ld) {
  for (int64_t r = 0; r < rows; r += kLane) {
    const int64_t here = least(kLane, rows - r);
    for (int64_t w = 0; w < width; w += kLane) {
      const int64_t words = least(kLane, width - w);
      const T* corner = src + r * stride + w;
      vec_f32 x[kLane];
      if (here == kLane && words == kLane) {
#pragma GCC unroll 16
        for (int i = 0; i < kLane; ++i) x[i] = load<float>(corner + i * stride);
      } else {
        const int64_t last = here - 1;
#pragma GCC unroll 16
        for (int i = 0; i < kLane; ++i) {  // rows beyond the last one repeat it, then are dropped
          const T* row = corner + (i < here ? i : last) * stride;
          x[i] = words == kLane ? load<float>(row) : load_some(row, words);
          x[i] = i < here ? x[i] : vec_f32{};
        }
      }
      transpose(x);
      float* to = dst + w * ld + r;
#pragma GCC unroll 16
      for (int i = 0; i < kLane; ++i)
        if (i < words) store<float>(to + i * ld, x[i]);
    }
  }
}

#if defined(__AVX512BF16__)
// ---- pairs of bfloat16 ----
// A word holds two neighbours along the depth of a product, the first in the low half.
constexpr bool kHasPairs = true;

// sum + the dot product of the two pairs in each lane, products and sums in float32.
MAEFAST_INLINE vec_f32 dot(vec_f32 sum, vec_f32 a, vec_f32 b) {
  return (vec_f32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// 16 elements of one row, then 16 of the next.
MAEFAST_INLINE __m512i round_both(vec_f32 a, vec_f32 b) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}
MAEFAST_INLINE void store_rows(bf16* a, bf16* b, __m512i both) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(a), _mm512_maskz_extracti64x4_epi64(-1, both, 0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(b), _mm512_maskz_extracti64x4_epi64(-1, both, 1));
}
MAEFAST_INLINE void store_pairs(float* p, __m512i both) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, both));
}

// dst[r / 2 * padded + i] = elements i of rows r and r + 1, zero where there is none.
MAEFAST_INLINE void pair_rows(const bf16* src, int64_t stride, int64_t rows, int64_t width, float* dst) {
  for (int64_t r = 0; r < rows; r += 2, src += 2 * stride) {
    const bf16* next = r + 1 < rows ? src + stride : nullptr;
    for (int64_t i = 0; i < width; i += kLane, dst += kLane) {
      const __mmask16 mask = width - i >= kLane ? __mmask16(-1) : __mmask16((1u << (width - i)) - 1);
      const __m256i low = _mm256_maskz_loadu_epi16(mask, src + i);
      const __m256i high = next ? _mm256_maskz_loadu_epi16(mask, next + i) : _mm256_setzero_si256();
      store_pairs(dst, _mm512_mask_broadcast_i64x4(_mm512_maskz_broadcast_i64x4(0x0f, low), 0xf0, high));
    }
  }
}
#else
constexpr bool kHasPairs = false;
#endif

}  // namespace
}  // namespace maefast::MAEFAST_ISA
