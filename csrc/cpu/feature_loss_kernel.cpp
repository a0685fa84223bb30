// A row of the target goes once through memory into a working copy that stays in the L1 cache, is normalised
// there and compared with the row of pred.
#include "cpu/feature_loss_kernel.h"

#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

template <class A>
MAEFAST_INLINE vec<A> select(decltype(vec<A>{} < vec<A>{}) condition, vec<A> yes, vec<A> no) {
  return condition ? yes : no;
}

template <class A>
MAEFAST_INLINE vec<A> absolute(vec<A> x) {
  return select<A>(x < 0, -x, x);
}

template <class A>
MAEFAST_INLINE A square_root(A x) {
  return A(__builtin_sqrt(double(x)));
}

template <class A>
MAEFAST_INLINE A squared(A x) {
  return x * x;
}

// The row of the target, converted; false where the index points outside.
template <class A>
bool load_target(const FeatureLossArgs& a, int64_t r, A* t) {
  const int64_t row = a.index ? a.index[r] : r;
  if (row < 0 || row >= a.targets) {
    fail(a.failed);
    return false;
  }
  const int64_t at = row * a.width;
  if constexpr (is_same<A, double>) {
    convert_row(static_cast<const double*>(a.target) + at, t, a.width);
  } else {
    if (a.target_type == DType::f32) convert_row(static_cast<const float*>(a.target) + at, t, a.width);
    if (a.target_type == DType::f16) convert_row(static_cast<const f16*>(a.target) + at, t, a.width);
    if (a.target_type == DType::bf16) convert_row(static_cast<const bf16*>(a.target) + at, t, a.width);
  }
  return true;
}

template <class A>
void normalise(A* t, int64_t n, A mean, A scale) {
  for_lanes<A>(
      n, [&](int64_t i, auto lanes) { store<A>(t + i, (load<A>(t + i, lanes) - mean) * scale, lanes); });
}

template <class A, class X>
A squares(const X* x, int64_t n) {
  return sum_row<A>(n, [&](int64_t i, auto lanes) {
    const vec<A> v = load<A>(x + i, lanes);
    return v * v;
  });
}

// f(d) over a row and its slope, by kind. Missing lanes read as zero on both sides, so they add nothing.
template <class A, int kind>
MAEFAST_INLINE vec<A> distance(vec<A> d, A beta) {
  if constexpr (kind == 0) return d * d;
  if constexpr (kind == 1) return absolute<A>(d);
  const vec<A> m = absolute<A>(d);
  return select<A>(m < beta, A(0.5) * d * d / beta, m - A(0.5) * beta);
}

template <class A, int kind>
MAEFAST_INLINE vec<A> slope(vec<A> d, A beta) {
  if constexpr (kind == 0) return 2 * d;
  // NaN where d is not a number.
  const vec<A> sign = select<A>(d > 0, splat(A(1)), select<A>(d < 0, splat(A(-1)), d));
  if constexpr (kind == 1) return sign;
  return select<A>(absolute<A>(d) < beta, d / beta, sign);
}

template <int kind>
struct Kind {
  static constexpr int value = kind;
};

template <class F>
MAEFAST_INLINE void with_kind(int64_t kind, const F& f) {
  if (kind == 0) return f(Kind<0>{});
  if (kind == 1) return f(Kind<1>{});
  f(Kind<2>{});
}

