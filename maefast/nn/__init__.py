"""Modules that models compose, each usable alone. They hold parameters; the maths is in `maefast.ops`."""

from maefast.nn.bert import LanguageHead, PostNormLayer, TextEncoder
from maefast.nn.block import Attention, Block, Mlp, Packing
from maefast.nn.cells import Cells, UnknownSparseOp
from maefast.nn.clip import ClipEncoder
from maefast.nn.co_attention import CoAttention
from maefast.nn.cross_block import ContextAttention, CrossBlock, CrossDecoder, CrossFusion
from maefast.nn.decoder import Decoder, run_decoder
from maefast.nn.drop_path import DropPath
from maefast.nn.encoder import (
    Encoder,
    encode_together,
    encoder_states,
    pool_visible,
    position_table,
    run_blocks,
    run_encoder,
    run_norm,
)
from maefast.nn.given import GivenTokens
from maefast.nn.hierarchical import HierarchicalBlock, HierarchicalDecoder
from maefast.nn.layers import LayerNorm, Linear
from maefast.nn.patch_embed import PatchEmbed
from maefast.nn.point_groups import CentrePositions, Groups, PointEmbed, group_points
from maefast.nn.positions import sincos_1d, sincos_2d, sincos_3d, sincos_interleaved
from maefast.nn.q_former import QFormer, TokenDecoder
from maefast.nn.regressor import Regressor
from maefast.nn.sparsify import sparsify
from maefast.nn.white_box import ISTA, MSSA, CompressBlock, ExpandBlock

__all__ = [
    "ISTA",
    "MSSA",
    "Attention",
    "Block",
    "Cells",
    "CentrePositions",
    "ClipEncoder",
    "CoAttention",
    "CompressBlock",
    "ContextAttention",
    "CrossBlock",
    "CrossDecoder",
    "CrossFusion",
    "Decoder",
    "DropPath",
    "Encoder",
    "ExpandBlock",
    "GivenTokens",
    "Groups",
    "HierarchicalBlock",
    "HierarchicalDecoder",
    "LanguageHead",
    "LayerNorm",
    "Linear",
    "Mlp",
    "Packing",
    "PatchEmbed",
    "PointEmbed",
    "PostNormLayer",
    "QFormer",
    "Regressor",
    "TextEncoder",
    "TokenDecoder",
    "UnknownSparseOp",
    "encode_together",
    "encoder_states",
    "group_points",
    "pool_visible",
    "position_table",
    "run_blocks",
    "run_decoder",
    "run_encoder",
    "run_norm",
    "sincos_1d",
    "sincos_2d",
    "sincos_3d",
    "sincos_interleaved",
    "sparsify",
]
