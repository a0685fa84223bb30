"""restore_tokens: visible tokens back among mask tokens, with the decoder's positions."""

from __future__ import annotations

import torch
from torch import Tensor

from maefast.bench.micro.bench_embed import flat, plan_of
from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import restore_tokens


def make(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    def normal(*sizes):
        return torch.randn(sizes, generator=generator, device=generator.device).to(dtype)

    plan, ids_keep, ids_restore = plan_of(shape, generator)
    return {
        "x": normal(shape.batch, shape.prefix + shape.keep, shape.decoder_width),
        "mask_token": normal(1, 1, shape.decoder_width),
        "pos": normal(1, shape.prefix + shape.tokens, shape.decoder_width),
        "prefix": shape.prefix,
        "plan": plan,
        "ids_keep": ids_keep,
        "ids_restore": ids_restore,
    }


def eager(inputs: Inputs) -> Tensor:
    """As published with MAE: repeat the mask token, concatenate, gather by ids_restore, add positions."""
    x, mask_token, ids_restore, prefix = (inputs[k] for k in ("x", "mask_token", "ids_restore", "prefix"))
    fill = mask_token.repeat(x.shape[0], ids_restore.shape[1] + prefix - x.shape[1], 1)
    tokens = torch.cat([x[:, prefix:], fill], 1)
    tokens = torch.gather(tokens, 1, ids_restore.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, :prefix], tokens], 1) + inputs["pos"]


def tuned(inputs: Inputs) -> Tensor:
    """Mask token plus position once for all samples, then the visible rows copied over it."""
    x, pos, ids_keep, prefix = (inputs[k] for k in ("x", "pos", "ids_keep", "prefix"))
    batch, length = x.shape[0], pos.shape[1]
    base = torch.cat([pos[:, :prefix], pos[:, prefix:] + inputs["mask_token"]], 1)
    rows = ids_keep + prefix
    if prefix:
        lead = torch.arange(prefix, device=rows.device).expand(batch, prefix)
        rows = torch.cat([lead, rows], 1)
    out = base.expand(batch, -1, -1).flatten(0, 1)
    return out.index_copy(0, flat(rows, length), (x + pos[0][rows]).flatten(0, 1)).view(batch, length, -1)


def ours(inputs: Inputs, backend: str) -> Tensor:
    names = ("x", "plan", "mask_token")
    return restore_tokens(*(inputs[n] for n in names), pos=inputs["pos"], prefix=inputs["prefix"], backend=backend)


def traffic(shape: Shape, item: int) -> tuple[int, int]:
    row = shape.decoder_width * item
    packed = shape.batch * (shape.prefix + shape.keep) * row
    full = shape.batch * (shape.prefix + shape.tokens) * row
    index = shape.batch * shape.tokens * 4
    forward = packed + (shape.prefix + shape.tokens + 1) * row + index + full
    return forward, full + index + packed + row


OPS = [
    Op(
        "restore_tokens",
        ("restore_tokens", "restore_tokens_backward"),
        make,
        eager,
        tuned,
        ours,
        leaves=("x", "mask_token"),
        traffic=traffic,
    )
]


def bench_restore(report):
    report()
