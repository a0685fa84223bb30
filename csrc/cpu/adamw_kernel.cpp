#include "cpu/adamw_kernel.h"

#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

template <class A>
MAEFAST_INLINE vec<A> square_root(vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (is_same<A, float>) {
    return (vec_f32)_mm512_maskz_sqrt_ps(-1, (__m512)v);
  } else {
    return (vec_f64)_mm512_maskz_sqrt_pd(-1, (__m512d)v);
  }
#elif defined(__AVX2__)
  if constexpr (is_same<A, float>) {
    return (vec_f32)_mm256_sqrt_ps((__m256)v);
  } else {
    return (vec_f64)_mm256_sqrt_pd((__m256d)v);
  }
#else
  for (int i = 0; i < kLanes<A>; ++i)
    v[i] = A(is_same<A, float> ? __builtin_sqrtf(v[i]) : __builtin_sqrt(v[i]));
  return v;
#endif
}

struct None {};

// P: parameter and moments, G: gradient, S: shadow or None.
template <class P, class G, class S>
void adamw_typed(const AdamwArgs& a, const AdamwTensor& t, int64_t begin, int64_t end) {
  using A = acc_t<P>;
  P* param = static_cast<P*>(t.param) + begin;
  G* grad = static_cast<G*>(t.grad) + begin;
  P* exp_avg = static_cast<P*>(t.exp_avg) + begin;
  P* exp_avg_sq = static_cast<P*>(t.exp_avg_sq) + begin;
  P* highest = t.max_exp_avg_sq ? static_cast<P*>(t.max_exp_avg_sq) + begin : nullptr;
  S* shadow = static_cast<S*>(t.shadow);
  const A decay = A(a.decay), beta1 = A(a.beta1), beta2 = A(a.beta2), eps = A(a.eps), scale = A(a.grad_scale);
  const A rest1 = A(1 - a.beta1), rest2 = A(1 - a.beta2);
  const A step_size = A(t.step_size), correction = A(t.bias_correction2_sqrt);
  for_lanes<A>(end - begin, [&](int64_t i, auto lanes) {
    vec<A> p = load<A>(param + i, lanes);
    if (!a.skip) {
      vec<A> g = load<A>(grad + i, lanes);
      if (a.grad_scale != 0) {
        g /= scale;
        store<A>(grad + i, g, lanes);
      }
      if (a.maximize) g = -g;
      p *= decay;
      const vec<A> m = load<A>(exp_avg + i, lanes) * beta1 + g * rest1;
      vec<A> v = load<A>(exp_avg_sq + i, lanes) * beta2 + g * rest2 * g;  // g * g overflows earlier
      store<A>(exp_avg + i, m, lanes);
      store<A>(exp_avg_sq + i, v, lanes);
      if (highest) {
        const vec<A> old = load<A>(highest + i, lanes);
        v = (v > old) | (v != v) ? v : old;  // NaN wins, as in torch.maximum
        store<A>(highest + i, v, lanes);
      }
      p -= m * step_size / (square_root<A>(v) / correction + eps);
      store<A>(param + i, p, lanes);
    }
    if constexpr (!is_same<S, None>) store<A>(shadow + begin + i, p, lanes);
  });
}

template <class P, class G>
void with_shadow(const AdamwArgs& a, const AdamwTensor& t, int64_t begin, int64_t end) {
  if constexpr (sizeof(P) > 2) {
    if (t.shadow && t.shadow_type == DType::bf16) return adamw_typed<P, G, bf16>(a, t, begin, end);
    if (t.shadow && t.shadow_type == DType::f16) return adamw_typed<P, G, f16>(a, t, begin, end);
  }
  adamw_typed<P, G, None>(a, t, begin, end);
}

// The gradient has the parameter's type, or one of them has 16 bits and the other is float32.
void adamw(const AdamwArgs& a, const AdamwTensor& t, int64_t begin, int64_t end) {
  with_type(t.type, [&](auto type) {
    using P = typename decltype(type)::type;
    if (t.grad_type == t.type) return with_shadow<P, P>(a, t, begin, end);
    if constexpr (sizeof(P) == 2) return with_shadow<P, float>(a, t, begin, end);
    if constexpr (is_same<P, float>) {
      if (t.grad_type == DType::bf16) return with_shadow<P, bf16>(a, t, begin, end);
      return with_shadow<P, f16>(a, t, begin, end);
    }
  });
}

}  // namespace

extern const AdamwKernels adamw_kernels = {adamw};

}  // namespace maefast::MAEFAST_ISA
