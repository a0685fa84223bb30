#include "cpu/norm_kernel.h"

#include "cpu/units_vec.h"
#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

// Sums go to kSums registers in turn: one alone would be a chain of additions, each waiting for the last.
// (Four gain nothing over two, and the backward, which has more to do for each element, nothing over one.)
constexpr int kSums = 2;

template <class A, class F>
MAEFAST_INLINE void for_sums(int64_t n, const F& f) {
  constexpr int w = kLanes<A>;
  int64_t i = 0;
  for (; i + kSums * w <= n; i += kSums * w) {
#pragma GCC unroll 2
    for (int k = 0; k < kSums; ++k) f(i + k * w, Full<w>{}, k);
  }
  for_lanes<A>(n - i, [&](int64_t k, auto lanes) { f(i + k, lanes, 0); });
}

template <class A>
MAEFAST_INLINE A sum_all(const vec<A> (&sums)[kSums]) {
  return sum_lanes<A>(sums[0] + sums[1]);
}

// residual = x + delta (+ shift), rounded to the stream's type; returns the sum of the rounded row.
template <class A, class X, class D>
MAEFAST_INLINE A add_and_sum(const X* x, const D* delta, const A* shift, X* residual, int64_t d) {
  vec<A> sums[kSums] = {};
  for_sums<A>(d, [&](int64_t i, auto lanes, int k) {
    vec<A> v = load<A>(x + i, lanes);
    if (delta) {
      v += shift ? load<A>(delta + i, lanes) + load<A>(shift + i, lanes) : load<A>(delta + i, lanes);
      store<A>(residual + i, v, lanes);
      if constexpr (!is_same<A, X>) v = load<A>(residual + i, lanes);
    }
    sums[k] += keep_lanes<A>(v, lanes);
  });
  return sum_all<A>(sums);
}

template <class X, class D, class Y>
void add_norm_typed(const AddNormArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<X>;
  const int64_t d = a.width;
  const A* weight = static_cast<const A*>(a.weight);
  const A* bias = static_cast<const A*>(a.bias);
  const A* shift = static_cast<const A*>(a.shift);
  for (int64_t r = begin; r < end; ++r) {
    const X* x = static_cast<const X*>(a.x) + r * d;
    const D* delta = a.delta ? static_cast<const D*>(a.delta) + r * d : nullptr;
    X* residual = a.delta ? static_cast<X*>(a.residual) + r * d : nullptr;
    Y* y = static_cast<Y*>(a.y) + r * d;
    const A mean = add_and_sum<A>(x, delta, shift, residual, d) / A(d);
    const X* row = delta ? residual : x;  // now in the first-level cache
    // The passes over a row that is at hand fetch the next one.
    const int64_t next = r + 1 < end ? d : 0;
    vec<A> squares[kSums] = {};
    for_sums<A>(d, [&](int64_t i, auto lanes, int k) {
      __builtin_prefetch(x + next + i);
      const vec<A> c = keep_lanes<A>(load<A>(row + i, lanes) - mean, lanes);
      squares[k] += c * c;
    });
    const A variance = sum_all<A>(squares) / A(d);
    const A rstd = A(1) / A(__builtin_sqrt(double(variance) + a.eps));
    for_lanes<A>(d, [&](int64_t i, auto lanes) {
      if (delta) __builtin_prefetch(delta + next + i);
      const vec<A> normed = (load<A>(row + i, lanes) - mean) * rstd;
      store<A>(y + i, normed * load<A>(weight + i, lanes) + load<A>(bias + i, lanes), lanes);
    });
    static_cast<A*>(a.mean)[r] = mean;
    static_cast<A*>(a.rstd)[r] = rstd;
  }
}

void add_norm(const AddNormArgs& a, int64_t begin, int64_t end) {
  with_widening(a.y_type, a.x_type, [&](auto y, auto x) {
    using X = typename decltype(x)::type;
    using Y = typename decltype(y)::type;
    if constexpr (is_same<X, float>) {
      if (a.delta_type == DType::bf16) return add_norm_typed<X, bf16, Y>(a, begin, end);
      if (a.delta_type == DType::f16) return add_norm_typed<X, f16, Y>(a, begin, end);
    }
    add_norm_typed<X, X, Y>(a, begin, end);
  });
}

