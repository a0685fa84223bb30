"""Layouts of the transformer blocks of Hugging Face transformers 4, some of which are those of 5 too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maefast.integrations import _code, _hf
from maefast.integrations import _layers as layers
from maefast.integrations import _layouts_parts as common
from maefast.integrations._layouts_parts import NOWHERE, Positions
from maefast.integrations._layouts_placed import is_bias, is_pair
from maefast.integrations._sites import base_of
from maefast.integrations._steps import given


class HuggingFace4:
    """attention.attention (query, key, value), attention.output.dense, intermediate.dense, output.dense; VideoMAE in
    transformers 5 too."""

    name = "transformers 4"
    LIVE = ("layernorm_before", "layernorm_after", "attention.output.dense", "attention.output.dropout")
    LIVE += ("output.dense", "output.dropout")
    LIVE_ATTENTION = ("query", "key", "value", "dropout", "dropout_prob", "q_bias", "v_bias")
    INNER = "attention"
    PARTS, PARTS_OF_ATTENTION = frozenset(), frozenset()  # further ones that fit
    ENDS: tuple[tuple[str, ...], ...] = ((), ())  # behind each branch

    @classmethod
    def live(cls, block: nn.Module, settings: dict) -> frozenset[str]:
        attn = [f"attention.{cls.INNER}.{name}" for name in cls.LIVE_ATTENTION]
        mlp = common.live_mlp("intermediate", block.intermediate, "intermediate_act_fn", ("dense",))
        return frozenset((*cls.LIVE, *attn, *mlp, *cls.ENDS[0], *cls.ENDS[1]))

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        attn = getattr(getattr(block, "attention", None), cls.INNER, None)
        dense = [getattr(getattr(block, name, None), "dense", None) for name in ("intermediate", "output")]
        dense.append(getattr(getattr(getattr(block, "attention", None), "output", None), "dense", None))
        parts = [getattr(attn, name, None) for name in ("query", "key", "value")] + dense
        if not all(isinstance(part, nn.Module) for part in parts):  # linear layers, or adapters in their place
            return False
        # Many look alike, but scale their layers, drop some, or shift scores by relative positions.
        known = {"attention", "intermediate", "output", "layernorm_before", "layernorm_after"}
        alike = known <= set(dict(block.named_children())) <= known | cls.PARTS
        inside = {"query", "key", "value", "dropout"} | cls.PARTS_OF_ATTENTION
        alike = alike and set(dict(attn.named_children())) <= inside
        return alike and common.norms(block, "layernorm_before", "layernorm_after")

    @classmethod
    def passes(cls, block: nn.Module, args: tuple, kwargs: dict) -> bool:
        # The last module adds to the stream by itself: it is either bypassed or called by the model's own code.
        return _hf.passes(args, kwargs) and not layers.hooked(block.output)

    @classmethod
    def norms(cls, block: nn.Module) -> tuple[nn.Module, nn.Module]:
        return block.layernorm_before, block.layernorm_after

    @classmethod
    def heads(cls, block: nn.Module) -> int:
        return getattr(block.attention, cls.INNER).num_attention_heads

    @classmethod
    def no_kernel(cls, block: nn.Module, length: int = 1) -> str | None:
        return common.no_kernel(block.layernorm_before, cls.heads(block), length)

    @classmethod
    def attend(cls, block: nn.Module, y: Tensor, count: int | None, positions: Positions = NOWHERE) -> Tensor:
        return common.ended(cls.attention(block, y, count, positions), cls.ends(block)[0])

    @classmethod
    def attention(cls, block: nn.Module, y: Tensor, count: int | None, positions: Positions) -> Tensor:
        attn, output = getattr(block.attention, cls.INNER), block.attention.output
        if cls.problem(block):
            out = block.attention(y, **positions.arguments)
            out = out[0] if isinstance(out, tuple) else out
            return out if count is None else out[:, -count:]
        heads, scale = attn.num_attention_heads, _scale(attn)
        out = common.attention_of_three(y, _parts(attn), heads, scale, count, _biases(attn), positions)
        return layers.then(layers.linear(output.dense, out), output.dropout)

    @classmethod
    def feed(cls, block: nn.Module, y: Tensor) -> Tensor:
        first, last, act = block.intermediate, block.output, cls.activation(block)
        out = layers.linear(last.dense, first(y)) if act is None else layers.mlp(first.dense, act, last.dense, y)
        return common.ended(layers.then(out, last.dropout), cls.ends(block)[1])

    @classmethod
    def ends(cls, block: nn.Module) -> tuple[tuple[Any, ...], ...]:
        return common.ends(block, cls.ENDS)

    @classmethod
    def whole(cls, block: nn.Module, positions: Positions = NOWHERE) -> common.Whole | None:
        attn, output, act = block.attention.attention, block.attention.output, cls.activation(block)
        ends = cls.ends(block)
        if act is None or cls.problem(block) is not None or common.has_numbers(ends):
            return None
        return common.Whole(
            block.layernorm_before,
            tuple(part.weight for part in _parts(attn)),
            tuple(_biases(attn)),
            output.dense,
            block.layernorm_after,
            block.intermediate.dense,
            block.output.dense,
            attn.num_attention_heads,
            _scale(attn),
            act,
            ((output.dropout, *ends[0]), (block.output.dropout, *ends[1])),
            positions,
        )

    @classmethod
    def activation(cls, block: nn.Module) -> nn.Module | None:
        return None if layers.hooked(block.intermediate) else block.intermediate.intermediate_act_fn

    @classmethod
    def problem(cls, block: nn.Module) -> str | None:
        attn = getattr(block.attention, cls.INNER)
        watched = _hf.recorded(attn) or layers.hooked(block.attention, block.attention.output)
        if watched or not all(map(layers.plain_linear, _parts(attn))):
            return "the attention is watched or adapted"
        if _hf.own_attention(attn):
            return "the attention is computed by a function that was registered for it"
        if (attn.training and getattr(attn, "dropout_prob", 0.0)) or not layers.still(getattr(attn, "dropout", None)):
            return common.DROPS
        return None


def _parts(attn: nn.Module) -> tuple[nn.Linear, ...]:
    return attn.query, attn.key, attn.value


def _biases(attn: nn.Module) -> list[Tensor | None]:
    if getattr(attn, "q_bias", None) is not None:  # VideoMAE: keys have no bias
        return [attn.q_bias, None, attn.v_bias]
    return [part.bias for part in _parts(attn)]


def _scale(attn: nn.Module) -> float:
    return getattr(attn, "scaling", attn.attention_head_size**-0.5)


class Beit4(HuggingFace4):
    """With layer scale and, maybe, relative positions (Bao et al., 2022): BEiT of transformers 4, Data2VecVision of 5
    too. The table of the block stands in its attention, that of the model comes as an argument."""

    name = "transformers 4 BEiT"
    LIVE_ATTENTION = (*HuggingFace4.LIVE_ATTENTION, "relative_position_bias")
    PARTS, PARTS_OF_ATTENTION = frozenset(("drop_path",)), frozenset(("relative_position_bias",))
    ENDS = (("lambda_1", "drop_path"), ("lambda_2", "drop_path"))
    BIAS, RESIZE, SIZE = "relative_position_bias", "interpolate_pos_encoding", "resolution"
    arguments = (BIAS, RESIZE, SIZE)

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        return hasattr(block, "lambda_1") and hasattr(block, "lambda_2") and super().fits(block)

    @classmethod
    def passes(cls, block: nn.Module, args: tuple, kwargs: dict) -> bool:
        call = common.named(block, args, kwargs)
        if call is None:
            return False
        bias, size = call.pop(cls.BIAS, None), call.pop(cls.SIZE, None)
        call.pop(cls.RESIZE, None)
        if (bias is not None and not isinstance(bias, Tensor)) or (_table(block) is not None and not is_pair(size)):
            return False
        return super().passes(block, (), call)

    @classmethod
    def placed(cls, block: nn.Module, args: tuple, kwargs: dict) -> bool:
        return common.named(block, args, kwargs).get(cls.BIAS) is not None or _table(block) is not None

    @classmethod
    def positions(cls, block: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Positions | None:
        call, attn = common.named(block, args, kwargs), block.attention.attention
        shared, table = call.get(cls.BIAS), _table(block)
        heads, bias = attn.num_attention_heads, shared
        if shared is not None and not is_bias(shared, x, heads):
            return None
        if table is not None:
            height, width = call[cls.SIZE]
            window = height // attn.config.patch_size, width // attn.config.patch_size
            bias = table(window, call.get(cls.RESIZE, False), dim_size=x.shape[1])
            if not is_bias(bias, x, heads, rows=False):
                return None
            bias = bias if shared is None else bias + shared
        if bias is None:
            return NOWHERE
        return Positions(bias=bias, arguments={name: call[name] for name in cls.arguments if name in call})

    @classmethod
    def calls(cls, block: nn.Module, x: Tensor) -> list[tuple[Tensor, dict]]:
        attn, size = block.attention.attention, None
        if _table(block) is not None:  # six patches and a class token
            size = 2 * attn.config.patch_size, 3 * attn.config.patch_size
            x = given(torch.cat([x, x[:, :1]], 1))
        count = x.shape[1]
        bias = given(torch.randn(1, attn.num_attention_heads, count, count, dtype=x.dtype, device=x.device))
        return [(x, {cls.BIAS: shared, cls.SIZE: size}) for shared in (None, bias)]

    @classmethod
    def adds_weights(cls, block: nn.Module) -> bool:
        """Whether the layer answers with a place for attention weights where nobody asked for them."""
        return _TORCHS in _code.look(base_of(block.attention.attention).forward.__code__).names


_TORCHS = "scaled_dot_product_attention"


def _table(block: nn.Module) -> nn.Module | None:
    attn = block.attention.attention
    return getattr(attn, "relative_position_bias", None) if getattr(attn, "has_relative_position_bias", True) else None
