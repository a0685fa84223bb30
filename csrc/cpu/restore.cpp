#include "cpu/host.h"
#include "cpu/ops.h"
#include "cpu/restore_kernel.h"

namespace maefast::cpu {

Tensor restore_tokens(const Tensor& x, const Tensor& visible, const Tensor& masked, const Tensor& cu_visible,
                      const Tensor& mask_token, const std::optional<Tensor>& pos, int64_t prefix,
                      bool visible_first, bool pos_on_masked, const std::optional<Tensor>& cu_masked,
                      int64_t num_tokens) {
  const int64_t batch = cu_visible.numel() - 1;
  const int64_t count = visible.numel() + masked.numel();
  MAEFAST_CHECK(x.dim() == 2 && batch > 0 && (cu_masked || count % batch == 0) && prefix >= 0 &&
                    x.size(0) == visible.numel() + batch * prefix,
                "restore_tokens: x must be [T + B*P, D] and the plan of B samples");
  MAEFAST_CHECK(!cu_masked || (visible_first && cu_masked->numel() == batch + 1 && num_tokens > 0),
                "restore_tokens: with cu_masked [B+1] the order is visible first, and N is given");
  int32_t failed = 0;
  RestoreArgs args;
  args.batch = batch;
  args.tokens = cu_masked ? num_tokens : count / batch;
  args.prefix = prefix;
  args.width = x.size(1);
  args.visible_first = visible_first;
  args.pos_on_masked = pos_on_masked;
  args.x = data(x, "x");
  args.mask_token = data(mask_token, "mask_token");
  args.visible = plan_data(visible, "visible");
  args.masked = plan_data(masked, "masked");
  args.cu = cu_data(cu_visible, visible.numel(), args.tokens);
  args.cu_masked = cu_masked ? cu_data(*cu_masked, masked.numel(), args.tokens) : nullptr;
  args.failed = &failed;
  args.x_type = dtype_of(x);
  args.out_type = dtype_of(mask_token);
  MAEFAST_CHECK(widens(args.x_type, args.out_type) && mask_token.numel() == args.width,
                "restore_tokens: mask_token must be [D], in x's dtype or float32");
  args.prefix_pos = nullptr;
  args.pos = nullptr;
  if (pos) {
    const int64_t extra = pos->size(0) - args.tokens;
    MAEFAST_CHECK(pos->scalar_type() == mask_token.scalar_type() && pos->dim() == 2 &&
                      pos->size(1) == args.width && (extra == 0 || (extra == prefix && !pos_on_masked)),
                  "restore_tokens: pos must be [N, D] or [P+N, D]");
    const char* table = static_cast<const char*>(data(*pos, "pos"));
    if (extra > 0) args.prefix_pos = table;
    args.pos = table + extra * args.width * element_size(args.out_type);
  }
  const int64_t rows = count + batch * prefix;
  Tensor out = cu_masked ? empty({rows, args.width}, mask_token.scalar_type(), x)
                         : empty({batch, prefix + args.tokens, args.width}, mask_token.scalar_type(), x);
  args.out = out.mutable_data_ptr();
  const auto kernel = restore_kernels_chosen().restore_tokens;
  parallel_rows(rows, args.width * element_size(args.out_type),
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  check_plan(failed);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> restore_tokens_backward(
    const Tensor& grad, const Tensor& visible, const Tensor& masked, const Tensor& slot,
    const Tensor& cu_visible, int64_t pos_rows, int64_t prefix, bool visible_first, bool pos_on_masked,
    bool need_mask_token, ScalarType x_dtype, const std::optional<Tensor>& cu_masked) {
  const int64_t batch = cu_visible.numel() - 1;
  if (cu_masked) {
    MAEFAST_CHECK(grad.dim() == 2 && batch > 0 && prefix >= 0 && visible_first && slot.numel() % batch == 0 &&
                      grad.size(0) == visible.numel() + masked.numel() + batch * prefix &&
                      cu_masked->numel() == batch + 1,
                  "restore_tokens_backward: grad must be [T + M + B*P, D], slot [B*N], cu_masked [B+1]");
  } else {
    MAEFAST_CHECK(grad.dim() == 3 && batch > 0 && grad.size(0) == batch && prefix >= 0 &&
                      slot.numel() == batch * (grad.size(1) - prefix),
                  "restore_tokens_backward: grad must be [B, P+N, D] and slot [B*N]");
  }
  int32_t failed = 0;
  RestoreBackwardArgs args;
  args.batch = batch;
  args.tokens = slot.numel() / batch;
  args.prefix = prefix;
  args.packed = visible.numel();
  args.width = grad.size(-1);
  args.visible_first = visible_first;
  args.pos_on_masked = pos_on_masked;
  args.grad = data(grad, "grad");
  args.slot = plan_data(slot, "slot");
  args.cu = cu_data(cu_visible, args.packed, args.tokens);
  args.cu_masked = cu_masked ? cu_data(*cu_masked, masked.numel(), args.tokens) : nullptr;
  args.failed = &failed;
  args.grad_type = dtype_of(grad);
  args.x_type = dtype_of(x_dtype);
  const int64_t extra = pos_rows - args.tokens;
  MAEFAST_CHECK(widens(args.x_type, args.grad_type), "restore_tokens_backward: dtypes do not fit");
  MAEFAST_CHECK(pos_rows == 0 || extra == 0 || (extra == prefix && !pos_on_masked),
                "restore_tokens_backward: pos_rows must be 0, N or P+N");
  const ScalarType type = grad.scalar_type();
  const int64_t d = args.width;
  Tensor grad_x = empty({args.packed + batch * prefix, d}, x_dtype, grad);
  Tensor grad_mask = need_mask_token ? empty({d}, type, grad) : empty({0}, type, grad);
  Tensor grad_pos = pos_rows > 0 ? empty({pos_rows, d}, type, grad) : empty({0}, type, grad);
  args.grad_x = grad_x.mutable_data_ptr();
  args.units = cut_units(batch, prefix + args.tokens);
  const int64_t units = args.units.chunks * args.units.pieces;
  std::optional<Sums> mask_sums, pos_sums;
  args.mask_sums = nullptr;
  if (need_mask_token) {
    mask_sums.emplace(grad_mask, 1, d, units);
    args.mask_sums = mask_sums->at(0, d);
  }
  if (pos_rows > 0) {
    pos_sums.emplace(grad_pos, pos_rows, d, args.units.pieces);
    if (extra > 0) args.units.prefix_sums = pos_sums->at(0, d);
    args.units.token_sums = pos_sums->at(extra, d);
    args.units.prefix_stride = args.units.token_stride = pos_sums->stride();
  }
  const RestoreKernels& kernels = restore_kernels_chosen();
  parallel_rows(units, batch * (prefix + args.tokens) * d * element_size(args.grad_type) / units,
                [&](int64_t begin, int64_t end) { kernels.restore_tokens_backward(args, begin, end); });
  check_plan(failed);
  if (mask_sums) mask_sums->finish(kernels.sum_pieces);
  if (pos_sums) pos_sums->finish(kernels.sum_pieces);
  return {grad_x, grad_mask, grad_pos};
}

}  // namespace maefast::cpu
