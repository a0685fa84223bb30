#include "cpu/host.h"
#include "cpu/mask_kernel.h"
#include "cpu/ops.h"

namespace maefast::cpu {

std::tuple<Tensor, Tensor, Tensor> token_mask(const Tensor& scores, const Tensor& cu_visible,
                                              int64_t total_visible, bool by_position) {
  MAEFAST_CHECK(scores.dim() == 2 && cu_visible.numel() == scores.size(0) + 1, "cu_visible must be [B+1]");
  MaskArgs args;
  args.scores = data(scores, "scores");
  args.type = dtype_of(scores);
  args.batch = scores.size(0);
  args.tokens = scores.size(1);
  args.by_position = by_position;
  args.cu = cu_data(cu_visible, total_visible, args.tokens);
  const int64_t count = args.batch * args.tokens;
  MAEFAST_CHECK(count < (int64_t(1) << 31), "B*N must stay below 2**31");
  Tensor visible = empty({total_visible}, ScalarType::Int, scores);
  Tensor masked = empty({count - total_visible}, ScalarType::Int, scores);
  Tensor slot = empty({count}, ScalarType::Int, scores);
  args.visible = static_cast<int32_t*>(visible.mutable_data_ptr());
  args.masked = static_cast<int32_t*>(masked.mutable_data_ptr());
  args.slot = static_cast<int32_t*>(slot.mutable_data_ptr());
  const MaskKernels& kernels = mask_kernels_chosen();
  const int64_t bytes = kernels.workspace(args);
  // A token takes some 4 ns: a thread gets 8192 of them at least, because one that is late costs
  // milliseconds.
  parallel_rows(args.batch, 4 * args.tokens, [&](int64_t begin, int64_t end) {
    const Workspace workspace(bytes);
    kernels.token_mask(args, workspace.get(), begin, end);
  });
  return {visible, masked, slot};
}

}  // namespace maefast::cpu
