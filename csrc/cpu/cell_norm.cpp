#include "cpu/cell_norm_kernel.h"
#include "cpu/host.h"
#include "cpu/ops.h"

namespace maefast::cpu {
namespace {

Segments segments_of(const char* op, const Tensor& x, const std::optional<Tensor>& cu, int64_t sites) {
  MAEFAST_CHECK(x.dim() == 2 && x.size(1) > 0, op, ": x must be [R, C]");
  const int64_t rows = x.size(0);
  // Enough units for many threads, none shorter than a block of rows on average; from the sizes alone.
  constexpr int64_t kUnits = 64;
  constexpr int64_t kRows = 128;
  const auto pieces_of = [&](int64_t count) {
    const int64_t wanted = (kUnits + count - 1) / count, most = rows / count / kRows;
    return most < 1 ? 1 : wanted < most ? wanted : most;
  };
  if (!cu) return {nullptr, 1, 1, rows, pieces_of(1)};
  MAEFAST_CHECK(sites > 0 && rows % sites == 0, op, ": rows must be whole cells");
  const int32_t* starts = cu_data(*cu, rows / sites, rows / sites);
  const int64_t count = cu->numel() - 1;
  return {starts, sites, count, rows, pieces_of(count)};
}

Act act_of(const char* op, int64_t act) {
  MAEFAST_CHECK(act >= 0 && act <= 2, op, ": unknown activation");
  return static_cast<Act>(act);
}

const void* table(const char* op, const Tensor& t, int64_t size, ScalarType wide) {
  MAEFAST_CHECK(t.numel() == size && t.scalar_type() == wide, op, ": a table has the wrong size or dtype");
  return data(t, "table");
}

const void* like(const char* op, const Tensor& t, const Tensor& x) {
  MAEFAST_CHECK(
      t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == x.size(1) && t.scalar_type() == x.scalar_type(),
      op, ": a tensor has not the shape and dtype of x");
  return data(t, "tensor");
}

int64_t unit_bytes(const Segments& s, int64_t width, int64_t bytes) {
  return (s.rows / (s.count * s.pieces) + 1) * width * bytes;
}

}  // namespace

std::tuple<Tensor, Tensor> segment_stats(const Tensor& x, const std::optional<Tensor>& cu, int64_t sites) {
  SegmentStatsArgs args;
  args.segments = segments_of("segment_stats", x, cu, sites);
  const Segments& s = args.segments;
  const int64_t width = x.size(1), units = s.count * s.pieces;
  const ScalarType wide = arithmetic_type(x.scalar_type());
  args.x = data(x, "x");
  args.width = width;
  args.type = dtype_of(x);
  Tensor pieces = empty({units, 2, width}, ScalarType::Double, x);
  Tensor mean = empty({s.count, width}, wide, x);
  Tensor var = empty({s.count, width}, wide, x);
  args.pieces = static_cast<double*>(pieces.mutable_data_ptr());
  args.mean = mean.mutable_data_ptr();
  args.var = var.mutable_data_ptr();
  const CellNormKernels& kernels = cell_norm_kernels_chosen();
  parallel_rows(units, unit_bytes(s, width, element_size(args.type)),
                [&](int64_t begin, int64_t end) { kernels.stats(args, begin, end); });
  parallel_rows(width, 32 * units,
                [&](int64_t begin, int64_t end) { kernels.stats_total(args, begin, end); });
  return {mean, var};
}

Tensor norm_act(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& cu,
                int64_t sites, const Tensor& mean, const Tensor& scale, const Tensor& bias, int64_t act) {
  NormActArgs args;
  args.segments = segments_of("norm_act", x, cu, sites);
  const int64_t rows = x.size(0), width = x.size(1), tables = args.segments.count * width;
  const ScalarType wide = arithmetic_type(x.scalar_type());
  args.x = data(x, "x");
  args.residual = residual ? like("norm_act", *residual, x) : nullptr;
  args.mean = table("norm_act", mean, tables, wide);
  args.scale = table("norm_act", scale, tables, wide);
  args.bias = table("norm_act", bias, width, wide);
  args.width = width;
  args.type = dtype_of(x);
  args.act = act_of("norm_act", act);
  Tensor y = empty({rows, width}, x.scalar_type(), x);
  args.y = y.mutable_data_ptr();
  const auto kernel = cell_norm_kernels_chosen().norm_act;
  parallel_rows(rows, 2 * width * element_size(args.type),
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> norm_act_sums(const Tensor& grad, const Tensor& x,
                                         const std::optional<Tensor>& gate, const std::optional<Tensor>& cu,
                                         int64_t sites, const Tensor& mean, const Tensor& scale,
                                         const Tensor& bias, int64_t act) {
  NormActSumsArgs args;
  args.segments = segments_of("norm_act_sums", x, cu, sites);
  const Segments& s = args.segments;
  const int64_t rows = x.size(0), width = x.size(1), units = s.count * s.pieces;
  const ScalarType wide = arithmetic_type(x.scalar_type());
  args.x = data(x, "x");
  args.grad = like("norm_act_sums", grad, x);
  args.gate = gate ? like("norm_act_sums", *gate, x) : nullptr;
  args.mean = table("norm_act_sums", mean, s.count * width, wide);
  args.scale = table("norm_act_sums", scale, s.count * width, wide);
  args.bias = table("norm_act_sums", bias, width, wide);
  args.width = width;
  args.type = dtype_of(x);
  args.act = act_of("norm_act_sums", act);
  MAEFAST_CHECK(!gate || args.act != Act::none, "norm_act_sums: a gate needs an activation");
  Tensor passed = gate ? empty({rows, width}, x.scalar_type(), x) : empty({0}, x.scalar_type(), x);
  Tensor pieces = empty({units, 2, width}, ScalarType::Double, x);
  Tensor sums = empty({2, s.count, width}, wide, x);
  args.passed = passed.mutable_data_ptr();
  args.pieces = static_cast<double*>(pieces.mutable_data_ptr());
  args.sums = sums.mutable_data_ptr();
  const CellNormKernels& kernels = cell_norm_kernels_chosen();
  parallel_rows(units, unit_bytes(s, width, 2 * element_size(args.type)),
                [&](int64_t begin, int64_t end) { kernels.sums(args, begin, end); });
  parallel_rows(width, 16 * units, [&](int64_t begin, int64_t end) { kernels.sums_total(args, begin, end); });
  return {passed, sums};
}

Tensor norm_act_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& cu, int64_t sites,
                         const Tensor& mean, const Tensor& scale, const Tensor& bias,
                         const std::optional<Tensor>& offset, const std::optional<Tensor>& slope,
                         int64_t act) {
  NormActBackwardArgs args;
  args.segments = segments_of("norm_act_backward", x, cu, sites);
  const int64_t rows = x.size(0), width = x.size(1), tables = args.segments.count * width;
  const ScalarType wide = arithmetic_type(x.scalar_type());
  MAEFAST_CHECK(offset.has_value() == slope.has_value(), "norm_act_backward: offset and slope go together");
  args.x = data(x, "x");
  args.grad = like("norm_act_backward", grad, x);
  args.mean = table("norm_act_backward", mean, tables, wide);
  args.scale = table("norm_act_backward", scale, tables, wide);
  args.bias = table("norm_act_backward", bias, width, wide);
  args.offset = offset ? table("norm_act_backward", *offset, tables, wide) : nullptr;
  args.slope = slope ? table("norm_act_backward", *slope, tables, wide) : nullptr;
  args.width = width;
  args.type = dtype_of(x);
  args.act = act_of("norm_act_backward", act);
  Tensor grad_x = empty({rows, width}, x.scalar_type(), x);
  args.grad_x = grad_x.mutable_data_ptr();
  const auto kernel = cell_norm_kernels_chosen().norm_act_backward;
  parallel_rows(rows, 3 * width * element_size(args.type),
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return grad_x;
}

}  // namespace maefast::cpu
