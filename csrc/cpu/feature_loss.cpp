#include "cpu/feature_loss_kernel.h"
#include "cpu/host.h"
#include "cpu/ops.h"

namespace maefast::cpu {
namespace {

FeatureLossArgs arguments(const Tensor& pred, const Tensor& target, const std::optional<Tensor>& index,
                          int64_t norm, int64_t kind, int32_t* failed) {
  FeatureLossArgs args{};
  args.pred_type = dtype_of(pred);
  args.target_type = dtype_of(target);
  MAEFAST_CHECK(pred.dim() == 2 && target.dim() == 2 && pred.size(1) == target.size(1) && pred.size(1) >= 1 &&
                    (args.pred_type == DType::f64) == (args.target_type == DType::f64),
                "feature_loss: pred [R, D] and target [N, D] must fit, both in float64 or neither");
  MAEFAST_CHECK(index ? index->numel() == pred.size(0) : target.size(0) == pred.size(0),
                "feature_loss: one row of the target for each row of pred");
  MAEFAST_CHECK(norm >= 0 && norm <= 2 && kind >= 0 && kind <= 3, "feature_loss: unknown norm or loss");
  args.pred = data(pred, "pred");
  args.target = data(target, "target");
  args.index = index ? plan_data(*index, "index") : nullptr;
  args.width = pred.size(1);
  args.targets = target.size(0);
  args.norm = norm;
  args.kind = kind;
  args.failed = failed;
  return args;
}

template <class Kernel>
void run(const Kernel& kernel, const FeatureLossArgs& args, int64_t rows) {
  const int64_t bytes = args.width * (args.pred_type == DType::f64 ? 8 : 4);
  parallel_rows(rows, 2 * bytes, [&](int64_t begin, int64_t end) {
    const Workspace workspace(bytes);
    kernel(args, workspace.get(), begin, end);
  });
  check_plan(*args.failed);
}

}  // namespace

std::tuple<Tensor, Tensor> feature_loss(const Tensor& pred, const Tensor& target,
                                        const std::optional<Tensor>& index, int64_t norm, int64_t kind,
                                        double beta, double eps) {
  int32_t failed = 0;
  FeatureLossArgs args = arguments(pred, target, index, norm, kind, &failed);
  args.beta = beta;
  args.eps = eps;
  const ScalarType wide = arithmetic_type(pred.scalar_type());
  Tensor loss = empty({pred.size(0)}, wide, pred);
  Tensor stats = empty({pred.size(0), 4}, wide, pred);
  args.loss = loss.mutable_data_ptr();
  args.stats = stats.mutable_data_ptr();
  run(feature_loss_kernels_chosen().feature_loss, args, pred.size(0));
  return {loss, stats};
}

Tensor feature_loss_backward(const Tensor& grad, const Tensor& pred, const Tensor& target,
                             const std::optional<Tensor>& index, const Tensor& stats, int64_t norm,
                             int64_t kind, double beta) {
  int32_t failed = 0;
  FeatureLossArgs args = arguments(pred, target, index, norm, kind, &failed);
  const ScalarType wide = arithmetic_type(pred.scalar_type());
  MAEFAST_CHECK(grad.numel() == pred.size(0) && stats.numel() == 4 * pred.size(0) &&
                    grad.scalar_type() == wide && stats.scalar_type() == wide && stats.is_contiguous(),
                "feature_loss_backward: grad [R] and stats [R, 4] must be those of the forward");
  args.beta = beta;
  args.grad = data(grad, "grad");
  args.stats = const_cast<void*>(stats.const_data_ptr());
  Tensor grad_pred = empty({pred.size(0), pred.size(1)}, pred.scalar_type(), pred);
  args.grad_pred = grad_pred.mutable_data_ptr();
  run(feature_loss_kernels_chosen().feature_loss_backward, args, pred.size(0));
  return grad_pred;
}

}  // namespace maefast::cpu
