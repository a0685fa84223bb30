// A patch is handled in a few passes over a working copy of its K pixels that stays in the L1 cache:
//   pixels (C, S) -> moments -> normalised target -> (if the prediction is laid out so) (S, C) -> against
//   pred,
// with S = pt*ph*pw. Each pixel and each prediction is read from memory once.
#include "cpu/loss_kernel.h"

#include "cpu/patch_vec.h"
#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

constexpr double kEps = 1e-6;

MAEFAST_INLINE float square_root(float x) {
  return __builtin_sqrtf(x);
}
MAEFAST_INLINE double square_root(double x) {
  return __builtin_sqrt(x);
}

// ---- the target

template <class X, class A>
void load_patch(const Grid& g, const X* patch, A* target) {
  if (g.pw == 16) {
    for_runs(g, [&](int64_t pixel, int64_t k) { convert_row(patch + pixel, target + k, 16); });
  } else {
    for_runs(g, [&](int64_t pixel, int64_t k) { convert_row(patch + pixel, target + k, g.pw); });
  }
}

template <class A>
void normalise(A* t, int64_t n, const A* stats) {
  const A mean = stats[0];
  const A scale = stats[1];
  for_lanes<A>(
      n, [&](int64_t i, auto lanes) { store<A>(t + i, (load<A>(t + i, lanes) - mean) * scale, lanes); });
}

// stats = (mean, 1 / denominator) of n values. The variance takes a second pass, so nothing cancels.
template <class A>
void measure(const A* t, int64_t n, Norm norm, A* stats) {
  const A mean = sum_row<A>(n, [&](int64_t i, auto lanes) { return load<A>(t + i, lanes); }) / A(n);
  const A squares = sum_row<A>(n, [&](int64_t i, auto lanes) {
    const vec<A> d = keep_lanes<A>(load<A>(t + i, lanes) - mean, lanes);
    return d * d;
  });
  const A variance = squares / A(norm == Norm::layernorm ? n : n - 1);
  stats[0] = mean;
  stats[1] =
      norm == Norm::videomae ? 1 / (square_root(variance) + A(kEps)) : 1 / square_root(variance + A(kEps));
}

// (C, S) -> (S, C) and back.
template <class A>
void interleave(const A* __restrict x, A* __restrict y, int64_t channels, int64_t pixels) {
  if (channels == 3) {
    const A *r = x, *g = x + pixels, *b = x + 2 * pixels;
    for (int64_t s = 0; s < pixels; ++s) {
      y[3 * s] = r[s];
      y[3 * s + 1] = g[s];
      y[3 * s + 2] = b[s];
    }
  } else {
    for (int64_t s = 0; s < pixels; ++s)
      for (int64_t c = 0; c < channels; ++c) y[s * channels + c] = x[c * pixels + s];
  }
}

template <class A>
void deinterleave(const A* __restrict x, A* __restrict y, int64_t channels, int64_t pixels) {
  if (channels == 3) {
    A *r = y, *g = y + pixels, *b = y + 2 * pixels;
    for (int64_t s = 0; s < pixels; ++s) {
      r[s] = x[3 * s];
      g[s] = x[3 * s + 1];
      b[s] = x[3 * s + 2];
    }
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t s = 0; s < pixels; ++s) y[c * pixels + s] = x[s * channels + c];
  }
}

// ---- the distance

template <class A>
MAEFAST_INLINE vec<A> select(decltype(vec<A>{} < vec<A>{}) condition, vec<A> yes, vec<A> no) {
  return condition ? yes : no;
}

template <class A>
MAEFAST_INLINE vec<A> absolute(vec<A> x) {
  return select<A>(x < 0, -x, x);
}

template <class P, class A>
A distance(const P* pred, const A* target, int64_t n, Distance kind, A beta) {
  if (kind == Distance::mse) {
    return sum_row<A>(n, [&](int64_t i, auto lanes) {
      const vec<A> d = load<A>(pred + i, lanes) - load<A>(target + i, lanes);
      return d * d;
    });
  }
  return sum_row<A>(n, [&](int64_t i, auto lanes) {
    const vec<A> d = absolute<A>(load<A>(pred + i, lanes) - load<A>(target + i, lanes));
    return keep_lanes<A>(select<A>(d < beta, A(0.5) * d * d / beta, d - A(0.5) * beta), lanes);
  });
}

// grad_pred = scale * derivative; also into wide_grad if it is wanted. Not a number where a difference is not
// one.
template <class P, class A>
void distance_backward(const P* pred, const A* target, int64_t n, Distance kind, A beta, A scale,
                       P* grad_pred, A* wide_grad) {
  for_lanes<A>(n, [&](int64_t i, auto lanes) {
    const vec<A> d = load<A>(pred + i, lanes) - load<A>(target + i, lanes);
    vec<A> grad;
    if (kind == Distance::mse) {
      grad = 2 * scale * d;
    } else {
      grad = select<A>(absolute<A>(d) >= beta,
                       select<A>(d > 0, splat(A(1)), select<A>(d < 0, splat(A(-1)), vec<A>{})), d / beta) *
             scale;
    }
    store<A>(grad_pred + i, grad, lanes);
    if (wide_grad) store<A>(wide_grad + i, grad, lanes);
  });
}

