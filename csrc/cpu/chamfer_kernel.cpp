#include "cpu/chamfer_kernel.h"

#include "cpu/points_vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

template <class A>
void chamfer_typed(const ChamferArgs& c, void* workspace, int64_t begin, int64_t end) {
  constexpr int w = kLanes<A>;
  const int64_t padded = (c.m + 15) / 16 * 16;
  A* const planes = static_cast<A*>(workspace);
  A* const row = planes + c.coordinates * padded;  // distances of one point of a
  for (int64_t g = begin; g < end; ++g) {
    const A* a = static_cast<const A*>(c.a) + g * c.n * c.coordinates;
    A* to_b = static_cast<A*>(c.to_b) + g * c.n;
    A* to_a = static_cast<A*>(c.to_a) + g * c.m;
    int32_t* at_b = c.at_b + g * c.n;
    int32_t* at_a = c.at_a + g * c.m;
    planar(static_cast<const A*>(c.b) + g * c.m * c.coordinates, planes, c.m, padded, c.coordinates);
    for (int64_t i = 0; i < c.n; ++i) {
      vec<A> least = splat(A(__builtin_inf()));
      for (int64_t j = 0; j < padded; j += w) {
        const vec<A> distance = distances<A>(planes + j, padded, a + i * c.coordinates, c.coordinates);
        store<A>(row + j, distance);
        if (j + w <= c.m) least = distance < least ? distance : least;
      }
      A top = least[0];
      for (int l = 1; l < w; ++l) top = least[l] < top ? least[l] : top;
      for (int64_t j = c.m / w * w; j < c.m; ++j) top = row[j] < top ? row[j] : top;
      int64_t at = 0;
      while (at + 1 < c.m && row[at] != top) ++at;
      to_b[i] = top;
      at_b[i] = int32_t(at);
      if (i == 0) {
        for (int64_t j = 0; j < c.m; ++j) {
          to_a[j] = row[j];
          at_a[j] = 0;
        }
        continue;
      }
      for (int64_t j = 0; j < c.m; ++j) {
        const bool nearer = row[j] < to_a[j];
        to_a[j] = nearer ? row[j] : to_a[j];
        at_a[j] = nearer ? int32_t(i) : at_a[j];
      }
    }
  }
}

template <class A>
void backward_typed(const ChamferBackwardArgs& c, int64_t begin, int64_t end) {
  const int64_t d = c.coordinates;
  for (int64_t g = begin; g < end; ++g) {
    const A* a = static_cast<const A*>(c.a) + g * c.n * d;
    const A* b = static_cast<const A*>(c.b) + g * c.m * d;
    A* grad_a = static_cast<A*>(c.grad_a) + g * c.n * d;
    A* grad_b = static_cast<A*>(c.grad_b) + g * c.m * d;
    zero_row(grad_a, c.n * d);
    zero_row(grad_b, c.m * d);
    const auto add = [&](int64_t i, int64_t j, A slope) {
      if (i < 0 || i >= c.n || j < 0 || j >= c.m) return fail(c.failed);
      for (int64_t k = 0; k < d; ++k) {
        const A step = 2 * slope * (a[i * d + k] - b[j * d + k]);
        grad_a[i * d + k] += step;
        grad_b[j * d + k] -= step;
      }
    };
    const A* to_b = static_cast<const A*>(c.grad_to_b) + g * c.n;
    const A* to_a = static_cast<const A*>(c.grad_to_a) + g * c.m;
    for (int64_t i = 0; i < c.n; ++i) add(i, c.at_b[g * c.n + i], to_b[i]);
    for (int64_t j = 0; j < c.m; ++j) add(c.at_a[g * c.m + j], j, to_a[j]);
  }
}

void chamfer(const ChamferArgs& args, void* workspace, int64_t begin, int64_t end) {
  args.wide ? chamfer_typed<double>(args, workspace, begin, end)
            : chamfer_typed<float>(args, workspace, begin, end);
}

void chamfer_backward(const ChamferBackwardArgs& args, int64_t begin, int64_t end) {
  args.wide ? backward_typed<double>(args, begin, end) : backward_typed<float>(args, begin, end);
}

}  // namespace

extern const ChamferKernels chamfer_kernels = {chamfer, chamfer_backward};

}  // namespace maefast::MAEFAST_ISA
