#include "cpu/host.h"
#include "cpu/ops.h"
#include "cpu/sparse_conv_kernel.h"

namespace maefast::cpu {
namespace {

// 2 radius + 1 of a neighbour table [T, (2 radius + 1)^2].
int64_t reach_of(const Tensor& neighbours) {
  MAEFAST_CHECK(neighbours.dim() == 2, "neighbours must be [T, (2 radius + 1)^2]");
  int64_t reach = 1;
  while (reach < kMaxReach && reach * reach < neighbours.size(1)) reach += 2;
  MAEFAST_CHECK(reach * reach == neighbours.size(1),
                "neighbours must be [T, (2 radius + 1)^2] with radius <= 7");
  return reach;
}

// A frame that reaches no further than the table.
HaloArgs halo_args(const Tensor& neighbours, const std::vector<int64_t>& halo, int64_t height,
                   int64_t width) {
  MAEFAST_CHECK(halo.size() == 4 && height > 0 && width > 0, "halo must be [top, left, bottom, right]");
  HaloArgs args;
  args.neighbours = plan_data(neighbours, "neighbours");
  args.cells = neighbours.size(0);
  args.reach = reach_of(neighbours);
  args.height = height;
  args.width = width;
  args.top = halo[0];
  args.left = halo[1];
  args.bottom = halo[2];
  args.right = halo[3];
  for (int64_t k = 0; k < 4; ++k) {
    MAEFAST_CHECK(halo[k] >= 0 && halo[k] <= args.reach / 2 * (k % 2 == 0 ? height : width),
                  "the halo reaches beyond the neighbour table");
  }
  return args;
}

TapsArgs taps_args(const Tensor& neighbours, int64_t height, int64_t width,
                   const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  TapsArgs args;
  args.neighbours = plan_data(neighbours, "neighbours");
  args.cells = neighbours.size(0);
  args.reach = reach_of(neighbours);
  args.height = height;
  args.width = width;
  const std::vector<int64_t>* const parts[] = {&kernel, &stride, &padding, &dilation};
  for (const auto* part : parts) MAEFAST_CHECK(part->size() == 2, "a window has two dimensions");
  int64_t taps = 1;
  for (int64_t k = 0; k < 2; ++k) {
    const int64_t size = k == 0 ? height : width, most = args.reach / 2 * size;
    const int64_t span = dilation[k] * (kernel[k] - 1) + 1;
    MAEFAST_CHECK(size > 0 && kernel[k] > 0 && stride[k] > 0 && size % stride[k] == 0 && dilation[k] > 0,
                  "a cell must be a multiple of the stride");
    MAEFAST_CHECK(padding[k] >= 0 && padding[k] <= most && span - padding[k] - stride[k] <= most &&
                      2 * padding[k] < span && 2 * padding[k] + stride[k] >= span,
                  "the window reaches beyond the neighbour table");
    args.window.kernel[k] = kernel[k];
    args.window.stride[k] = stride[k];
    args.window.padding[k] = padding[k];
    args.window.dilation[k] = dilation[k];
    taps *= kernel[k];
  }
  MAEFAST_CHECK(taps <= kMaxReach * kMaxReach, "a window of more than 225 taps");
  return args;
}

}  // namespace

Tensor halo_cells(const Tensor& x, const Tensor& neighbours, const std::vector<int64_t>& halo) {
  MAEFAST_CHECK(x.dim() == 4 && x.size(0) == neighbours.size(0), "halo_cells: x must be [T, h, w, C]");
  HaloArgs args = halo_args(neighbours, halo, x.size(1), x.size(2));
  const int64_t lines = args.top + args.height + args.bottom, sites = args.left + args.width + args.right;
  int32_t failed = 0;
  args.channels = x.size(3);
  args.type = dtype_of(x);
  args.src = data(x, "x");
  args.failed = &failed;
  Tensor out = empty({args.cells, lines, sites, args.channels}, x.scalar_type(), x);
  args.dst = out.mutable_data_ptr();
  const auto kernel = sparse_conv_kernels_chosen().halo;
  parallel_rows(args.cells * lines, 2 * sites * args.channels * element_size(args.type),
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  check_plan(failed);
  return out;
}

Tensor halo_cells_backward(const Tensor& grad, const Tensor& neighbours, const std::vector<int64_t>& halo) {
  MAEFAST_CHECK(grad.dim() == 4 && grad.size(0) == neighbours.size(0) && halo.size() == 4,
                "halo_cells_backward: grad must be [T, top + h + bottom, left + w + right, C]");
  HaloArgs args =
      halo_args(neighbours, halo, grad.size(1) - halo[0] - halo[2], grad.size(2) - halo[1] - halo[3]);
  int32_t failed = 0;
  args.channels = grad.size(3);
  args.type = dtype_of(grad);
  args.src = data(grad, "grad");
  args.failed = &failed;
  Tensor out = empty({args.cells, args.height, args.width, args.channels}, grad.scalar_type(), grad);
  args.dst = out.mutable_data_ptr();
  const auto kernel = sparse_conv_kernels_chosen().halo_backward;
  parallel_rows(args.cells * args.height, 3 * args.width * args.channels * element_size(args.type),
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  check_plan(failed);
  return out;
}

Tensor gather_taps(const Tensor& x, const Tensor& neighbours, const std::vector<int64_t>& kernel,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation) {
  MAEFAST_CHECK(x.dim() == 4, "gather_taps: x must be [T, h, w, C]");
  TapsArgs args = taps_args(neighbours, x.size(1), x.size(2), kernel, stride, padding, dilation);
  const int64_t rows = args.cells;  // of the table, which may be a part of the cells' own
  args.cells = x.size(0);
  const int64_t lines = args.height / stride[0], sites = args.width / stride[1];
  int32_t failed = 0;
  args.channels = x.size(3);
  args.type = dtype_of(x);
  args.src = data(x, "x");
  args.failed = &failed;
  const int64_t row = kernel[0] * kernel[1] * args.channels;
  Tensor out = empty({rows * lines * sites, row}, x.scalar_type(), x);
  args.dst = out.mutable_data_ptr();
  const auto run = sparse_conv_kernels_chosen().taps;
  parallel_rows(rows * lines, 2 * sites * row * element_size(args.type),
                [&](int64_t begin, int64_t end) { run(args, begin, end); });
  check_plan(failed);
  return out;
}

Tensor gather_taps_backward(const Tensor& grad, const Tensor& neighbours, const std::vector<int64_t>& size,
                            const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                            const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  MAEFAST_CHECK(size.size() == 3, "gather_taps_backward: size must be [h, w, C]");
  TapsArgs args = taps_args(neighbours, size[0], size[1], kernel, stride, padding, dilation);
  const int64_t rows = args.cells * (args.height / stride[0]) * (args.width / stride[1]);
  MAEFAST_CHECK(grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == kernel[0] * kernel[1] * size[2],
                "gather_taps_backward: grad must be [T * h / sh * w / sw, kh * kw * C]");
  int32_t failed = 0;
  args.channels = size[2];
  args.type = dtype_of(grad);
  args.src = data(grad, "grad");
  args.failed = &failed;
  Tensor out = empty({args.cells, args.height, args.width, args.channels}, grad.scalar_type(), grad);
  args.dst = out.mutable_data_ptr();
  const auto run = sparse_conv_kernels_chosen().taps_backward;
  const int64_t taps = kernel[0] * kernel[1] / (stride[0] * stride[1]) + 2;
  parallel_rows(args.cells * args.height, taps * args.width * args.channels * element_size(args.type),
                [&](int64_t begin, int64_t end) { run(args, begin, end); });
  check_plan(failed);
  return out;
}

}  // namespace maefast::cpu