// ---- through the normalisation

// With y = (t - mean) / denominator, r = 1 / denominator, n values and m = n - 1 (m = n for the biased
// variance):
//   1/sqrt(var + eps):   dt = r * (g - mean(g) - y * sum(g*y) / m)
//   1/(sqrt(var) + eps): dt = r * (g - mean(g) - y * sum(g*y) / (m * sd * r)),   sd * r = sqrt(sum(y*y) / m)
// At sd = 0 the derivative of the root is undefined; the deviation is constant zero there to first order, and
// its term is left out (as torch.std does). `g` is the gradient of the prediction, and the target's has the
// other sign.
template <class A>
void normalise_backward(A* g, const A* y, int64_t n, Norm norm, A scale) {
  const A total = sum_row<A>(n, [&](int64_t i, auto lanes) { return load<A>(g + i, lanes); });
  const A product =
      sum_row<A>(n, [&](int64_t i, auto lanes) { return load<A>(g + i, lanes) * load<A>(y + i, lanes); });
  const A m = A(norm == Norm::layernorm ? n : n - 1);
  A slope = product / m;
  if (norm == Norm::videomae) {
    const A ratio = square_root(
        sum_row<A>(n, [&](int64_t i, auto lanes) { return load<A>(y + i, lanes) * load<A>(y + i, lanes); }) /
        m);
    slope = ratio == 0 ? 0 : slope / ratio;
  }
  const A mean = total / A(n);
  for_lanes<A>(n, [&](int64_t i, auto lanes) {
    const vec<A> d = load<A>(g + i, lanes) - mean - load<A>(y + i, lanes) * slope;
    store<A>(g + i, -(scale * d), lanes);
  });
}

// ---- rows

// Working memory: `planar` [K] holds (C, S), `mixed` [K] holds (S, C) where the prediction wants it, `grad`
// [K].
template <class A>
struct Work {
  A *planar, *mixed, *grad;
  Work(void* workspace, int64_t values)
      : planar(static_cast<A*>(workspace)), mixed(planar + values), grad(mixed + values) {}
};

// Returns the target in the layout of the predictions.
template <class A>
const A* arrange(const LossArgs& a, const Grid& g, Work<A>& work) {
  if (a.channels_first || g.channels == 1) return work.planar;
  interleave(work.planar, work.mixed, g.channels, g.pt * g.ph * g.pw);
  return work.mixed;
}

template <class X, class A>
void load_target(const LossArgs& a, const Grid& g, int64_t flat, A* target) {
  load_patch(g, static_cast<const X*>(a.images) + g.origin(flat), target);
}

template <class A>
void load_target(const LossArgs& a, const Grid& g, int64_t flat, A* target) {
  with_type(a.image_type, [&](auto x) { load_target<typename decltype(x)::type, A>(a, g, flat, target); });
}

template <class A>
void normalise_groups(const LossArgs& a, const Grid& g, A* target, const A* stats) {
  if (a.norm == Norm::none) return;
  const int64_t groups = a.norm == Norm::videomae ? g.channels : 1;
  const int64_t n = g.values / groups;
  for (int64_t i = 0; i < groups; ++i) normalise(target + i * n, n, stats + 2 * i);
}

template <class P, class A>
void patch_loss_typed(const LossArgs& a, void* workspace, int64_t begin, int64_t end) {
  const Grid g(a.grid);
  Work<A> work(workspace, g.values);
  const P* pred = static_cast<const P*>(a.pred);
  A* loss = static_cast<A*>(a.loss);
  const int64_t groups = a.norm == Norm::videomae ? g.channels : 1;
  const int64_t n = g.values / groups;
  for (int64_t r = begin; r < end; ++r) {
    A* stats = static_cast<A*>(a.stats) + r * groups * 2;
    const int64_t flat = a.index[r];
    if (flat < 0 || flat >= a.grid.batch * g.tokens) {
      fail(a.failed);
      zero_row(stats, groups * 2);
      loss[r] = 0;
      continue;
    }
    load_target(a, g, flat, work.planar);
    for (int64_t i = 0; i < groups; ++i) {
      if (a.norm == Norm::none) {
        stats[0] = 0;
        stats[1] = 1;
      } else {
        measure(work.planar + i * n, n, a.norm, stats + 2 * i);
      }
    }
    normalise_groups(a, g, work.planar, stats);
    const A* target = arrange(a, g, work);
    loss[r] = distance(pred + (a.packed ? r : flat) * g.values, target, g.values, a.distance, A(a.beta)) /
              A(g.values);
  }
}

