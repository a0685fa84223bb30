// Vectorised exponential, for kernel files (see cpu/isa.h).
#pragma once

#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

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
