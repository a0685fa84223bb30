#include "cpu/embed_kernel.h"
#include "cpu/ops.h"

namespace maefast::cpu {

Tensor gather_tokens(const Tensor& x, const Tensor& index, const Tensor& cu, int64_t /*max_count*/,
                     int64_t prefix, bool keep_prefix) {
  GatherArgs args;
  args.batch = x.size(0);
  args.prefix = prefix;
  args.tokens = x.size(1) - prefix;
  args.packed = index.numel();
  args.keep_prefix = keep_prefix;
  args.masked = false;
  const int64_t rows = args.packed + (keep_prefix ? args.batch * prefix : 0);
  Tensor out = empty({rows, x.size(2)}, x.scalar_type(), x);
  args.row_bytes = x.size(2) * static_cast<int64_t>(x.element_size());
  args.src = static_cast<const char*>(x.const_data_ptr());
  args.dst = static_cast<char*>(out.mutable_data_ptr());
  args.index = index.const_data_ptr<int32_t>();
  args.cu = cu.const_data_ptr<int32_t>();
  const auto kernel = embed_kernels_chosen().gather_rows;
  parallel_rows(rows, args.row_bytes, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

Tensor gather_tokens_backward(const Tensor& grad, const Tensor& slot, const Tensor& cu, int64_t prefix,
                              bool keep_prefix, bool masked) {
  GatherArgs args;
  args.batch = cu.numel() - 1;
  args.prefix = prefix;
  args.tokens = args.batch > 0 ? slot.numel() / args.batch : 0;
  args.packed = grad.size(0) - (keep_prefix ? args.batch * prefix : 0);
  args.keep_prefix = keep_prefix;
  args.masked = masked;
  Tensor out = empty({args.batch, prefix + args.tokens, grad.size(1)}, grad.scalar_type(), grad);
  args.row_bytes = grad.size(1) * static_cast<int64_t>(grad.element_size());
  args.src = static_cast<const char*>(grad.const_data_ptr());
  args.dst = static_cast<char*>(out.mutable_data_ptr());
  args.index = slot.const_data_ptr<int32_t>();
  args.cu = cu.const_data_ptr<int32_t>();
  const auto kernel = embed_kernels_chosen().scatter_rows;
  parallel_rows(args.batch * (prefix + args.tokens), args.row_bytes,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

}  // namespace maefast::cpu