template <class P>
void feature_loss_typed(const FeatureLossArgs& a, void* workspace, int64_t begin, int64_t end) {
  using A = acc_t<P>;
  const int64_t n = a.width;
  const A beta = A(a.beta), eps = A(a.eps);
  A* t = static_cast<A*>(workspace);
  A* loss = static_cast<A*>(a.loss);
  for (int64_t r = begin; r < end; ++r) {
    const P* p = static_cast<const P*>(a.pred) + r * n;
    A* stats = static_cast<A*>(a.stats) + 4 * r;
    stats[0] = stats[3] = loss[r] = 0;
    stats[1] = stats[2] = 1;
    if (!load_target<A>(a, r, t)) continue;
    A short_by =
        0;  // what the normalised rows lack to unit length, below eps only: no rounding where it is 0
    if (a.norm == 1) {
      const A mean = sum_row<A>(n, [&](int64_t i, auto lanes) { return load<A>(t + i, lanes); }) / A(n);
      const A variance = sum_row<A>(n,
                                    [&](int64_t i, auto lanes) {
                                      const vec<A> d = keep_lanes<A>(load<A>(t + i, lanes) - mean, lanes);
                                      return d * d;
                                    }) /
                         A(n);
      stats[0] = mean;
      stats[1] = 1 / square_root<A>(variance + eps);
    }
    if (a.norm == 2 || a.kind == 3) {
      const A of_t = square_root(squares<A>(t, n)), of_p = square_root(squares<A>(p, n));
      stats[1] = 1 / (of_t < eps ? eps : of_t);
      stats[2] = 1 / (of_p < eps ? eps : of_p);
      stats[3] = of_p < eps ? 0 : 1;
      if (of_t < eps) short_by += 1 - squared(of_t * stats[1]);
      if (of_p < eps) short_by += 1 - squared(of_p * stats[2]);
    }
    if (a.norm != 0 || a.kind == 3) normalise(t, n, a.norm == 1 ? stats[0] : A(0), stats[1]);
    const A scale = stats[2];
    if (a.kind == 3) {
      const A apart = sum_row<A>(n, [&](int64_t i, auto lanes) {
        const vec<A> d = load<A>(p + i, lanes) * scale - load<A>(t + i, lanes);
        return d * d;
      });
      stats[0] = loss[r] = A(0.5) * (apart + short_by);
      continue;
    }
    with_kind(a.kind, [&](auto kind) {
      loss[r] = sum_row<A>(n,
                           [&](int64_t i, auto lanes) {
                             return distance<A, decltype(kind)::value>(
                                 load<A>(p + i, lanes) * scale - load<A>(t + i, lanes), beta);
                           }) /
                A(n);
    });
  }
}

template <class P>
void feature_loss_backward_typed(const FeatureLossArgs& a, void* workspace, int64_t begin, int64_t end) {
  using A = acc_t<P>;
  const int64_t n = a.width;
  const A beta = A(a.beta);
  A* t = static_cast<A*>(workspace);
  for (int64_t r = begin; r < end; ++r) {
    const P* p = static_cast<const P*>(a.pred) + r * n;
    P* grad_pred = static_cast<P*>(a.grad_pred) + r * n;
    const A* stats = static_cast<const A*>(a.stats) + 4 * r;
    const A grad = static_cast<const A*>(a.grad)[r];
    const A scale = stats[2];
    if (!load_target<A>(a, r, t)) {
      zero_row(grad_pred, n);
      continue;
    }
    if (a.norm != 0 || a.kind == 3) normalise(t, n, a.norm == 1 ? stats[0] : A(0), stats[1]);
    if (a.kind == 3) {
      // t - cos p, where t is close to p without loss of digits.
      const A out = -grad * scale, unit = stats[3] * scale, rest = unit * stats[0];
      for_lanes<A>(n, [&](int64_t i, auto lanes) {
        const vec<A> v = load<A>(p + i, lanes);
        store<A>(grad_pred + i, out * (load<A>(t + i, lanes) - v * unit + v * rest), lanes);
      });
      continue;
    }
    with_kind(a.kind, [&](auto kind) {
      constexpr int k = decltype(kind)::value;
      const A out = grad / A(n) * scale;
      A along = 0;  // of the slope along pred, which its normalisation takes out
      if (a.norm == 2 && stats[3] != 0)
        along = scale * sum_row<A>(n, [&](int64_t i, auto lanes) {
                  const vec<A> y = load<A>(p + i, lanes) * scale;
                  return y * slope<A, k>(y - load<A>(t + i, lanes), beta);
                });
      for_lanes<A>(n, [&](int64_t i, auto lanes) {
        const vec<A> v = load<A>(p + i, lanes);
        store<A>(grad_pred + i, out * (slope<A, k>(v * scale - load<A>(t + i, lanes), beta) - v * along),
                 lanes);
      });
    });
  }
}

void feature_loss(const FeatureLossArgs& a, void* workspace, int64_t begin, int64_t end) {
  with_type(a.pred_type,
            [&](auto p) { feature_loss_typed<typename decltype(p)::type>(a, workspace, begin, end); });
}

void feature_loss_backward(const FeatureLossArgs& a, void* workspace, int64_t begin, int64_t end) {
  with_type(a.pred_type, [&](auto p) {
    feature_loss_backward_typed<typename decltype(p)::type>(a, workspace, begin, end);
  });
}

}  // namespace

extern const FeatureLossKernels feature_loss_kernels = {feature_loss, feature_loss_backward};

}  // namespace maefast::MAEFAST_ISA
