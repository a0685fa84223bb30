"""Attentions as timm and its followers write them, on our ops: one, two or three projections into heads.

Projections are `qkv`, or `q`, `k` and `v` (MAE-ST), or for cross-attention `q` and `kv` (CrossMAE); then `proj`.
`known` says of a class whether its forward is one that we know, `problem` why it is called as it is now.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.integrations import _code
from maefast.integrations import _layers as layers
from maefast.integrations._layouts_parts import DROPS, NOWHERE, Positions, attention, attention_of_three

SELF = ("qkv",), ("q", "k", "v")
CROSS = (("q", "kv"),)
# Attributes that a forward may use beside its projections, `proj` and `num_heads`. Any other may be a switch that
# changes what it computes.
_MAY = {"training", "scale", "attn_drop", "proj_drop", "proj_drop_prob", "q_norm", "k_norm", "norm", "gate"}
_MAY |= {"q_bias", "v_bias", "head_dim", "attn_dim", "dim", "embed_dim", "fused_attn", "fast_attn", "use_sdpa"}
# What is looked at at every call; the rest of what a forward uses is guarded.
_LIVE = ("proj", "attn_drop", "proj_drop", "proj_drop_prob", "q_norm", "k_norm", "norm", "gate", "q_bias", "v_bias")
_LIVE += ("k_bias",)


class Known(NamedTuple):
    """A class of attentions whose forward we know, the names of its projections, and whether it reads `scale`: who
    leaves that to torch's scaled_dot_product_attention has 1 / sqrt(width of a head)."""

    kind: type
    parts: tuple[str, ...]
    scaled: bool


def projections(attn: nn.Module | None, among: tuple[tuple[str, ...], ...]) -> tuple[str, ...] | None:
    """Names of the projections that an attention has; adapters may stand in the place of the layers."""
    for parts in among:
        if all(isinstance(getattr(attn, name, None), nn.Module) for name in (*parts, "proj")):
            return parts
    return None


def known(
    attn: nn.Module, among: tuple[tuple[str, ...], ...] = SELF, more: frozenset[str] = frozenset()
) -> Known | None:
    """None for attentions whose forward uses what we do not know; `more`: further attributes that it may use."""
    parts = projections(attn, among)
    if parts is None or beyond(attn, among, more):
        return None
    return Known(type(attn), parts, "scale" in _code.reads(attn))


def beyond(attn: nn.Module, among: tuple[tuple[str, ...], ...] = SELF, more: frozenset[str] = frozenset()) -> str:
    """What the forward of an attention uses that we do not know, or lacks, or ""."""
    return _code.beyond(attn, {*(projections(attn, among) or ()), "proj", "num_heads"}, _MAY | more)


def live(path: str, attn: nn.Module, found: Known | None) -> list[str]:
    """Dotted names of what is read at every call; all of an attention that is called as it is."""
    if found is None:
        return [path]
    names = [f"{path}.{name}" for name in (*found.parts, *_LIVE)]
    if isinstance(getattr(attn, "scale", None), Tensor):  # learned: the attention is called
        names.append(f"{path}.scale")
    return names


def problem(attn: nn.Module, found: Known | None) -> str | None:
    """Why an attention is called as it is, or None where it is fused."""
    if found is None or type(attn) is not found.kind:
        return "the attention is of a kind that maefast does not know"
    parts = [getattr(attn, name, None) for name in found.parts]
    if layers.hooked(attn) or not all(map(layers.plain_linear, parts)):
        return "the attention is watched or adapted"
    if found.scaled and not isinstance(getattr(attn, "scale", None), float):
        return "the scale of the attention is learned"
    if len(parts) == 3 and len({part.weight.shape for part in parts}) > 1:
        return "keys and values have fewer heads than queries"
    for name in ("q_norm", "k_norm", "norm"):
        if not layers.still(getattr(attn, name, None)):
            return "the attention normalises queries, keys or its output"
    if getattr(attn, "gate", None) is not None:
        return "the attention is gated"
    # Some hold a rate in the place of this dropout, some take its rate and ask the attention whether it trains.
    drop = getattr(attn, "attn_drop", None)
    if not layers.still(drop) or (attn.training and getattr(drop, "p", 0) > 0):
        return DROPS
    if getattr(attn, "proj_drop_prob", 0) > 0:  # V-JEPA drops with it inside, in evaluation too
        return DROPS
    return None


def scale(attn: nn.Module, found: Known) -> float | None:
    return attn.scale if found.scaled else None


def weights(attn: nn.Module, found: Known) -> tuple:
    """(weight, bias) of queries, keys and values: of one layer, or a tuple of three each."""
    parts = [getattr(attn, name) for name in found.parts]
    if len(parts) == 3:
        return tuple(part.weight for part in parts), tuple(part.bias for part in parts)
    q_bias = getattr(attn, "q_bias", None)
    if q_bias is None:
        return parts[0].weight, parts[0].bias
    return parts[0].weight, (q_bias, getattr(attn, "k_bias", None), attn.v_bias)  # VideoMAE's have none of keys


def attend(
    attn: nn.Module, found: Known, y: Tensor, count: int | None = None, positions: Positions = NOWHERE
) -> Tensor:
    """What an attention without a problem makes of y [B, S, D]: [B, S or the last `count`, D]."""
    weight, bias = weights(attn, found)
    if isinstance(weight, tuple):
        parts = tuple(getattr(attn, name) for name in found.parts)
        heads = attention_of_three(y, parts, attn.num_heads, scale(attn, found), count, positions=positions)
    else:
        if isinstance(bias, tuple):
            q_bias, k_bias, v_bias = bias
            bias = torch.cat([q_bias, torch.zeros_like(q_bias) if k_bias is None else k_bias, v_bias])
        heads = attention(y, weight, bias, attn.num_heads, scale(attn, found), count, positions)
    return _projected(attn, heads)


def cross(attn: nn.Module, found: Known, x: Tensor, memory: Tensor) -> Tensor:
    """The same of queries from x [B, Sq, D], keys and values from `memory` [B, Sk, E]: [B, Sq, D]."""
    q = ops.linear(x, attn.q.weight, attn.q.bias).unflatten(-1, (attn.num_heads, -1))
    kv = ops.linear(memory, attn.kv.weight, attn.kv.bias).unflatten(-1, (2, attn.num_heads, -1))
    return _projected(attn, ops.attention(q, kv, scale=scale(attn, found)).flatten(-2))


def _projected(attn: nn.Module, heads: Tensor) -> Tensor:
    return layers.then(layers.linear(attn.proj, heads), getattr(attn, "proj_drop", None))
