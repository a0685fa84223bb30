#include "cpu/host.h"
#include "cpu/loss_kernel.h"
#include "cpu/ops.h"

namespace maefast::cpu {
namespace {

LossArgs loss_args(const Tensor& pred, const Tensor& images, const Tensor& index,
                   const std::vector<int64_t>& patch, bool packed, bool channels_first, int64_t norm,
                   int64_t kind, double beta) {
  LossArgs args{};
  args.grid = patch_grid(images, patch);
  args.rows = index.numel();
  const int64_t tokens = images.size(0) * tokens_of(args.grid);
  MAEFAST_CHECK(pred.dim() == 2 && pred.size(1) == values_of(args.grid) &&
                    pred.size(0) == (packed ? args.rows : tokens),
                "patch_loss: pred must be [M, K], or [B*N, K] when it is not packed");
  MAEFAST_CHECK(norm >= 0 && norm <= 3 && kind >= 0 && kind <= 1, "patch_loss: unknown norm or kind");
  args.pred = data(pred, "pred");
  args.images = data(images, "images");
  args.index = plan_data(index, "index");
  args.packed = packed;
  args.channels_first = channels_first;
  args.norm = static_cast<Norm>(norm);
  args.distance = static_cast<Distance>(kind);
  args.beta = beta;
  args.pred_type = dtype_of(pred);
  args.image_type = dtype_of(images);
  args.wide_type = args.pred_type == DType::f64 || args.image_type == DType::f64 ? DType::f64 : DType::f32;
  return args;
}

ScalarType wide_type(const LossArgs& args) {
  return args.wide_type == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

int64_t groups_of(const LossArgs& args) {
  return args.norm == Norm::videomae ? args.grid.channels : 1;
}

template <class Kernel>
void run(const LossArgs& args, int64_t rows, Kernel kernel) {
  const int64_t bytes = loss_kernels_chosen().workspace(args);
  parallel_rows(rows, values_of(args.grid) * 8, [&](int64_t begin, int64_t end) {
    const Workspace workspace(bytes);
    kernel(args, workspace.get(), begin, end);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> patch_loss(const Tensor& pred, const Tensor& images, const Tensor& index,
                                      const std::vector<int64_t>& patch, bool packed, bool channels_first,
                                      int64_t norm, int64_t kind, double beta) {
  LossArgs args = loss_args(pred, images, index, patch, packed, channels_first, norm, kind, beta);
  int32_t failed = 0;
  args.failed = &failed;
  Tensor loss = empty({args.rows}, wide_type(args), pred);
  Tensor stats = empty({args.rows, groups_of(args), 2}, wide_type(args), pred);
  args.loss = loss.mutable_data_ptr();
  args.stats = stats.mutable_data_ptr();
  run(args, args.rows, loss_kernels_chosen().patch_loss);
  check_plan(failed);
  return {loss, stats};
}

std::tuple<Tensor, Tensor> patch_loss_backward(const Tensor& grad, const Tensor& pred, const Tensor& images,
                                               const Tensor& index, const Tensor& slot, const Tensor& stats,
                                               const std::vector<int64_t>& patch, bool packed,
                                               bool channels_first, int64_t norm, int64_t kind, double beta,
                                               bool need_images) {
  LossArgs args = loss_args(pred, images, index, patch, packed, channels_first, norm, kind, beta);
  const int64_t tokens = images.size(0) * tokens_of(args.grid);
  MAEFAST_CHECK(slot.numel() == tokens && grad.numel() == args.rows &&
                    stats.numel() == args.rows * groups_of(args) * 2 &&
                    grad.scalar_type() == wide_type(args) && stats.scalar_type() == wide_type(args),
                "patch_loss_backward: grad, slot or stats does not fit");
  int32_t failed = 0;
  args.failed = &failed;
  args.loss = const_cast<void*>(data(grad, "grad"));
  args.stats = const_cast<void*>(data(stats, "stats"));
  args.slot = plan_data(slot, "slot");
  Tensor grad_pred = empty({pred.size(0), pred.size(1)}, pred.scalar_type(), pred);
  Tensor grad_images =
      need_images ? empty({images.size(0), images.size(1), images.size(2), images.size(3), images.size(4)},
                          images.scalar_type(), images)
                  : empty({0}, images.scalar_type(), images);
  args.grad_pred = grad_pred.mutable_data_ptr();
  args.grad_images = need_images ? grad_images.mutable_data_ptr() : nullptr;
  const LossKernels& kernels = loss_kernels_chosen();
  if (packed && !need_images) {
    run(args, args.rows, kernels.patch_loss_backward_rows);
  } else {
    run(args, tokens, kernels.patch_loss_backward_tokens);
  }
  check_plan(failed);
  return {grad_pred, grad_images};
}

}  // namespace maefast::cpu
