// GELU and its derivative on N registers at once; for kernel files (see cpu/isa.h).
//
// Each is one chain of dependent instructions, some hundred cycles long. The chains of N registers stand side
// by side in the code, because a processor's schedulers are too small to find the next one behind the first.
#pragma once

#include "cpu/exp_vec.h"
#include "cpu/vec.h"

#define MAEFAST_EACH(k) _Pragma("GCC unroll 8") for (int k = 0; k < N; ++k)

namespace maefast::MAEFAST_ISA {
namespace {

constexpr double kInvSqrt2 = 0.70710678118654752440;
constexpr double kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588;
constexpr double kCubic = 0.044715;

// |x|, at most `end`; NaN stays.
MAEFAST_INLINE vec_f32 magnitude(vec_f32 x, float end) {
  return smaller(splat(end), magnitude(x));
}
// x, from -end to end; NaN stays.
MAEFAST_INLINE vec_f32 within(vec_f32 x, float end) {
  return larger(splat(-end), smaller(splat(end), x));
}

// p = p * r + c.
template <int N>
MAEFAST_INLINE void horner(vec_f32 (&p)[N], const vec_f32 (&r)[N], float c) {
  MAEFAST_EACH(k) p[k] = fma(p[k], r[k], splat(c));
}

// c[0] r^n + ... + c[n].
template <int N, int M>
MAEFAST_INLINE void polynomial(vec_f32 (&p)[N], const vec_f32 (&r)[N], const float (&c)[M]) {
  MAEFAST_EACH(k) p[k] = fma(splat(c[0]), r[k], splat(c[1]));
#pragma GCC unroll 16
  for (int i = 2; i < M; ++i) horner(p, r, c[i]);
}

// What a function makes of x: x itself becomes the value, or the slope; with kBoth x becomes the slope and y
// the value.
enum Wanted { kValue, kSlope, kBoth };

// ---- erf form: x * Phi(x) and Phi(x) + x * phi(x)

// Phi(-|x|) = exp(-x^2 / 2) * t * P(t), t = 1 / (1 + 0.4 |x| / sqrt 2): a minimax fit of erfcx / 2 with
// relative error 6e-8 up to |x| = 14, beyond which Phi(-|x|) is below the smallest float. The same
// exponential serves phi.
template <Wanted wanted, int N>
MAEFAST_INLINE void gelu_erf(vec_f32 (&x)[N], vec_f32 (&y)[N]) {
  constexpr float kErfcx[] = {0.0205325913f, -0.0696987286f, 0.0410319939f, 0.045093637f, 0.0391020775f,
                              0.0970310047f, 0.100857235f,   0.113233835f,  0.112816386f};
  vec_f32 t[N], p[N], e[N];
  MAEFAST_EACH(k) {
    // t has all of |x|, so that x * t stays small where e is at its end, and with it x * tail.
    const vec_f32 z = magnitude(x[k], 13.0f);
    t[k] = 1.0f / fma(magnitude(x[k]), splat(0.282842712f), splat(1.0f));
    e[k] = z * z * -0.5f;
  }
  polynomial(p, t, kErfcx);
  MAEFAST_EACH(k) {
    e[k] = exp_near(e[k]);
    const vec_f32 tail = e[k] * t[k] * p[k];
    const vec_f32 cdf = select(x[k] > 0.0f, 1.0f - tail, tail);
    if constexpr (wanted == kBoth) y[k] = x[k] * cdf;
    x[k] = wanted == kValue ? x[k] * cdf : fma(within(x[k], 13.0f), e[k] * float(kInvSqrt2Pi), cdf);
  }
}

// The same where the result is rounded to bfloat16: 8 bits need half of these instructions. With z = |x|, the
// value is max(x, 0) - V(z), the slope S(z) or, for x > 0, 1 - S(z), where V(z) = z * Phi(-z) and
// S(z) = Phi(-z) - z * phi(z). V(z) / z and S(z) / (z0 - z), z0 the only zero of S, are positive and their
// logarithms smooth: a polynomial each, and no division. The relative error of V is below 2^-15, of S below
// 2^-14.5, in the tails too; half a unit in the last place of bfloat16 is 2^-9 or more.
template <bool slope, int N>
MAEFAST_INLINE void gelu_erf_coarse(vec_f32 (&x)[N]) {
  // In z - 6.5 on [0, 13]; beyond, V and S are below 1e-35.
  constexpr float kLog2Value[] = {-2.01239506e-09f, 2.75626173e-08f, -1.2321753e-07f, 8.9417419e-07f,
                                  -1.36909471e-05f, 0.000141198978f, -0.00136568795f, -0.706345128f,
                                  -9.59002691f,     -34.5354239f};
  constexpr float kLog2Slope[] = {5.35443579e-10f, -4.335235e-09f,   -1.96591661e-08f, 1.12902023e-07f,
                                  1.30191767e-06f, -8.39859572e-06f, 2.95947491e-05f,  -0.000276085205f,
                                  -0.71890001f,    -9.39631756f,     -31.6591621f};
  constexpr float kExp2[] = {0.0095701017f, 0.0559178603f, 0.240247448f, 0.693121815f, 0.999999261f};
  const vec_f32 shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vec_f32 z[N], q[N], n[N], r[N];
  MAEFAST_EACH(k) {
    z[k] = magnitude(x[k], 13.0f);
    r[k] = z[k] - 6.5f;
  }
  if constexpr (slope) {
    polynomial(q, r, kLog2Slope);
  } else {
    polynomial(q, r, kLog2Value);
  }
  MAEFAST_EACH(k) {
    n[k] = q[k] + shift;
    r[k] = q[k] - (n[k] - shift);
  }
  polynomial(q, r, kExp2);
  MAEFAST_EACH(k) {
    const vec_f32 power = (vec_f32)((vec_i32)q[k] + ((vec_i32)n[k] << 23));  // |n| < 126
    if constexpr (slope) {
      const vec_f32 s = (0.751791525f - z[k]) * power;
      x[k] = select(x[k] > 0.0f, 1.0f - s, s);
    } else {
      x[k] = larger(splat(0.0f), x[k]) - z[k] * power;
    }
  }
}

// ---- tanh form: x * s, s = sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)

// Beyond 13, s is 1 or next to 0, but not 0: it must not be multiplied with all of x, nor meet an infinite
// square.
template <Wanted wanted, int N>
MAEFAST_INLINE void gelu_tanh(vec_f32 (&x)[N], vec_f32 (&y)[N]) {
  constexpr float kLinear = float(2 * kSqrt2OverPi);
  vec_f32 square[N], s[N];
  MAEFAST_EACH(k) {
    x[k] = larger(splat(-13.0f), x[k]);
    square[k] = x[k] * x[k];
    if constexpr (wanted != kValue) square[k] = smaller(splat(169.0f), square[k]);
    s[k] = x[k] * fma(square[k], splat(float(2 * kSqrt2OverPi * kCubic)), splat(kLinear));
  }
  MAEFAST_EACH(k) s[k] = 1.0f / (1.0f + exp_clamped(-s[k]));
  MAEFAST_EACH(k) {
    const vec_f32 value = x[k] * s[k];
    const vec_f32 du = fma(square[k], splat(float(6 * kSqrt2OverPi * kCubic)), splat(kLinear));
    if constexpr (wanted == kBoth) y[k] = value;
    x[k] = wanted == kValue ? value : fma(value * (1.0f - s[k]), du, s[k]);
  }
}

// ---- float64: the exact path, not the fast one

template <bool tanh, bool slope>
MAEFAST_INLINE double gelu_double(double x) {
  if constexpr (tanh) {
    const double t = __builtin_tanh(kSqrt2OverPi * (x + kCubic * x * x * x));
    if constexpr (!slope) return 0.5 * x * (1 + t);
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * kSqrt2OverPi * (1 + 3 * kCubic * x * x);
  } else {
    const double cdf = 0.5 * __builtin_erfc(-x * kInvSqrt2);
    if constexpr (!slope) return x * cdf;
    return cdf + x * kInvSqrt2Pi * __builtin_exp(-0.5 * x * x);
  }
}

// T: what the results are stored as.
template <class T, bool tanh, Wanted wanted, int N>
MAEFAST_INLINE void gelu_forms(vec<acc_t<T>> (&x)[N], vec<acc_t<T>> (&y)[N]) {
  if constexpr (is_same<T, double>) {
    MAEFAST_EACH(k) {
      for (int i = 0; i < kLanes<double>; ++i) {
        if constexpr (wanted == kBoth) y[k][i] = gelu_double<tanh, false>(x[k][i]);
        x[k][i] = gelu_double<tanh, wanted != kValue>(x[k][i]);
      }
    }
  } else if constexpr (tanh) {
    gelu_tanh<wanted>(x, y);
  } else if constexpr (is_same<T, bf16>) {
    if constexpr (wanted == kBoth) {
      MAEFAST_EACH(k) y[k] = x[k];
      gelu_erf_coarse<false>(y);
    }
    gelu_erf_coarse<wanted != kValue>(x);
  } else {
    gelu_erf<wanted>(x, y);
  }
}

// x becomes GELU(x).
template <class T, bool tanh, int N>
MAEFAST_INLINE void gelu(vec<acc_t<T>> (&x)[N]) {
  gelu_forms<T, tanh, kValue>(x, x);
}

// x becomes the slope there.
template <class T, bool tanh, int N>
MAEFAST_INLINE void gelu_slope(vec<acc_t<T>> (&x)[N]) {
  gelu_forms<T, tanh, kSlope>(x, x);
}

// x becomes the slope, value the GELU.
template <class T, bool tanh, int N>
MAEFAST_INLINE void gelu_both(vec<acc_t<T>> (&x)[N], vec<acc_t<T>> (&value)[N]) {
  gelu_forms<T, tanh, kBoth>(x, value);
}

}  // namespace
}  // namespace maefast::MAEFAST_ISA
