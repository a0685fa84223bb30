// Index of the CPU ops. Loaded by maefast/_native.py after Python has defined the schemas.
#include "cpu/ops.h"

// The name is a macro's (CMakeLists.txt), which must be replaced before STABLE_TORCH_LIBRARY_IMPL sees it.
#define REGISTER(...) STABLE_TORCH_LIBRARY_IMPL(__VA_ARGS__)

REGISTER(MAEFAST_NAMESPACE, CPU, m) {
  using namespace maefast::cpu;
  // mask
  m.impl("token_mask", TORCH_BOX(&token_mask));
  // embed
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens));
  m.impl("gather_tokens_backward", TORCH_BOX(&gather_tokens_backward));
  m.impl("patch_rows", TORCH_BOX(&patch_rows));
  m.impl("patch_rows_backward", TORCH_BOX(&patch_rows_backward));
  m.impl("place_tokens", TORCH_BOX(&place_tokens));
  m.impl("place_tokens_backward", TORCH_BOX(&place_tokens_backward));
  // restore
  m.impl("restore_tokens", TORCH_BOX(&restore_tokens));
  m.impl("restore_tokens_backward", TORCH_BOX(&restore_tokens_backward));
  // norm
  m.impl("add_norm", TORCH_BOX(&add_norm));
  m.impl("add_norm_backward", TORCH_BOX(&add_norm_backward));
  // linear
  m.impl("transpose_sum", TORCH_BOX(&transpose_sum));
  // gelu
  m.impl("bias_gelu", TORCH_BOX(&bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
  // resize
  m.impl("resize", TORCH_BOX(&resize));
  // adamw
  m.impl("adamw", TORCH_BOX(&adamw));
  // attention
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  // loss
  m.impl("patch_loss", TORCH_BOX(&patch_loss));
  m.impl("patch_loss_backward", TORCH_BOX(&patch_loss_backward));
  // cells
  m.impl("pack_cells", TORCH_BOX(&pack_cells));
  m.impl("unpack_cells", TORCH_BOX(&unpack_cells));
  m.impl("fill_sum", TORCH_BOX(&fill_sum));
  // pool
  m.impl("max_pool_cells", TORCH_BOX(&max_pool_cells));
  m.impl("max_pool_cells_backward", TORCH_BOX(&max_pool_cells_backward));
  m.impl("avg_pool_cells", TORCH_BOX(&avg_pool_cells));
  m.impl("avg_pool_cells_backward", TORCH_BOX(&avg_pool_cells_backward));
  // cell_norm
  m.impl("segment_stats", TORCH_BOX(&segment_stats));
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("norm_act_sums", TORCH_BOX(&norm_act_sums));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
  // depthwise
  m.impl("depthwise", TORCH_BOX(&depthwise));
  m.impl("depthwise_grad_weight", TORCH_BOX(&depthwise_grad_weight));
  // points
  m.impl("farthest_points", TORCH_BOX(&farthest_points));
  m.impl("knn", TORCH_BOX(&knn));
  // chamfer
  m.impl("chamfer", TORCH_BOX(&chamfer));
  m.impl("chamfer_backward", TORCH_BOX(&chamfer_backward));
  // feature_loss
  m.impl("feature_loss", TORCH_BOX(&feature_loss));
  m.impl("feature_loss_backward", TORCH_BOX(&feature_loss_backward));
  // sparse_conv
  m.impl("halo_cells", TORCH_BOX(&halo_cells));
  m.impl("halo_cells_backward", TORCH_BOX(&halo_cells_backward));
  m.impl("gather_taps", TORCH_BOX(&gather_taps));
  m.impl("gather_taps_backward", TORCH_BOX(&gather_taps_backward));
}