// With n the normalised row and w = grad_y * weight: grad_x = rstd * (w - mean(w) - n * mean(w * n)).
template <class X, class Y, class D>
void add_norm_backward_typed(const AddNormBackwardArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<X>;
  const int64_t d = a.width;
  const A* weight = static_cast<const A*>(a.weight);
  const A* bias = static_cast<const A*>(a.bias);
  for (int64_t unit = begin; unit < end; ++unit) {
    A* sums = a.sums ? static_cast<A*>(a.sums) + unit * a.tables * d : nullptr;
    A* shift_sums = sums && a.tables == 3 ? sums + 2 * d : nullptr;
    if (sums) zero_row(sums, a.tables * d);
    for (int64_t r = a.rows * unit / a.units; r < a.rows * (unit + 1) / a.units; ++r) {
      const Y* grad_y = static_cast<const Y*>(a.grad_y) + r * d;
      const X* row = static_cast<const X*>(a.residual) + r * d;
      const X* passed = a.grad_residual ? static_cast<const X*>(a.grad_residual) + r * d : nullptr;
      X* grad_x = static_cast<X*>(a.grad_x) + r * d;
      D* grad_delta = a.grad_delta ? static_cast<D*>(a.grad_delta) + r * d : nullptr;
      Y* y = a.y ? static_cast<Y*>(a.y) + r * d : nullptr;
      const A mean = static_cast<const A*>(a.mean)[r];
      const A rstd = static_cast<const A*>(a.rstd)[r];
      vec<A> total{}, product{};
      for_lanes<A>(d, [&](int64_t i, auto lanes) {
        const vec<A> g = load<A>(grad_y + i, lanes);  // zero in missing lanes, and so are w and w * n
        const vec<A> n = (load<A>(row + i, lanes) - mean) * rstd;
        const vec<A> w = g * load<A>(weight + i, lanes);
        total += w;
        product += w * n;
        if (sums) {
          store<A>(sums + i, load<A>(sums + i, lanes) + g * n, lanes);
          store<A>(sums + d + i, load<A>(sums + d + i, lanes) + g, lanes);
        }
      });
      const A mean_w = sum_lanes<A>(total) / A(d);
      const A mean_wn = sum_lanes<A>(product) / A(d);
      for_lanes<A>(d, [&](int64_t i, auto lanes) {
        const vec<A> n = (load<A>(row + i, lanes) - mean) * rstd;
        const vec<A> w = load<A>(grad_y + i, lanes) * load<A>(weight + i, lanes);
        vec<A> g = (w - mean_w - n * mean_wn) * rstd;
        if (passed) g += load<A>(passed + i, lanes);
        store<A>(grad_x + i, g, lanes);
        if (grad_delta) store<A>(grad_delta + i, g, lanes);
        if (shift_sums) store<A>(shift_sums + i, load<A>(shift_sums + i, lanes) + g, lanes);
        if (y) store<A>(y + i, n * load<A>(weight + i, lanes) + load<A>(bias + i, lanes), lanes);
      });
    }
  }
}

void add_norm_backward(const AddNormBackwardArgs& a, int64_t begin, int64_t end) {
  with_widening(a.y_type, a.x_type, [&](auto y, auto x) {
    using X = typename decltype(x)::type;
    using Y = typename decltype(y)::type;
    if constexpr (is_same<X, float>) {
      if (a.delta_type == DType::bf16) return add_norm_backward_typed<X, Y, bf16>(a, begin, end);
      if (a.delta_type == DType::f16) return add_norm_backward_typed<X, Y, f16>(a, begin, end);
    }
    add_norm_backward_typed<X, Y, X>(a, begin, end);
  });
}

}  // namespace

extern const NormKernels norm_kernels = {add_norm, add_norm_backward, sum_pieces};

}  // namespace maefast::MAEFAST_ISA
