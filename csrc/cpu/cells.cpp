#include "cpu/cells_kernel.h"
#include "cpu/host.h"
#include "cpu/ops.h"

namespace maefast::cpu {

Tensor pack_cells(const Tensor& x, const Tensor& cells, const std::vector<int64_t>& grid,
                  bool channels_last) {
  MAEFAST_CHECK(x.dim() == 4 && grid.size() == 2 && grid[0] > 0 && grid[1] > 0,
                "pack_cells: x must be a map of four dimensions and grid [GH, GW]");
  const int64_t height = x.size(channels_last ? 1 : 2);
  const int64_t width = x.size(channels_last ? 2 : 3);
  MAEFAST_CHECK(height % grid[0] == 0 && width % grid[1] == 0,
                "pack_cells: the map is no multiple of the grid");
  int32_t failed = 0;
  CellsArgs args{};
  args.rows = grid[0];
  args.columns = grid[1];
  args.h = height / grid[0];
  args.w = width / grid[1];
  args.channels = x.size(channels_last ? 3 : 1);
  args.limit = x.size(0) * grid[0] * grid[1];
  args.channels_last = channels_last;
  args.bytes = element_size(dtype_of(x));
  args.in = data(x, "x");
  args.index = plan_data(cells, "cells");
  args.failed = &failed;
  Tensor out = empty({cells.numel(), args.h, args.w, args.channels}, x.scalar_type(), x);
  args.out = out.mutable_data_ptr();
  const auto kernel = cells_kernels_chosen().pack_cells;
  parallel_rows(cells.numel() * args.h, args.w * args.channels * args.bytes,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  check_plan(failed);
  return out;
}

Tensor unpack_cells(const Tensor& x, const Tensor& slot, const std::vector<int64_t>& grid,
                    const std::optional<Tensor>& fill, bool channels_last) {
  MAEFAST_CHECK(x.dim() == 4 && grid.size() == 3 && slot.numel() == grid[0] * grid[1] * grid[2],
                "unpack_cells: x must be [T, h, w, C], slot [B * GH * GW] and grid [B, GH, GW]");
  int32_t failed = 0;
  CellsArgs args{};
  args.rows = grid[1];
  args.columns = grid[2];
  args.h = x.size(1);
  args.w = x.size(2);
  args.channels = x.size(3);
  args.limit = x.size(0);
  args.channels_last = channels_last;
  args.bytes = element_size(dtype_of(x));
  args.in = data(x, "x");
  args.index = plan_data(slot, "slot");
  args.failed = &failed;
  if (fill) {
    MAEFAST_CHECK(fill->numel() == args.channels && fill->scalar_type() == x.scalar_type(),
                  "unpack_cells: fill must be [C] in x's dtype");
    args.fill = data(*fill, "fill");
  }
  const int64_t height = args.rows * args.h;
  const int64_t width = args.columns * args.w;
  Tensor out = channels_last ? empty({grid[0], height, width, args.channels}, x.scalar_type(), x)
                             : empty({grid[0], args.channels, height, width}, x.scalar_type(), x);
  args.out = out.mutable_data_ptr();
  const auto kernel = cells_kernels_chosen().unpack_cells;
  parallel_rows(grid[0] * height, width * args.channels * args.bytes,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  check_plan(failed);
  return out;
}

Tensor fill_sum(const Tensor& grad, const Tensor& slot, const std::vector<int64_t>& grid) {
  MAEFAST_CHECK(grad.dim() == 4 && grid.size() == 3 && slot.numel() == grid[0] * grid[1] * grid[2] &&
                    grad.size(0) == grid[0] && grad.size(1) % grid[1] == 0 && grad.size(2) % grid[2] == 0,
                "fill_sum: grad must be [B, H, W, C], slot [B * GH * GW] and grid [B, GH, GW]");
  FillSumArgs args{};
  args.grad = data(grad, "grad");
  args.slot = plan_data(slot, "slot");
  args.map_rows = grid[0] * grad.size(1);
  args.columns = grid[2];
  args.h = grad.size(1) / grid[1];
  args.w = grad.size(2) / grid[2];
  args.channels = grad.size(3);
  args.units = row_units(args.map_rows);
  args.type = dtype_of(grad);
  const ScalarType wide = arithmetic_type(grad.scalar_type());
  Tensor out = empty({args.channels}, wide, grad);
  const CellsKernels& kernels = cells_kernels_chosen();
  const Sums sums(out, 1, args.channels, args.units);
  args.sums = sums.at(0, args.channels);
  parallel_rows(args.units,
                args.map_rows * grad.size(2) * args.channels * element_size(args.type) / args.units,
                [&](int64_t begin, int64_t end) { kernels.fill_sum(args, begin, end); });
  sums.finish(kernels.sum_pieces);
  return out;
}

}  // namespace maefast::cpu
