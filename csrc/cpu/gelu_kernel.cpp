#include "cpu/gelu_kernel.h"

#include "cpu/exp_vec.h"
#include "cpu/units_vec.h"
#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

constexpr double kInvSqrt2 = 0.70710678118654752440;
constexpr double kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588;
constexpr double kCubic = 0.044715;

struct ValueSlope32 {
  vec_f32 value, slope;
};
struct ValueSlope64 {
  vec_f64 value, slope;
};

// GELU and its derivative, erf form: x * Phi(x) and Phi(x) + x * phi(x).
// Phi(-|x|) = exp(-x^2 / 2) * t * P(t), t = 1 / (1 + 0.4 |x| / sqrt 2): a minimax fit of erfcx / 2 with
// relative error 6e-8 up to |x| = 14, beyond which Phi(-|x|) is below the smallest float. The same
// exponential serves phi.
MAEFAST_INLINE ValueSlope32 gelu_erf(vec_f32 x) {
  const vec_f32 magnitude = (vec_f32)((vec_i32)x & 0x7fffffff);
  const vec_f32 z = select(magnitude < 13.0f, magnitude, splat(13.0f));
  const vec_f32 t = 1.0f / fma(z, splat(0.282842712f), splat(1.0f));
  vec_f32 p = splat(0.0205325913f);
  p = fma(p, t, splat(-0.0696987286f));
  p = fma(p, t, splat(0.0410319939f));
  p = fma(p, t, splat(0.045093637f));
  p = fma(p, t, splat(0.0391020775f));
  p = fma(p, t, splat(0.0970310047f));
  p = fma(p, t, splat(0.100857235f));
  p = fma(p, t, splat(0.113233835f));
  p = fma(p, t, splat(0.112816386f));
  const vec_f32 e = exp_clamped(z * z * -0.5f);
  const vec_f32 tail = e * t * p;
  const vec_f32 cdf = select(x > 0.0f, 1.0f - tail, tail);
  const vec_f32 value = x * cdf;
  const vec_f32 slope = fma(x, e * float(kInvSqrt2Pi), cdf);
  return {value, slope};
}

// tanh form: x * s, s = sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
MAEFAST_INLINE ValueSlope32 gelu_tanh(vec_f32 x) {
  const vec_f32 square = x * x;
  const vec_f32 u = x * fma(square, splat(float(2 * kSqrt2OverPi * kCubic)), splat(float(2 * kSqrt2OverPi)));
  const vec_f32 s = 1.0f / (1.0f + exp_clamped(-u));
  const vec_f32 du = fma(square, splat(float(6 * kSqrt2OverPi * kCubic)), splat(float(2 * kSqrt2OverPi)));
  const vec_f32 value = x * s;
  return {value, fma(value * (1.0f - s), du, s)};
}

MAEFAST_INLINE ValueSlope32 gelu(vec_f32 x, bool tanh) {
  return tanh ? gelu_tanh(x) : gelu_erf(x);
}

// double is the exact path, not the fast one.
MAEFAST_INLINE ValueSlope64 gelu(vec_f64 x, bool tanh) {
  ValueSlope64 r;
  for (int i = 0; i < kLanes<double>; ++i) {
    const double v = x[i];
    if (tanh) {
      const double t = __builtin_tanh(kSqrt2OverPi * (v + kCubic * v * v * v));
      r.value[i] = 0.5 * v * (1 + t);
      r.slope[i] = 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * kSqrt2OverPi * (1 + 3 * kCubic * v * v);
    } else {
      const double cdf = 0.5 * __builtin_erfc(-v * kInvSqrt2);
      r.value[i] = v * cdf;
      r.slope[i] = cdf + v * kInvSqrt2Pi * __builtin_exp(-0.5 * v * v);
    }
  }
  return r;
}

template <class T>
void bias_gelu_typed(const GeluArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* bias = static_cast<const T*>(a.bias);
  const int64_t d = a.width;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * d;
    T* out = static_cast<T*>(a.out) + r * d;
    for_lanes<A>(d, [&](int64_t i, auto lanes) {
      vec<A> v = load<A>(x + i, lanes);
      if (bias) v += load<A>(bias + i, lanes);
      store<A>(out + i, gelu(v, a.tanh).value, lanes);
    });
  }
}

void bias_gelu(const GeluArgs& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto t) { bias_gelu_typed<typename decltype(t)::type>(a, begin, end); });
}

template <class T>
void bias_gelu_backward_typed(const GeluBackwardArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* bias = static_cast<const T*>(a.bias);
  const int64_t d = a.width;
  for (int64_t unit = begin; unit < end; ++unit) {
    A* sums = a.bias_sums ? static_cast<A*>(a.bias_sums) + unit * d : nullptr;
    if (sums) zero_row(sums, d);
    for (int64_t r = a.rows * unit / a.units; r < a.rows * (unit + 1) / a.units; ++r) {
      const T* x = static_cast<const T*>(a.x) + r * d;
      const T* grad = static_cast<const T*>(a.grad) + r * d;
      T* grad_x = static_cast<T*>(a.grad_x) + r * d;
      for_lanes<A>(d, [&](int64_t i, auto lanes) {
        vec<A> v = load<A>(x + i, lanes);
        if (bias) v += load<A>(bias + i, lanes);
        const vec<A> g = load<A>(grad + i, lanes) * gelu(v, a.tanh).slope;
        store<A>(grad_x + i, g, lanes);
        if (sums) store<A>(sums + i, load<A>(sums + i, lanes) + g, lanes);
      });
    }
  }
}

void bias_gelu_backward(const GeluBackwardArgs& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto t) { bias_gelu_backward_typed<typename decltype(t)::type>(a, begin, end); });
}

}  // namespace

extern const GeluKernels gelu_kernels = {bias_gelu, bias_gelu_backward, sum_pieces};

}  // namespace maefast::MAEFAST_ISA
