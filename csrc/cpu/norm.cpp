#include "cpu/host.h"
#include "cpu/norm_kernel.h"
#include "cpu/ops.h"

namespace maefast::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm(const Tensor& x, const std::optional<Tensor>& delta,
                                                    const Tensor& weight, const Tensor& bias, double eps,
                                                    ScalarType dtype, const std::optional<Tensor>& shift) {
  MAEFAST_CHECK(x.dim() == 2, "add_norm: x must be [R, D]");
  const int64_t rows = x.size(0), width = x.size(1);
  const ScalarType wide = arithmetic_type(x.scalar_type());
  MAEFAST_CHECK(weight.numel() == width && bias.numel() == width && weight.scalar_type() == wide &&
                    bias.scalar_type() == wide,
                "add_norm: weight and bias must be [D] in float32 (float64 for float64)");
  AddNormArgs args;
  args.x = data(x, "x");
  args.x_type = args.delta_type = dtype_of(x);
  args.y_type = dtype_of(dtype);
  args.delta = args.shift = nullptr;
  if (shift) {
    MAEFAST_CHECK(delta && shift->numel() == width && shift->scalar_type() == wide,
                  "add_norm: shift must be [D] like weight, beside delta");
    args.shift = data(*shift, "shift");
  }
  if (delta) {
    MAEFAST_CHECK(delta->dim() == 2 && delta->size(0) == rows && delta->size(1) == width,
                  "add_norm: delta must have the shape of x");
    args.delta = data(*delta, "delta");
    args.delta_type = dtype_of(*delta);
  }
  MAEFAST_CHECK(widens(args.delta_type, args.x_type) && widens(args.y_type, args.x_type),
                "add_norm: delta and y must have x's dtype, or 16 bits beside float32");
  args.weight = data(weight, "weight");
  args.bias = data(bias, "bias");
  args.width = width;
  args.eps = eps;
  Tensor residual = delta ? empty({rows, width}, x.scalar_type(), x) : empty({0}, x.scalar_type(), x);
  Tensor y = empty({rows, width}, dtype, x);
  Tensor mean = empty({rows}, wide, x);
  Tensor rstd = empty({rows}, wide, x);
  args.residual = residual.mutable_data_ptr();
  args.y = y.mutable_data_ptr();
  args.mean = mean.mutable_data_ptr();
  args.rstd = rstd.mutable_data_ptr();
  const auto kernel = norm_kernels_chosen().add_norm;
  parallel_rows(rows, 2 * width * element_size(args.x_type),
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {residual, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_backward(
    const Tensor& grad_y, const std::optional<Tensor>& grad_residual, const Tensor& residual,
    const Tensor& mean, const Tensor& rstd, const Tensor& weight, bool need_weight,
    const std::optional<Tensor>& bias, std::optional<ScalarType> delta_dtype, bool need_shift) {
  MAEFAST_CHECK(residual.dim() == 2, "add_norm_backward: residual must be [R, D]");
  const int64_t rows = residual.size(0), width = residual.size(1);
  MAEFAST_CHECK(grad_y.numel() == rows * width && mean.numel() == rows && rstd.numel() == rows &&
                    weight.numel() == width,
                "add_norm_backward: sizes do not fit");
  const ScalarType wide = arithmetic_type(residual.scalar_type());
  MAEFAST_CHECK(weight.scalar_type() == wide && mean.scalar_type() == wide && rstd.scalar_type() == wide,
                "add_norm_backward: weight, mean and rstd must be float32 (float64 for float64)");
  AddNormBackwardArgs args;
  args.grad_y = data(grad_y, "grad_y");
  args.residual = data(residual, "residual");
  args.mean = data(mean, "mean");
  args.rstd = data(rstd, "rstd");
  args.weight = data(weight, "weight");
  args.grad_residual = nullptr;
  if (grad_residual) {
    MAEFAST_CHECK(
        grad_residual->numel() == rows * width && grad_residual->scalar_type() == residual.scalar_type(),
        "add_norm_backward: grad_residual must be like residual");
    args.grad_residual = data(*grad_residual, "grad_residual");
  }
  args.rows = rows;
  args.width = width;
  args.units = row_units(rows);
  args.x_type = dtype_of(residual);
  args.y_type = dtype_of(grad_y);
  MAEFAST_CHECK(widens(args.y_type, args.x_type), "add_norm_backward: dtypes do not fit");
  Tensor grad_x = empty({rows, width}, residual.scalar_type(), residual);
  args.grad_x = grad_x.mutable_data_ptr();
  // The sums for weight and bias come with that for the shift: the pass makes all of them.
  args.tables = need_shift ? 3 : need_weight ? 2 : 0;
  Tensor tables = empty({args.tables, width}, wide, residual);
  std::optional<Sums> sums;
  args.sums = nullptr;
  if (args.tables) {
    sums.emplace(tables, args.tables, width, args.units);
    args.sums = sums->at(0, width);
  }
  const bool narrow = delta_dtype && dtype_of(*delta_dtype) != args.x_type;
  args.delta_type = narrow ? dtype_of(*delta_dtype) : args.x_type;
  MAEFAST_CHECK(widens(args.delta_type, args.x_type), "add_norm_backward: dtype of delta does not fit");
  Tensor grad_delta =
      empty({narrow ? rows : 0, width}, narrow ? *delta_dtype : residual.scalar_type(), residual);
  args.grad_delta = narrow ? grad_delta.mutable_data_ptr() : nullptr;
  Tensor y = empty({bias ? rows : 0, width}, grad_y.scalar_type(), grad_y);
  args.bias = nullptr;
  args.y = nullptr;
  if (bias) {
    MAEFAST_CHECK(bias->numel() == width && bias->scalar_type() == wide,
                  "add_norm_backward: bias must be like weight");
    args.bias = data(*bias, "bias");
    args.y = y.mutable_data_ptr();
  }
  const NormKernels& kernels = norm_kernels_chosen();
  parallel_rows(args.units, 3 * (rows / args.units + 1) * width * element_size(args.x_type),
                [&](int64_t begin, int64_t end) { kernels.add_norm_backward(args, begin, end); });
  if (sums) sums->finish(kernels.sum_pieces);
  return {grad_x, tables, grad_delta, y};
}

}  // namespace maefast::cpu
