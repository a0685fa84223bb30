"""Layouts of timm's blocks whose attention knows positions: rotated queries and keys, or a bias of each pair.

The tables are the model's own: that of a rotation is handed to each block, that of relative positions is the
attention's or comes from the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.integrations import _attentions as attentions
from maefast.integrations import _layouts_parts as common
from maefast.integrations._layouts_parts import NOWHERE, Positions
from maefast.integrations._layouts_placed import fits_dtype, is_bias
from maefast.integrations._layouts_timm import Timm
from maefast.integrations._steps import given


class _Placed(Timm):
    """`TABLE` names the further argument of a block, which is the attention's too, that says where tokens are."""

    TABLE = ""

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        attn = getattr(block, "attn", None)
        told = (cls.TABLE in common.parameters(type(part).forward) for part in (block, attn) if part is not None)
        return super().fits(block) and all(told)

    @classmethod
    def passes(cls, block: nn.Module, args: tuple, kwargs: dict) -> bool:
        rest = common.named(block, args, kwargs)
        if rest is None:
            return False
        table = rest.pop(cls.TABLE, None)
        return (table is None or isinstance(table, Tensor)) and super().passes(block, (), rest)

    @classmethod
    def placed(cls, block: nn.Module, args: tuple, kwargs: dict) -> bool:
        return common.named(block, args, kwargs).get(cls.TABLE) is not None

    @classmethod
    def no_kernel(cls, block: nn.Module, length: int = 1) -> str | None:
        return common.no_kernel(block.norm1, block.attn.num_heads, length)


class Eva(_Placed):
    """Of EVA-02 (Fang et al., 2023) and of timm's ViTs with rotary positions: sine and cosine side by side, [patches,
    2 * head width], or of each sample, which leave the tokens in front of the patches as they are."""

    name = "timm EVA"
    TABLE = "rope"
    arguments = (TABLE,)
    AMONG = (*attentions.SELF, ("q_proj", "k_proj", "v_proj"))
    ATTENTION = frozenset(("qkv", "q_proj", "k_proj", "v_proj", "k_bias", "qkv_bias_separate", "rotate_half"))
    ATTENTION |= {"num_prefix_tokens", "num_kv_heads", "num_kv_groups", "kv_dim"}

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        return super().fits(block) and isinstance(getattr(block.attn, "num_prefix_tokens", None), int)

    @classmethod
    def problem(cls, block: nn.Module) -> str | None:
        attn = block.attn
        if getattr(attn, "q_bias", None) is not None and getattr(attn.qkv, "bias", None) is not None:
            return "the projection has a bias beside that of queries and values"
        return super().problem(block)

    @classmethod
    def positions(cls, block: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Positions | None:
        """None where heads have tables of their own, or learn them."""
        table, attn = common.named(block, args, kwargs).get(cls.TABLE), block.attn
        if table is None:
            return NOWHERE
        width, before = x.shape[-1] // attn.num_heads, attn.num_prefix_tokens
        patches = x.shape[1] - before
        known = (patches, 2 * width), (len(x), 1, patches, 2 * width)  # of each sample where patches are dropped
        if table.shape not in known or patches < 1 or width % 2 or table.requires_grad or not fits_dtype(table, x):
            return None
        sin, cos = (table if table.ndim == 2 else table[:, 0]).chunk(2, -1)
        if before:
            front = *cos.shape[:-2], before, width
            cos, sin = torch.cat([cos.new_ones(front), cos], -2), torch.cat([sin.new_zeros(front), sin], -2)
        rope = ops.Rope(cos, sin, not getattr(attn, "rotate_half", False))
        return Positions(rope=rope, arguments={cls.TABLE: table})

    @classmethod
    def calls(cls, block: nn.Module, x: Tensor) -> list[tuple[Tensor, dict]]:
        attn, patches = block.attn, 4
        x = given(torch.randn(2, attn.num_prefix_tokens + patches, x.shape[2], dtype=x.dtype, device=x.device))
        angles = torch.randn(2, 1, patches, x.shape[2] // attn.num_heads // 2, dtype=x.dtype, device=x.device)
        angles = angles.repeat(1, 1, 1, 2) if getattr(attn, "rotate_half", False) else angles.repeat_interleave(2, -1)
        table = torch.cat([angles.sin(), angles.cos()], -1)
        return [(x, {}), (x, {cls.TABLE: table[0, 0]}), (x, {cls.TABLE: table})]


class RelPos(_Placed):
    """With relative positions: a module of the attention's own makes the bias, or the model's, which is handed to each
    block."""

    name = "timm relative positions"
    TABLE = "shared_rel_pos"
    arguments = (TABLE,)
    ATTENTION = frozenset(("rel_pos",))

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        return super().fits(block) and hasattr(block.attn, "rel_pos")

    @classmethod
    def live(cls, block: nn.Module, settings: dict) -> frozenset[str]:
        return super().live(block, settings) | {"attn.rel_pos"}

    @classmethod
    def problem(cls, block: nn.Module) -> str | None:
        rel_pos = block.attn.rel_pos
        if rel_pos is not None and not (callable(getattr(rel_pos, "get_bias", None)) and block.attn.fused_attn):
            return "a module of its own adds the positions to the scores"
        return super().problem(block)

    @classmethod
    def placed(cls, block: nn.Module, args: tuple, kwargs: dict) -> bool:
        return block.attn.rel_pos is not None or super().placed(block, args, kwargs)

    @classmethod
    def positions(cls, block: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Positions | None:
        """None where the table is another one than a bias of each pair for all samples."""
        table, attn = common.named(block, args, kwargs).get(cls.TABLE), block.attn
        arguments = {} if table is None else {cls.TABLE: table}
        if cls.problem(block):
            return Positions(arguments=arguments)  # for the attention itself
        own = attn.rel_pos is not None
        bias = attn.rel_pos.get_bias() if own else table
        if bias is None:
            return NOWHERE
        if not is_bias(bias, x, attn.num_heads, rows=not own):
            return None
        return Positions(bias=bias, arguments=arguments)

    @classmethod
    def calls(cls, block: nn.Module, x: Tensor) -> list[tuple[Tensor, dict]]:
        rel_pos, heads, count = block.attn.rel_pos, block.attn.num_heads, x.shape[1]
        if rel_pos is not None:
            count = rel_pos.get_bias().shape[-1]
            return [(given(torch.randn(2, count, x.shape[2], dtype=x.dtype, device=x.device)), {})]
        bias = given(torch.randn(1, heads, count, count, dtype=x.dtype, device=x.device))
        return [(x, {}), (x, {cls.TABLE: bias})]
