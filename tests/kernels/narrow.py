"""Why a kernel moves less than half of its bytes by 16-byte accesses: docs/kernels.md says it of each that does."""

from __future__ import annotations

SUMS = "sums and statistics are one or two floats a thread, written once a program"
STEM = "3 channels of the stem: 6 or 12 bytes a site"
ODD = "rows of 70 elements, which start at no multiple of 16 bytes, go an element at a time"
POINTS = "a point is 3 floats, 12 bytes"
PATCHES = "lines of 14 or 2 pixels"
PIXELS = "predictions in (pixel, channel) order: 3 channels, 6 or 12 bytes; losses and statistics are one value a row"
WORDS = "for rows that start at no multiple of 16 bytes: the widest word that their alignment allows"
TABLES = "tables of a segment are 2 floats a thread at 256 channels; rows go 16 bytes at a time"

CAUSES = {
    "adamw_kernel": "tensors whose size 16 does not divide go an element at a time",
    "attention_bwd_kernel": "key bias, marks and the gradients of statistics are one value a row",
    "chamfer_bwd_kernel": POINTS,
    "chamfer_fwd_kernel": POINTS,
    "depthwise_grad_weight_kernel": SUMS,
    "farthest_points_kernel": POINTS,
    "feature_loss_fwd_kernel": "stores one loss and four statistics a row",
    "fill_sum_kernel": SUMS,
    "gather_kernel": WORDS,
    "gather_taps_bwd_kernel": STEM,
    "gather_taps_fwd_kernel": STEM,
    "gather_tokens_bwd_kernel": ODD,
    "gather_tokens_fwd_kernel": ODD,
    "halo_cells_bwd_kernel": STEM,
    "halo_cells_fwd_kernel": STEM,
    "implicit_conv_bwd_weight_kernel": "a tile of 16 x 16 is two or four elements a thread",
    "implicit_conv_bwd_x_kernel": STEM,
    "implicit_conv_fwd_kernel": STEM,
    "knn_kernel": POINTS,
    "norm_act_bwd_kernel": TABLES,
    "norm_act_fwd_kernel": TABLES,
    "norm_act_sums_kernel": SUMS,
    "patch_loss_bwd_flat_kernel": "pixels are gathered a value at a time; [why](gpu.md)",
    "patch_loss_bwd_kernel": PIXELS,
    "patch_loss_fwd_kernel": PIXELS,
    "patch_rows_bwd_kernel": PATCHES,
    "patch_rows_fwd_kernel": PATCHES,
    "place_tokens_bwd_kernel": ODD,
    "place_tokens_fwd_kernel": ODD,
    "planes_kernel": "turns 3 channels of a site, 6 or 12 bytes, into planes; sizes are not specialised, [why](gpu.md)",
    "pool_count_kernel": "one count a site",
    "scatter_kernel": WORDS,
    "segment_stats_kernel": SUMS,
    "stats_total_kernel": SUMS,
    "sum_parts_kernel": "a sum is one or two floats a thread; rows of 70 go an element at a time",
    "token_mask_position_kernel": "rows of 196 start at no multiple of 16; an index goes where its rank says",
    "token_mask_sorted_kernel": "up to 1568 scores are a few a thread; an index goes where its rank says",
}
