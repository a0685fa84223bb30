#include "cpu/cells_kernel.h"
#include "cpu/host.h"
#include "cpu/ops.h"

namespace maefast::cpu {

namespace {

// A flat map is a volume of depth one.
struct Sides {
  int64_t depth, height, width;
};

Sides sides_of(const Tensor& x, bool channels_last) {
  const int64_t end = channels_last ? x.dim() - 1 : x.dim();
  return {x.dim() == 5 ? x.size(end - 3) : 1, x.size(end - 2), x.size(end - 1)};
}

Sides sides_of(const std::vector<int64_t>& grid) {
  const size_t end = grid.size();
  return {end == 3 ? grid[0] : 1, grid[end - 2], grid[end - 1]};
}

// [B, (D,) H, W] or [T, (d,) h, w] with the channels where they belong.
std::vector<int64_t> shape_of(int64_t count, bool solid, const Sides& s, int64_t channels,
                              bool channels_last) {
  std::vector<int64_t> shape{count};
  if (!channels_last) shape.push_back(channels);
  if (solid) shape.push_back(s.depth);
  shape.push_back(s.height);
  shape.push_back(s.width);
  if (channels_last) shape.push_back(channels);
  return shape;
}

bool divides(const Sides& grid, const Sides& map) {
  return grid.depth > 0 && grid.height > 0 && grid.width > 0 && map.depth % grid.depth == 0 &&
         map.height % grid.height == 0 && map.width % grid.width == 0;
}

// [B, (GD,) GH, GW], for as many cells as there are slots.
Sides checked_grid(const char* op, const Tensor& x, const Tensor& slot, const std::vector<int64_t>& grid) {
  MAEFAST_CHECK((x.dim() == 4 || x.dim() == 5) && static_cast<int64_t>(grid.size()) == x.dim() - 1, op,
                ": grid must be [B, GH, GW], or [B, GD, GH, GW] for volumes");
  const Sides g = sides_of(std::vector<int64_t>(grid.begin() + 1, grid.end()));
  MAEFAST_CHECK(g.depth > 0 && g.height > 0 && g.width > 0 && grid[0] >= 0 &&
                    slot.numel() == grid[0] * g.depth * g.height * g.width,
                op, ": slot must be [B * cells of the grid]");
  return g;
}

void set_grid(CellsArgs& args, const Sides& grid) {
  args.planes = grid.depth;
  args.rows = grid.height;
  args.columns = grid.width;
}

}  // namespace

Tensor pack_cells(const Tensor& x, const Tensor& cells, const std::vector<int64_t>& grid,
                  bool channels_last) {
  MAEFAST_CHECK(
      (x.dim() == 4 || x.dim() == 5) && static_cast<int64_t>(grid.size()) == x.dim() - 2,
      "pack_cells: x must be a map of four dimensions and grid [GH, GW], or of five and [GD, GH, GW]");
  const Sides g = sides_of(grid), map = sides_of(x, channels_last);
  MAEFAST_CHECK(divides(g, map), "pack_cells: the map is no multiple of the grid");
  int32_t failed = 0;
  CellsArgs args{};
  set_grid(args, g);
  args.d = map.depth / g.depth;
  args.h = map.height / g.height;
  args.w = map.width / g.width;
  args.channels = x.size(channels_last ? x.dim() - 1 : 1);
  args.limit = x.size(0) * g.depth * g.height * g.width;
  args.channels_last = channels_last;
  args.bytes = element_size(dtype_of(x));
  args.in = data(x, "x");
  args.index = plan_data(cells, "cells");
  args.failed = &failed;
  const Sides cell{args.d, args.h, args.w};
  Tensor out = empty(shape_of(cells.numel(), x.dim() == 5, cell, args.channels, true), x.scalar_type(), x);
  args.out = out.mutable_data_ptr();
  const auto kernel = cells_kernels_chosen().pack_cells;
  parallel_rows(cells.numel() * args.d * args.h, args.w * args.channels * args.bytes,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  check_plan(failed);
  return out;
}

Tensor unpack_cells(const Tensor& x, const Tensor& slot, const std::vector<int64_t>& grid,
                    const std::optional<Tensor>& fill, bool channels_last) {
  const Sides g = checked_grid("unpack_cells", x, slot, grid), cell = sides_of(x, true);
  int32_t failed = 0;
  CellsArgs args{};
  set_grid(args, g);
  args.d = cell.depth;
  args.h = cell.height;
  args.w = cell.width;
  args.channels = x.size(x.dim() - 1);
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
  const Sides map{g.depth * args.d, g.height * args.h, g.width * args.w};
  Tensor out = empty(shape_of(grid[0], x.dim() == 5, map, args.channels, channels_last), x.scalar_type(), x);
  args.out = out.mutable_data_ptr();
  const auto kernel = cells_kernels_chosen().unpack_cells;
  parallel_rows(grid[0] * map.depth * map.height, map.width * args.channels * args.bytes,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  check_plan(failed);
  return out;
}

Tensor fill_sum(const Tensor& grad, const Tensor& slot, const std::vector<int64_t>& grid) {
  const Sides g = checked_grid("fill_sum", grad, slot, grid), map = sides_of(grad, true);
  MAEFAST_CHECK(grad.size(0) == grid[0] && divides(g, map),
                "fill_sum: grad must be a map [B, H, W, C] or [B, D, H, W, C], a multiple of the grid");
  FillSumArgs args{};
  args.grad = data(grad, "grad");
  args.slot = plan_data(slot, "slot");
  args.map_rows = grid[0] * map.depth * map.height;
  args.rows = g.height;
  args.columns = g.width;
  args.d = map.depth / g.depth;
  args.h = map.height / g.height;
  args.w = map.width / g.width;
  args.channels = grad.size(grad.dim() - 1);
  args.units = row_units(args.map_rows);
  args.type = dtype_of(grad);
  const ScalarType wide = arithmetic_type(grad.scalar_type());
  Tensor out = empty({args.channels}, wide, grad);
  const CellsKernels& kernels = cells_kernels_chosen();
  const Sums sums(out, 1, args.channels, args.units);
  args.sums = sums.at(0, args.channels);
  parallel_rows(args.units, args.map_rows * map.width * args.channels * element_size(args.type) / args.units,
                [&](int64_t begin, int64_t end) { kernels.fill_sum(args, begin, end); });
  sums.finish(kernels.sum_pieces);
  return out;
}

}  // namespace maefast::cpu
