#include "cpu/host.h"
#include "cpu/ops.h"
#include "cpu/sparse_conv_kernel.h"

namespace maefast::cpu {
namespace {

using Sizes = std::vector<int64_t>;

// Cells of `size`, [h, w] or [d, h, w], and their table [T, (2 radius + 1)^n].
void set_table(CellTable& args, const Tensor& neighbours, const Sizes& size) {
  const bool solid = size.size() == 3;
  const int64_t most = solid ? kMaxReach3d : kMaxReach;
  MAEFAST_CHECK(neighbours.dim() == 2, "neighbours must be [T, (2 radius + 1)^n], n the sides of a cell");
  int64_t reach = 1;
  const auto around = [&] { return reach * reach * (solid ? reach : 1); };
  while (reach < most && around() < neighbours.size(1)) reach += 2;
  MAEFAST_CHECK(around() == neighbours.size(1),
                "neighbours must be [T, (2 radius + 1)^n] with radius <= 7, or 3 where cells have depth");
  args.neighbours = plan_data(neighbours, "neighbours");
  args.cells = neighbours.size(0);
  args.reach = reach;
  args.planes = solid ? reach : 1;
  args.depth = solid ? size[0] : 1;
  args.height = size[size.size() - 2];
  args.width = size[size.size() - 1];
  MAEFAST_CHECK(args.depth > 0 && args.height > 0 && args.width > 0, "cells must have sites");
}

bool is_cells(const Tensor& x) {
  return x.dim() == 4 || x.dim() == 5;
}

// The sides of cells [T, (d,) h, w, C].
Sizes sides_of(const Tensor& x) {
  Sizes sides;
  for (int64_t k = 1; k + 1 < x.dim(); ++k) sides.push_back(x.size(k));
  return sides;
}

// [first, sides..., C].
Sizes shape_of(int64_t first, const Sizes& sides, int64_t channels) {
  Sizes shape{first};
  shape.insert(shape.end(), sides.begin(), sides.end());
  shape.push_back(channels);
  return shape;
}

// A frame that reaches no further than the table. halo: what stands before each side, then what stands
// behind.
HaloArgs halo_args(const Tensor& neighbours, const Sizes& halo, const Sizes& size) {
  const size_t sides = size.size();
  MAEFAST_CHECK(halo.size() == 2 * sides,
                "halo must be [top, left, bottom, right], with front and back of volumes");
  HaloArgs args;
  set_table(args, neighbours, size);
  for (size_t k = 0; k < 2 * sides; ++k) {
    MAEFAST_CHECK(halo[k] >= 0 && halo[k] <= args.reach / 2 * size[k % sides],
                  "the halo reaches beyond the neighbour table");
  }
  args.front = sides == 3 ? halo[0] : 0;
  args.top = halo[sides - 2];
  args.left = halo[sides - 1];
  args.back = sides == 3 ? halo[3] : 0;
  args.bottom = halo[2 * sides - 2];
  args.right = halo[2 * sides - 1];
  return args;
}

TapsArgs taps_args(const Tensor& neighbours, const Sizes& size, const Sizes& kernel, const Sizes& stride,
                   const Sizes& padding, const Sizes& dilation) {
  const size_t sides = size.size();
  for (const Sizes* part : {&kernel, &stride, &padding, &dilation})
    MAEFAST_CHECK(part->size() == sides, "a window has as many sides as a cell");
  TapsArgs args;
  set_table(args, neighbours, size);
  args.window = {{1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
  int64_t taps = 1;
  for (size_t k = 0; k < sides; ++k) {
    const size_t to = k + 3 - sides;
    const int64_t most = args.reach / 2 * size[k], span = dilation[k] * (kernel[k] - 1) + 1;
    MAEFAST_CHECK(kernel[k] > 0 && stride[k] > 0 && size[k] % stride[k] == 0 && dilation[k] > 0,
                  "a cell must be a multiple of the stride");
    MAEFAST_CHECK(padding[k] >= 0 && padding[k] <= most && span - padding[k] - stride[k] <= most &&
                      2 * padding[k] < span && 2 * padding[k] + stride[k] >= span,
                  "the window reaches beyond the neighbour table");
    args.window.kernel[to] = kernel[k];
    args.window.stride[to] = stride[k];
    args.window.padding[to] = padding[k];
    args.window.dilation[to] = dilation[k];
    MAEFAST_CHECK(kernel[k] <= kMaxAround, "a window of too many taps");
    taps *= kernel[k];
  }
  MAEFAST_CHECK(taps <= (sides == 3 ? kMaxAround : kMaxReach * kMaxReach),
                "a window of more than 225 taps, or 343 in volumes");
  return args;
}

// Lines of outputs of a cell.
int64_t lines_of(const TapsArgs& args) {
  return args.depth / args.window.stride[0] * (args.height / args.window.stride[1]);
}

int64_t taps_of(const TapsArgs& args) {
  return args.window.kernel[0] * args.window.kernel[1] * args.window.kernel[2];
}

}  // namespace

Tensor halo_cells(const Tensor& x, const Tensor& neighbours, const Sizes& halo) {
  MAEFAST_CHECK(is_cells(x) && x.size(0) == neighbours.size(0),
                "halo_cells: x must be [T, h, w, C] or [T, d, h, w, C]");
  Sizes sides = sides_of(x);
  HaloArgs args = halo_args(neighbours, halo, sides);
  for (size_t k = 0; k < sides.size(); ++k) sides[k] += halo[k] + halo[sides.size() + k];
  const int64_t lines = (args.front + args.depth + args.back) * (args.top + args.height + args.bottom);
  const int64_t sites = args.left + args.width + args.right;
  int32_t failed = 0;
  args.channels = x.size(x.dim() - 1);
  args.type = dtype_of(x);
  args.src = data(x, "x");
  args.failed = &failed;
  Tensor out = empty(shape_of(args.cells, sides, args.channels), x.scalar_type(), x);
  args.dst = out.mutable_data_ptr();
  const auto kernel = sparse_conv_kernels_chosen().halo;
  parallel_rows(args.cells * lines, 2 * sites * args.channels * element_size(args.type),
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  check_plan(failed);
  return out;
}

Tensor halo_cells_backward(const Tensor& grad, const Tensor& neighbours, const Sizes& halo) {
  MAEFAST_CHECK(
      is_cells(grad) && grad.size(0) == neighbours.size(0) &&
          static_cast<int64_t>(halo.size()) == 2 * (grad.dim() - 2),
      "halo_cells_backward: grad must be [T, top + h + bottom, left + w + right, C], volumes with depth");
  Sizes sides = sides_of(grad);
  for (size_t k = 0; k < sides.size(); ++k) sides[k] -= halo[k] + halo[sides.size() + k];
  HaloArgs args = halo_args(neighbours, halo, sides);
  int32_t failed = 0;
  args.channels = grad.size(grad.dim() - 1);
  args.type = dtype_of(grad);
  args.src = data(grad, "grad");
  args.failed = &failed;
  Tensor out = empty(shape_of(args.cells, sides, args.channels), grad.scalar_type(), grad);
  args.dst = out.mutable_data_ptr();
  const auto kernel = sparse_conv_kernels_chosen().halo_backward;
  parallel_rows(args.cells * args.depth * args.height,
                3 * args.width * args.channels * element_size(args.type),
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  check_plan(failed);
  return out;
}

Tensor gather_taps(const Tensor& x, const Tensor& neighbours, const Sizes& kernel, const Sizes& stride,
                   const Sizes& padding, const Sizes& dilation) {
  MAEFAST_CHECK(is_cells(x), "gather_taps: x must be [T, h, w, C] or [T, d, h, w, C]");
  TapsArgs args = taps_args(neighbours, sides_of(x), kernel, stride, padding, dilation);
  const int64_t rows = args.cells;  // of the table, which may be a part of the cells' own
  args.cells = x.size(0);
  const int64_t lines = lines_of(args), sites = args.width / args.window.stride[2];
  int32_t failed = 0;
  args.channels = x.size(x.dim() - 1);
  args.type = dtype_of(x);
  args.src = data(x, "x");
  args.failed = &failed;
  const int64_t row = taps_of(args) * args.channels;
  Tensor out = empty({rows * lines * sites, row}, x.scalar_type(), x);
  args.dst = out.mutable_data_ptr();
  const auto run = sparse_conv_kernels_chosen().taps;
  parallel_rows(rows * lines, 2 * sites * row * element_size(args.type),
                [&](int64_t begin, int64_t end) { run(args, begin, end); });
  check_plan(failed);
  return out;
}

Tensor gather_taps_backward(const Tensor& grad, const Tensor& neighbours, const Sizes& size,
                            const Sizes& kernel, const Sizes& stride, const Sizes& padding,
                            const Sizes& dilation) {
  MAEFAST_CHECK(size.size() == 3 || size.size() == 4,
                "gather_taps_backward: size must be [h, w, C] or [d, h, w, C]");
  const Sizes sides(size.begin(), size.end() - 1);
  TapsArgs args = taps_args(neighbours, sides, kernel, stride, padding, dilation);
  args.channels = size.back();
  const int64_t rows = args.cells * lines_of(args) * (args.width / args.window.stride[2]);
  MAEFAST_CHECK(grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == taps_of(args) * args.channels,
                "gather_taps_backward: grad must be [T * outputs of a cell, taps * C]");
  int32_t failed = 0;
  args.type = dtype_of(grad);
  args.src = data(grad, "grad");
  args.failed = &failed;
  Tensor out = empty(shape_of(args.cells, sides, args.channels), grad.scalar_type(), grad);
  args.dst = out.mutable_data_ptr();
  const auto run = sparse_conv_kernels_chosen().taps_backward;
  const int64_t* s = args.window.stride;
  const int64_t taps = taps_of(args) / (s[0] * s[1] * s[2]) + 2;
  parallel_rows(args.cells * args.depth * args.height,
                taps * args.width * args.channels * element_size(args.type),
                [&](int64_t begin, int64_t end) { run(args, begin, end); });
  check_plan(failed);
  return out;
}

}  // namespace maefast::cpu
