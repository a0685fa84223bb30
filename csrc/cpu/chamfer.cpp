#include "cpu/chamfer_kernel.h"
#include "cpu/host.h"
#include "cpu/ops.h"

namespace maefast::cpu {
namespace {

bool check_sets(const Tensor& a, const Tensor& b) {
  MAEFAST_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(2) &&
                    a.size(1) >= 1 && b.size(1) >= 1 && a.size(2) >= 1 && a.size(2) <= 16 &&
                    a.is_contiguous() && b.is_contiguous() && a.scalar_type() == b.scalar_type() &&
                    (a.scalar_type() == ScalarType::Float || a.scalar_type() == ScalarType::Double),
                "chamfer: a [G, n, D] and b [G, m, D] must be contiguous, float32 or float64, D up to 16");
  return a.scalar_type() == ScalarType::Double;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> chamfer(const Tensor& a, const Tensor& b) {
  ChamferArgs args;
  args.wide = check_sets(a, b);
  args.n = a.size(1);
  args.m = b.size(1);
  args.coordinates = a.size(2);
  const int64_t groups = a.size(0);
  Tensor to_b = empty({groups, args.n}, a.scalar_type(), a);
  Tensor to_a = empty({groups, args.m}, a.scalar_type(), a);
  Tensor at_b = empty({groups, args.n}, ScalarType::Int, a);
  Tensor at_a = empty({groups, args.m}, ScalarType::Int, a);
  args.a = a.const_data_ptr();
  args.b = b.const_data_ptr();
  args.to_b = to_b.mutable_data_ptr();
  args.to_a = to_a.mutable_data_ptr();
  args.at_b = static_cast<int32_t*>(at_b.mutable_data_ptr());
  args.at_a = static_cast<int32_t*>(at_a.mutable_data_ptr());
  const int64_t room = (args.coordinates + 1) * ((args.m + 15) / 16 * 16);
  const auto kernel = chamfer_kernels_chosen().chamfer;
  parallel_rows(groups, 4 * args.n * args.m * args.coordinates, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> workspace(new double[room]);
    kernel(args, workspace.get(), begin, end);
  });
  return {to_b, to_a, at_b, at_a};
}

std::tuple<Tensor, Tensor> chamfer_backward(const Tensor& grad_to_b, const Tensor& grad_to_a, const Tensor& a,
                                            const Tensor& b, const Tensor& at_b, const Tensor& at_a) {
  ChamferBackwardArgs args;
  args.wide = check_sets(a, b);
  args.n = a.size(1);
  args.m = b.size(1);
  args.coordinates = a.size(2);
  const int64_t groups = a.size(0);
  MAEFAST_CHECK(grad_to_b.numel() == groups * args.n && at_b.numel() == groups * args.n &&
                    grad_to_a.numel() == groups * args.m && at_a.numel() == groups * args.m &&
                    grad_to_b.scalar_type() == a.scalar_type() && grad_to_a.scalar_type() == a.scalar_type(),
                "chamfer_backward: the gradients must be [G, n] and [G, m], like the distances");
  Tensor grad_a = empty({groups, args.n, args.coordinates}, a.scalar_type(), a);
  Tensor grad_b = empty({groups, args.m, args.coordinates}, a.scalar_type(), a);
  int32_t failed = 0;
  args.grad_to_b = data(grad_to_b, "grad_to_b");
  args.grad_to_a = data(grad_to_a, "grad_to_a");
  args.a = a.const_data_ptr();
  args.b = b.const_data_ptr();
  args.at_b = plan_data(at_b, "at_b");
  args.at_a = plan_data(at_a, "at_a");
  args.grad_a = grad_a.mutable_data_ptr();
  args.grad_b = grad_b.mutable_data_ptr();
  args.failed = &failed;
  const auto kernel = chamfer_kernels_chosen().chamfer_backward;
  parallel_rows(groups, 16 * (args.n + args.m) * args.coordinates,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  check_plan(failed);
  return {grad_a, grad_b};
}

}  // namespace maefast::cpu
