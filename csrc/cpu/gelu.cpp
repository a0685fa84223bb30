#include "cpu/gelu_kernel.h"

#include "cpu/host.h"
#include "cpu/ops.h"

namespace maefast::cpu {

namespace {

const void* bias_data(const std::optional<Tensor>& bias, const Tensor& x) {
  if (!bias) return nullptr;
  MAEFAST_CHECK(bias->numel() == x.size(1) && bias->scalar_type() == arithmetic_type(x.scalar_type()),
                "bias_gelu: bias must be [D] in float32 (float64 for float64)");
  return data(*bias, "bias");
}

}  // namespace

Tensor bias_gelu(const Tensor& x, const std::optional<Tensor>& bias, bool tanh) {
  MAEFAST_CHECK(x.dim() == 2, "bias_gelu: x must be [R, D]");
  Tensor out = empty({x.size(0), x.size(1)}, x.scalar_type(), x);
  const GeluArgs args{data(x, "x"), bias_data(bias, x), out.mutable_data_ptr(), x.size(1), tanh, dtype_of(x)};
  const auto kernel = gelu_kernels_chosen().bias_gelu;
  parallel_rows(x.size(0), args.width * element_size(args.type),
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> bias_gelu_backward(const Tensor& grad, const Tensor& x,
                                                      const std::optional<Tensor>& bias, bool tanh,
                                                      bool need_bias, bool need_out) {
  MAEFAST_CHECK(x.dim() == 2 && grad.dim() == 2 && grad.size(0) == x.size(0) && grad.size(1) == x.size(1) &&
                    grad.scalar_type() == x.scalar_type(),
                "bias_gelu_backward: grad must be like x, [R, D]");
  const int64_t rows = x.size(0), width = x.size(1);
  Tensor grad_x = empty({rows, width}, x.scalar_type(), x);
  Tensor grad_bias = empty({need_bias ? width : 0}, arithmetic_type(x.scalar_type()), x);
  Tensor out = empty({need_out ? rows : 0, width}, x.scalar_type(), x);
  GeluBackwardArgs args;
  args.out = need_out ? out.mutable_data_ptr() : nullptr;
  args.grad = data(grad, "grad");
  args.x = data(x, "x");
  args.bias = bias_data(bias, x);
  args.grad_x = grad_x.mutable_data_ptr();
  args.rows = rows;
  args.width = width;
  args.units = row_units(rows);
  args.tanh = tanh;
  args.type = dtype_of(x);
  std::optional<Sums> sums;
  args.bias_sums = nullptr;
  if (need_bias) {
    sums.emplace(grad_bias, 1, width, args.units);
    args.bias_sums = sums->at(0, width);
  }
  const GeluKernels& kernels = gelu_kernels_chosen();
  parallel_rows(args.units, 2 * (rows / args.units + 1) * width * element_size(args.type),
                [&](int64_t begin, int64_t end) { kernels.bias_gelu_backward(args, begin, end); });
  if (sums) sums->finish(kernels.sum_pieces);
  return {grad_x, grad_bias, out};
}

}  // namespace maefast::cpu