// The gradient of one scored row; leaves the planar target and, if wanted, the wide gradient in `work`.
template <class P, class A>
void row_backward(const LossArgs& a, const Grid& g, Work<A>& work, int64_t r, int64_t flat, bool keep_wide) {
  const int64_t groups = a.norm == Norm::videomae ? g.channels : 1;
  load_target(a, g, flat, work.planar);
  normalise_groups(a, g, work.planar, static_cast<const A*>(a.stats) + r * groups * 2);
  const A* target = arrange(a, g, work);
  const int64_t row = (a.packed ? r : flat) * g.values;
  const A scale = static_cast<const A*>(a.loss)[r] / A(g.values);
  distance_backward(static_cast<const P*>(a.pred) + row, target, g.values, a.distance, A(a.beta), scale,
                    static_cast<P*>(a.grad_pred) + row, keep_wide ? work.grad : nullptr);
}

template <class P, class A>
void backward_rows_typed(const LossArgs& a, void* workspace, int64_t begin, int64_t end) {
  const Grid g(a.grid);
  Work<A> work(workspace, g.values);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t flat = a.index[r];
    if (flat < 0 || flat >= a.grid.batch * g.tokens) {
      fail(a.failed);
      zero_row(static_cast<P*>(a.grad_pred) + r * g.values, g.values);
    } else {
      row_backward<P, A>(a, g, work, r, flat, false);
    }
  }
}

// From the gradient of the prediction to that of the pixels, written into the image.
template <class X, class A>
void store_image_grad(const LossArgs& a, const Grid& g, Work<A>& work, int64_t r, int64_t flat) {
  X* patch = static_cast<X*>(a.grad_images) + g.origin(flat);
  const bool mixed = !a.channels_first && g.channels > 1;
  if (mixed) deinterleave(work.grad, work.mixed, g.channels, g.pt * g.ph * g.pw);
  A* grad = mixed ? work.mixed : work.grad;
  const int64_t groups = a.norm == Norm::videomae ? g.channels : 1;
  const int64_t n = g.values / groups;
  const A* stats = static_cast<const A*>(a.stats) + r * groups * 2;
  if (a.norm == Norm::none) {
    for_lanes<A>(g.values,
                 [&](int64_t i, auto lanes) { store<A>(grad + i, -load<A>(grad + i, lanes), lanes); });
  } else {
    for (int64_t i = 0; i < groups; ++i)
      normalise_backward(grad + i * n, work.planar + i * n, n, a.norm, stats[2 * i + 1]);
  }
  for_runs(g, [&](int64_t pixel, int64_t k) { convert_row(grad + k, patch + pixel, g.pw); });
}

template <class P, class A>
void backward_tokens_typed(const LossArgs& a, void* workspace, int64_t begin, int64_t end) {
  const Grid g(a.grid);
  Work<A> work(workspace, g.values);
  for (int64_t flat = begin; flat < end; ++flat) {
    const int64_t slot = a.slot[flat];
    const int64_t r = slot == kAbsent ? -1 : ~slot;
    const bool scored = r >= 0 && r < a.rows && a.index[r] == flat;
    if (r >= 0 && !scored) fail(a.failed);
    if (scored) {
      row_backward<P, A>(a, g, work, r, flat, a.grad_images != nullptr);
    } else if (!a.packed) {
      zero_row(static_cast<P*>(a.grad_pred) + flat * g.values, g.values);
    }
    if (!a.grad_images) continue;
    with_type(a.image_type, [&](auto x) {
      using X = typename decltype(x)::type;
      if (scored) {
        store_image_grad<X, A>(a, g, work, r, flat);
      } else {
        X* patch = static_cast<X*>(a.grad_images) + g.origin(flat);
        for_runs(g, [&](int64_t pixel, int64_t) { zero_row(patch + pixel, g.pw); });
      }
    });
  }
}

// Calls f with the Types of the predictions and of the arithmetic.
template <class F>
MAEFAST_INLINE void with_wide(const LossArgs& a, const F& f) {
  with_type(a.pred_type, [&](auto p) {
    using P = typename decltype(p)::type;
    if constexpr (!is_same<P, double>) {
      if (a.wide_type == DType::f32) return f(p, Type<float>{});
    }
    f(p, Type<double>{});
  });
}

void patch_loss(const LossArgs& a, void* workspace, int64_t begin, int64_t end) {
  with_wide(a, [&](auto p, auto wide) {
    patch_loss_typed<typename decltype(p)::type, typename decltype(wide)::type>(a, workspace, begin, end);
  });
}

void patch_loss_backward_rows(const LossArgs& a, void* workspace, int64_t begin, int64_t end) {
  with_wide(a, [&](auto p, auto wide) {
    backward_rows_typed<typename decltype(p)::type, typename decltype(wide)::type>(a, workspace, begin, end);
  });
}

void patch_loss_backward_tokens(const LossArgs& a, void* workspace, int64_t begin, int64_t end) {
  with_wide(a, [&](auto p, auto wide) {
    backward_tokens_typed<typename decltype(p)::type, typename decltype(wide)::type>(a, workspace, begin,
                                                                                     end);
  });
}

int64_t workspace(const LossArgs& a) {
  return 3 * Grid(a.grid).values * (a.wide_type == DType::f64 ? 8 : 4);
}

}  // namespace

extern const LossKernels loss_kernels = {workspace, patch_loss, patch_loss_backward_rows,
                                         patch_loss_backward_tokens};

}  // namespace maefast::MAEFAST_ISA
