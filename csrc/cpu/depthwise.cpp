#include "cpu/depthwise_kernel.h"

#include "cpu/host.h"
#include "cpu/ops.h"

namespace maefast::cpu {
namespace {

// Memory for the table, the taps and what else one call needs.
struct Scratch {
  std::unique_ptr<Workspace> table, taps, sums;
};

DepthwiseArgs arguments(const Tensor& x, const Tensor& neighbours, int64_t size, int32_t* failed) {
  MAEFAST_CHECK(x.dim() == 4, "depthwise: x must be [T, h, w, C]");
  MAEFAST_CHECK(size == 3 || size == 5 || size == 7, "depthwise: the kernel must have 3, 5 or 7 taps a side");
  DepthwiseArgs args{};
  args.x = data(x, "x");
  args.type = dtype_of(x);
  args.cells = x.size(0);
  args.h = x.size(1);
  args.w = x.size(2);
  args.width = x.size(3);
  args.size = size;
  args.failed = failed;
  MAEFAST_CHECK(args.h > 0 && args.w > 0 && args.width > 0, "depthwise: x must be [T, h, w, C]");
  MAEFAST_CHECK(args.cells * args.h * args.w <= INT32_MAX, "depthwise: more than 2^31 active sites");
  MAEFAST_CHECK(neighbours.dim() == 2 && neighbours.size(0) == args.cells,
                "depthwise: neighbours must be [T, (2 radius + 1)^2]");
  args.neighbours = plan_data(neighbours, "neighbours");
  while ((2 * args.radius + 1) * (2 * args.radius + 1) < neighbours.size(1)) ++args.radius;
  MAEFAST_CHECK((2 * args.radius + 1) * (2 * args.radius + 1) == neighbours.size(1) &&
                    args.radius * (args.h < args.w ? args.h : args.w) >= size / 2,
                "depthwise: the table of neighbours does not reach as far as the kernel");
  return args;
}

void find_sites(DepthwiseArgs& args, const DepthwisePlan& plan, const DepthwiseKernels& kernels,
                Scratch& scratch) {
  scratch.table = std::make_unique<Workspace>(args.cells * plan.table_row * 4);
  args.table = static_cast<int32_t*>(scratch.table->get());
  parallel_rows(args.cells, plan.table_row * 4,
                [&](int64_t begin, int64_t end) { kernels.sites(args, begin, end); });
  check_plan(*args.failed);
}

// Channels up to a whole register, for tensors that have fewer; the kernels need at least that many.
Tensor widened(const Tensor& x, int64_t lanes) {
  return torch::stable::pad(x, {0, lanes - x.size(x.dim() - 1)}, "constant", 0.0);
}
Tensor narrowed(Tensor x, int64_t width) {
  return torch::stable::clone(torch::stable::narrow(x, x.dim() - 1, 0, width));
}

int64_t lanes_of(const Tensor& x, const DepthwiseKernels& kernels) {
  DepthwiseArgs args{};
  args.type = dtype_of(x);
  args.h = args.w = args.width = 1;
  args.size = 3;
  return kernels.plan(args).lanes;
}

}  // namespace

Tensor depthwise(const Tensor& x, const Tensor& neighbours, const Tensor& weight,
                 const std::optional<Tensor>& bias, bool flip) {
  const DepthwiseKernels& kernels = depthwise_kernels_chosen();
  MAEFAST_CHECK(x.dim() == 4 && weight.dim() == 2, "depthwise: x must be [T, h, w, C], weight [k * k, C]");
  const int64_t width = x.size(3), lanes = lanes_of(x, kernels);
  if (width < lanes && width > 0) {
    std::optional<Tensor> wide_bias;
    if (bias) wide_bias = widened(*bias, lanes);
    return narrowed(depthwise(widened(x, lanes), neighbours, widened(weight, lanes), wide_bias, flip), width);
  }
  int64_t size = 3;
  while (size < 7 && size * size < weight.size(0)) size += 2;
  int32_t failed = 0;
  DepthwiseArgs args = arguments(x, neighbours, size, &failed);
  const ScalarType wide = arithmetic_type(x.scalar_type());
  MAEFAST_CHECK(weight.size(0) == size * size && weight.size(1) == width && weight.scalar_type() == wide,
                "depthwise: weight must be [k * k, C] in float32 (float64 for float64)");
  args.weight = data(weight, "weight");
  if (bias) {
    MAEFAST_CHECK(bias->numel() == width && bias->scalar_type() == wide,
                  "depthwise: bias must be [C] in float32 (float64 for float64)");
    args.bias = data(*bias, "bias");
  }
  args.flip = flip;
  Tensor y = empty({args.cells, args.h, args.w, width}, x.scalar_type(), x);
  if (args.cells == 0) return y;
  args.y = y.mutable_data_ptr();
  const DepthwisePlan plan = kernels.plan(args);
  Scratch scratch;
  find_sites(args, plan, kernels, scratch);
  const int64_t wide_size = element_size(dtype_of(wide));
  scratch.taps = std::make_unique<Workspace>(plan.taps * wide_size);
  args.taps = scratch.taps->get();
  parallel_rows(plan.groups, plan.taps / plan.groups * wide_size,
                [&](int64_t begin, int64_t end) { kernels.pack(args, begin, end); });
  const int64_t items = (args.cells + plan.chunk - 1) / plan.chunk * plan.groups;
  const int64_t work = plan.chunk * args.h * args.w * size * size * width / plan.groups * wide_size / 8;
  parallel_rows(items, work, [&](int64_t begin, int64_t end) { kernels.forward(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> depthwise_grad_weight(const Tensor& x, const Tensor& grad,
                                                 const Tensor& neighbours, int64_t size) {
  const DepthwiseKernels& kernels = depthwise_kernels_chosen();
  MAEFAST_CHECK(x.dim() == 4 && grad.dim() == 4, "depthwise_grad_weight: x and grad must be [T, h, w, C]");
  for (int i = 0; i < 4; ++i)
    MAEFAST_CHECK(x.size(i) == grad.size(i), "depthwise_grad_weight: grad must have the shape of x");
  MAEFAST_CHECK(x.scalar_type() == grad.scalar_type(),
                "depthwise_grad_weight: grad must have the dtype of x");
  const int64_t width = x.size(3), lanes = lanes_of(x, kernels);
  if (width < lanes && width > 0) {
    auto [taps, sum] = depthwise_grad_weight(widened(x, lanes), widened(grad, lanes), neighbours, size);
    return {narrowed(taps, width), narrowed(sum, width)};
  }
  int32_t failed = 0;
  DepthwiseArgs args = arguments(x, neighbours, size, &failed);
  args.grad = data(grad, "grad");
  const ScalarType wide = arithmetic_type(x.scalar_type());
  Tensor grad_weight = empty({size * size, width}, wide, x);
  Tensor grad_bias = empty({width}, wide, x);
  args.grad_weight = grad_weight.mutable_data_ptr();
  args.grad_bias = grad_bias.mutable_data_ptr();
  const DepthwisePlan plan = kernels.plan(args);
  Scratch scratch;
  find_sites(args, plan, kernels, scratch);
  // Pieces of about 256 sites or more where channels alone keep no 32 threads busy, of 4096 at most: sums
  // stay exact.
  const int64_t sites = args.cells * args.h * args.w;
  int64_t pieces = (32 + plan.grad_groups - 1) / plan.grad_groups;
  if (pieces > sites / 256) pieces = sites / 256;
  if (pieces < (sites + 4095) / 4096) pieces = (sites + 4095) / 4096;
  if (pieces > args.cells) pieces = args.cells;
  args.pieces = pieces < 1 ? 1 : pieces;
  const int64_t wide_size = element_size(dtype_of(wide));
  scratch.sums =
      std::make_unique<Workspace>(args.pieces * plan.blocks * (size * size + 1) * lanes * wide_size);
  args.sums = scratch.sums->get();
  const int64_t work = sites / args.pieces * size * size * width / plan.grad_groups * wide_size / 8;
  parallel_rows(args.pieces * plan.grad_groups, work, [&](int64_t begin, int64_t end) {
    const Workspace scratch_of_thread(plan.work);
    kernels.grad_weight(args, begin, end, scratch_of_thread.get());
  });
  parallel_rows(size * size + 1, args.pieces * plan.blocks * lanes * wide_size,
                [&](int64_t begin, int64_t end) { kernels.grad_weight_finish(args, begin, end); });
  return {grad_weight, grad_bias};
}

}  // namespace maefast::cpu
