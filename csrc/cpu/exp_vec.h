// Vectorised exponential, for kernel files (see cpu/isa.h).
#pragma once

#include "cpu/vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace maefast::MAEFAST_ISA {
namespace {

MAEFAST_INLINE vec_f32 fma(vec_f32 a, vec_f32 b, vec_f32 c) {
#if defined(__AVX512F__)
  return (vec_f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vec_f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

MAEFAST_INLINE vec_f32 select(vec_i32 condition, vec_f32 yes, vec_f32 no) {
  return (vec_f32)(((vec_i32)yes & condition) | ((vec_i32)no & ~condition));
}

// The smaller and the larger of a and b; b where one is NaN.
MAEFAST_INLINE vec_f32 smaller(vec_f32 a, vec_f32 b) {
#if defined(__AVX512F__)
  return (vec_f32)_mm512_maskz_min_ps(-1, (__m512)a, (__m512)b);
#else
  return select(a < b, a, b);
#endif
}
MAEFAST_INLINE vec_f32 larger(vec_f32 a, vec_f32 b) {
#if defined(__AVX512F__)
  return (vec_f32)_mm512_maskz_max_ps(-1, (__m512)a, (__m512)b);
#else
  return select(a > b, a, b);
#endif
}

// e^x = mantissa * 2^whole.
struct Exp {
  vec_f32 mantissa;
  vec_i32 whole;
};
MAEFAST_INLINE Exp exp_parts(vec_f32 x) {
  const vec_f32 shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vec_f32 rounded = fma(x, splat(1.44269504f), shift);
  const vec_f32 n = rounded - shift;
  // ln 2 in two parts, the first with few enough bits that n times it is exact.
  vec_f32 r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  // Minimax polynomial of e^r on [-ln 2 / 2, ln 2 / 2], relative error 2e-9.
  vec_f32 p = splat(0.00138368458f);
  p = fma(p, r, splat(0.00837481581f));
  p = fma(p, r, splat(0.0416682251f));
  p = fma(p, r, splat(0.166664198f));
  p = fma(p, r, splat(0.499999911f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return {p, (vec_i32)rounded - (vec_i32)shift};
}

// e^x to two units in the last place; x is clamped to [-87.3, 88.7], so that small results end at 1.2e-38
// instead of subnormals and large ones stay finite. NaN comes out as some finite value: multiply by x where
// it must survive.
MAEFAST_INLINE vec_f32 exp_clamped(vec_f32 x) {
  x = smaller(larger(x, splat(-87.3f)), splat(88.7f));
  const Exp e = exp_parts(x);
  // 2^n = 2^(n/2) * 2^(n - n/2): n = 128 alone has no exponent.
  const vec_i32 half = e.whole >> 1;
  const vec_f32 low = (vec_f32)((half + 127) << 23);
  const vec_f32 high = (vec_f32)((e.whole - half + 127) << 23);
  return e.mantissa * low * high;
}

// The same for x known to lie in [-87, 88].
MAEFAST_INLINE vec_f32 exp_near(vec_f32 x) {
  const Exp e = exp_parts(x);
  return (vec_f32)((vec_i32)e.mantissa + (e.whole << 23));
}

}  // namespace
}  // namespace maefast::MAEFAST_ISA
