"""Fused ops for masked autoencoders. Each family's file holds contract, checks, plain definition,
autograd, and the schemas and fakes of its raw ops.

Every op takes `backend`: None chooses (`cuda`, `triton`, `cpu`, `reference`, the first that serves the call); a name
forces one, and RuntimeError says why it cannot serve. ``with maefast.backend(name)`` does so for all calls inside."""

from maefast.ops import _dispatch
from maefast.ops._dispatch import backend
from maefast.ops.adamw import adamw
from maefast.ops.attention import attention
from maefast.ops.cell_norm import batch_norm_act, grn, group_norm_cells, instance_norm_cells, segment_sum
from maefast.ops.cells import CellMask, pack_cells, unpack_cells
from maefast.ops.chamfer import chamfer
from maefast.ops.conv_transpose import conv_transpose_cells
from maefast.ops.depthwise import depthwise_cells
from maefast.ops.embed import gather_tokens, patch_embed
from maefast.ops.feature_loss import feature_loss
from maefast.ops.gelu import bias_gelu
from maefast.ops.linear import linear, linear_library
from maefast.ops.loss import patch_loss
from maefast.ops.mask import TokenMask, token_mask
from maefast.ops.norm import add_norm
from maefast.ops.points import farthest_points, knn
from maefast.ops.pool import avg_pool_cells, global_pool_cells, max_pool_cells
from maefast.ops.positions import Rope, relative_bias
from maefast.ops.resize import resize
from maefast.ops.restore import restore_tokens
from maefast.ops.sparse_conv import conv_cells
from maefast.ops.transformer_block import BlockWeights, transformer_block

_dispatch.load_kernels()  # the families above have defined their raw ops

__all__ = [
    "BlockWeights",
    "CellMask",
    "Rope",
    "TokenMask",
    "adamw",
    "add_norm",
    "attention",
    "avg_pool_cells",
    "backend",
    "batch_norm_act",
    "bias_gelu",
    "chamfer",
    "conv_cells",
    "conv_transpose_cells",
    "depthwise_cells",
    "farthest_points",
    "feature_loss",
    "gather_tokens",
    "global_pool_cells",
    "grn",
    "group_norm_cells",
    "instance_norm_cells",
    "knn",
    "linear",
    "linear_library",
    "max_pool_cells",
    "pack_cells",
    "patch_embed",
    "patch_loss",
    "relative_bias",
    "resize",
    "restore_tokens",
    "segment_sum",
    "token_mask",
    "transformer_block",
    "unpack_cells",
]
