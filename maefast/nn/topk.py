"""Attention of each query to the keys that it looks at most: the homologous attention of MixedAE (Chen et al., CVPR
2023, arXiv:2303.17152)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maefast import ops
from maefast.nn.block import Attention, Block
from maefast.ops import _checks
from maefast.ops.transformer_block import scaled

FEW_THREADS = 4  # below, numpy's selection on one thread is faster than torch's on all


def topk_attention(q: Tensor, k: Tensor, v: Tensor, count: int, scale: float | None = None) -> Tensor:
    """``softmax(top(q k^T * scale)) v``, where `top` keeps the `count` largest scores of each row and rules out the
    others; those that equal the last of them stay too.

    Rows are selected without gradients, by scores in float32 at least; the gradient of what is kept is exact. Of all
    pairs, a bool each is what this adds to attention's memory.

    Args:
        q: [B, H, Sq, D]. k, v: [B, H, Sk, D]. count: k, from 1; Sk or more is ordinary attention.
        scale: defaults to 1 / sqrt(D).

    Returns:
        [B, H, Sq, D].

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit; count is not positive.
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(name, value, ndim=4)
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q must be [B, H, Sq, D] and k, v [B, H, Sk, D], got "
            + ", ".join(str(tuple(value.shape)) for value in (q, k, v))
        )
    _checks.integer("count", count, 1)
    if scale is not None:
        _checks.positive("scale", scale)
    kept = None if count >= k.shape[2] else _largest(q, k, count)
    return F.scaled_dot_product_attention(q, k, v, kept, scale=scale)


@torch.no_grad()
def _largest(q: Tensor, k: Tensor, count: int) -> Tensor:
    """bool [B, H, Sq, Sk], True for the `count` largest of each row of q k^T."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(wide) @ k.to(wide).transpose(2, 3)
    if scores.device.type == "cpu" and torch.get_num_threads() < FEW_THREADS and not torch.compiler.is_compiling():
        at = scores.shape[3] - count
        least = torch.from_numpy(np.partition(scores.numpy(), at, axis=3)[..., at : at + 1])
    else:
        least = scores.topk(count, sorted=False).values.amin(3, keepdim=True)
    return scores >= least


def run_topk_blocks(blocks: Iterable[Block], x: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """As `maefast.nn.run_blocks`, x [B, S, D] through all blocks as a pending sum (x, delta), but with `topk_attention`
    in them. The parameters are those of ordinary blocks, which read them as they are afterwards."""
    delta = None
    for block in blocks:
        drops = block._drops(x, None, None)
        x, y = (x, block.norm1(x)) if delta is None else block.norm1(x, delta)
        x, y = block.norm2(x, scaled(_attend(block.attn, y, count), block.gamma_1, drops[0]))
        delta = scaled(block.mlp(y), block.gamma_2, drops[1])
    return x, delta


def _attend(attn: Attention, x: Tensor, count: int) -> Tensor:
    qkv = ops.linear(x, attn.qkv.weight, attn.shift()).unflatten(-1, (3, attn.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return attn.proj(topk_attention(q, k, v, count).transpose(1, 2).flatten(2))
