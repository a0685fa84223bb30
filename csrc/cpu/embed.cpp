#include "cpu/embed_kernel.h"
#include "cpu/host.h"
#include "cpu/memory.h"
#include "cpu/ops.h"

namespace maefast::cpu {

Tensor gather_tokens(const Tensor& x, const Tensor& index, const Tensor& cu, int64_t /*max_count*/,
                     int64_t prefix, bool keep_prefix) {
  MAEFAST_CHECK(x.dim() == 3 && prefix >= 0 && prefix <= x.size(1) && cu.numel() == x.size(0) + 1,
                "gather_tokens: x must be [B, P+N, D] and cu [B+1]");
  int32_t failed = 0;
  GatherArgs args;
  args.batch = x.size(0);
  args.prefix = prefix;
  args.tokens = x.size(1) - prefix;
  args.packed = index.numel();
  args.keep_prefix = keep_prefix;
  args.masked = false;
  args.zeroed = false;
  args.failed = &failed;
  args.src = static_cast<const char*>(data(x, "x"));
  args.index = plan_data(index, "index");
  args.cu = cu_data(cu, args.packed, args.tokens);
  const int64_t rows = args.packed + (keep_prefix ? args.batch * prefix : 0);
  Tensor out = empty({rows, x.size(2)}, x.scalar_type(), x);
  args.row_bytes = x.size(2) * static_cast<int64_t>(x.element_size());
  args.dst = static_cast<char*>(out.mutable_data_ptr());
  const auto kernel = embed_kernels_chosen().gather_rows;
  parallel_rows(rows, args.row_bytes, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  check_plan(failed);
  return out;
}

Tensor gather_tokens_backward(const Tensor& grad, const Tensor& slot, const Tensor& cu, int64_t prefix,
                              bool keep_prefix, bool masked) {
  const int64_t batch = cu.numel() - 1;
  MAEFAST_CHECK(grad.dim() == 2 && batch > 0 && slot.numel() % batch == 0 && prefix >= 0,
                "gather_tokens_backward: grad must be [R, D], cu [B+1] and slot [B*N]");
  int32_t failed = 0;
  GatherArgs args;
  args.batch = batch;
  args.prefix = prefix;
  args.tokens = slot.numel() / batch;
  args.packed = grad.size(0) - (keep_prefix ? batch * prefix : 0);
  args.keep_prefix = keep_prefix;
  args.masked = masked;
  args.failed = &failed;
  args.src = static_cast<const char*>(data(grad, "grad"));
  args.index = plan_data(slot, "slot");
  args.cu = cu_data(cu, args.packed, args.tokens);
  Tensor out = empty_or_zeros({batch, prefix + args.tokens, grad.size(1)}, grad.scalar_type(), grad,
                              grad.size(0), &args.zeroed);
  args.row_bytes = grad.size(1) * static_cast<int64_t>(grad.element_size());
  args.dst = static_cast<char*>(out.mutable_data_ptr());
  const auto kernel = embed_kernels_chosen().scatter_rows;
  parallel_rows(batch * (prefix + args.tokens), args.row_bytes,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  check_plan(failed);
  return out;
}

Tensor patch_rows(const Tensor& images, const Tensor& index, const std::vector<int64_t>& patch,
                  ScalarType dtype) {
  int32_t failed = 0;
  PatchRowsArgs args;
  args.grid = patch_grid(images, patch);
  args.src = data(images, "images");
  args.index = plan_data(index, "index");
  args.failed = &failed;
  args.rows = index.numel();
  args.src_type = dtype_of(images);
  args.dst_type = dtype_of(dtype);
  const int64_t values = values_of(args.grid);
  Tensor out = empty({args.rows, values}, dtype, images);
  args.dst = out.mutable_data_ptr();
  const auto kernel = embed_kernels_chosen().patch_rows;
  parallel_rows(args.rows, values * element_size(args.src_type),
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  check_plan(failed);
  return out;
}

Tensor patch_rows_backward(const Tensor& grad, const Tensor& slot, const std::vector<int64_t>& image_shape,
                           const std::vector<int64_t>& patch, ScalarType dtype) {
  const std::vector<int64_t>& s = image_shape;
  MAEFAST_CHECK(s.size() == 5, "image_shape must be [B, C, T, H, W]");
  int32_t failed = 0;
  PatchRowsArgs args;
  args.grid = patch_grid(s[0], s[1], s[2], s[3], s[4], patch);
  const int64_t values = values_of(args.grid);
  MAEFAST_CHECK(grad.dim() == 2 && grad.size(1) == values && slot.numel() == s[0] * tokens_of(args.grid),
                "patch_rows_backward: grad or slot does not fit the images");
  args.src = data(grad, "grad");
  args.index = plan_data(slot, "slot");
  args.failed = &failed;
  args.rows = grad.size(0);
  args.src_type = dtype_of(grad);
  args.dst_type = dtype_of(dtype);
  Tensor out = empty({s[0], s[1], s[2], s[3], s[4]}, dtype, grad);
  args.dst = out.mutable_data_ptr();
  const int64_t columns = s[4] / patch[2];
  const auto kernel = embed_kernels_chosen().patch_rows_backward;
  parallel_rows(slot.numel() / (columns > 0 ? columns : 1), columns * values * element_size(args.dst_type),
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  check_plan(failed);
  return out;
}

Tensor place_tokens(const Tensor& y, const Tensor& visible, const Tensor& cu_visible, int64_t num_tokens,
                    const std::optional<Tensor>& pos, const std::optional<Tensor>& prefix_tokens) {
  MAEFAST_CHECK(y.dim() == 2 && y.size(0) == visible.numel() && (pos || prefix_tokens),
                "place_tokens: y must be [T, D], with pos or prefix_tokens");
  int32_t failed = 0;
  PlaceArgs args;
  args.packed = y.size(0);
  args.width = y.size(1);
  args.batch = cu_visible.numel() - 1;
  args.tokens = num_tokens;
  args.prefix = prefix_tokens ? prefix_tokens->size(0) : 0;
  args.y = data(y, "y");
  args.visible = plan_data(visible, "visible");
  args.cu = cu_data(cu_visible, args.packed, num_tokens);
  args.pos = pos ? data(*pos, "pos") : nullptr;
  args.lead = prefix_tokens ? data(*prefix_tokens, "prefix_tokens") : nullptr;
  args.failed = &failed;
  const ScalarType type = (pos ? *pos : *prefix_tokens).scalar_type();
  args.y_type = dtype_of(y);
  args.out_type = dtype_of(type);
  MAEFAST_CHECK(
      widens(args.y_type, args.out_type) && (!prefix_tokens || prefix_tokens->scalar_type() == type),
      "place_tokens: dtypes do not fit");
  MAEFAST_CHECK(!pos || (pos->numel() == num_tokens * args.width), "place_tokens: pos must be [N, D]");
  MAEFAST_CHECK(!prefix_tokens || prefix_tokens->numel() == args.prefix * args.width,
                "place_tokens: prefix_tokens must be [P, D]");
  const int64_t rows = args.packed + args.batch * args.prefix;
  Tensor out = empty({rows, args.width}, type, y);
  args.out = out.mutable_data_ptr();
  const auto kernel = embed_kernels_chosen().place_tokens;
  parallel_rows(rows, args.width * element_size(args.out_type),
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  check_plan(failed);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> place_tokens_backward(const Tensor& grad, const Tensor& slot,
                                                         const Tensor& cu_visible, int64_t prefix,
                                                         bool need_pos, bool need_prefix,
                                                         ScalarType y_dtype) {
  const int64_t batch = cu_visible.numel() - 1;
  MAEFAST_CHECK(grad.dim() == 2 && batch > 0 && slot.numel() % batch == 0 && prefix >= 0,
                "place_tokens_backward: grad must be [R, D], cu_visible [B+1] and slot [B*N]");
  int32_t failed = 0;
  PlaceBackwardArgs args;
  args.batch = batch;
  args.tokens = slot.numel() / batch;
  args.prefix = prefix;
  args.packed = grad.size(0) - batch * prefix;
  args.width = grad.size(1);
  args.grad = data(grad, "grad");
  args.slot = plan_data(slot, "slot");
  args.cu = cu_data(cu_visible, args.packed, args.tokens);
  args.failed = &failed;
  args.grad_type = dtype_of(grad);
  args.y_type = dtype_of(y_dtype);
  MAEFAST_CHECK(widens(args.y_type, args.grad_type), "place_tokens_backward: dtypes do not fit");
  const int64_t d = args.width;
  Tensor grad_y = empty({args.packed, d}, y_dtype, grad);
  Tensor grad_pos =
      need_pos ? empty({args.tokens, d}, grad.scalar_type(), grad) : empty({0}, grad.scalar_type(), grad);
  Tensor grad_prefix =
      need_prefix ? empty({prefix, d}, grad.scalar_type(), grad) : empty({0}, grad.scalar_type(), grad);
  args.grad_y = grad_y.mutable_data_ptr();
  const EmbedKernels& kernels = embed_kernels_chosen();
  const int64_t row_bytes = d * element_size(args.grad_type);
  if (!need_pos) {  // no sums over tokens: the units are left with the prefix tokens
    parallel_rows(args.packed, row_bytes,
                  [&](int64_t begin, int64_t end) { kernels.unplace_rows(args, begin, end); });
    args.tokens = 0;
  }
  if (prefix + args.tokens == 0) return {grad_y, grad_pos, grad_prefix};
  args.units = cut_units(batch, prefix + args.tokens);
  std::optional<Sums> pos_sums, prefix_sums;
  if (need_pos) {
    pos_sums.emplace(grad_pos, args.tokens, d, args.units.pieces);
    args.units.token_sums = pos_sums->at(0, d);
    args.units.token_stride = pos_sums->stride();
  }
  if (need_prefix && prefix > 0) {
    prefix_sums.emplace(grad_prefix, prefix, d, args.units.pieces);
    args.units.prefix_sums = prefix_sums->at(0, d);
    args.units.prefix_stride = prefix_sums->stride();
  }
  if (pos_sums || prefix_sums) {
    const int64_t units = args.units.chunks * args.units.pieces;
    const int64_t rows = (need_pos ? args.packed : 0) + batch * prefix;
    parallel_rows(units, rows * row_bytes / units,
                  [&](int64_t begin, int64_t end) { kernels.place_tokens_backward(args, begin, end); });
  }
  check_plan(failed);
  if (pos_sums) pos_sums->finish(kernels.sum_pieces);
  if (prefix_sums) prefix_sums->finish(kernels.sum_pieces);
  return {grad_y, grad_pos, grad_prefix};
}

}  // namespace maefast::cpu
