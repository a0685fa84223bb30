"""token_mask: scores to a plan."""

from __future__ import annotations

import torch
from torch import Tensor

from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import TokenMask, token_mask


def make(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    # Distinct scores: torch's default sort need not be stable, so ties could compare unequal for no one's fault.
    noise = torch.rand(shape.batch, shape.tokens, generator=generator, device=generator.device)
    return {"noise": (noise.argsort(1) + 0.5) / shape.tokens, "keep": shape.keep}


def eager(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """As published with MAE: two sorts, then the mask gathered into place."""
    noise, keep = inputs["noise"], inputs["keep"]
    order = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(order, dim=1)
    mask = torch.ones(noise.shape, device=noise.device)
    mask[:, :keep] = 0
    return order[:, :keep], ids_restore, torch.gather(mask, 1, ids_restore)


def tuned(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """One sort; its inverse is a scatter of 0..N-1, and the mask a comparison."""
    noise, keep = inputs["noise"], inputs["keep"]
    order = torch.argsort(noise, dim=1)
    ranks = torch.arange(noise.shape[1], device=noise.device).expand_as(order)
    ids_restore = torch.empty_like(order).scatter_(1, order, ranks)
    return order[:, :keep], ids_restore, (ids_restore >= keep).float()


def view(out: TokenMask | tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    if isinstance(out, TokenMask):
        return out.ids_keep, out.ids_restore, out.mask.float()
    return out


def traffic(shape: Shape, item: int) -> tuple[int, int]:
    tokens = shape.batch * shape.tokens
    return tokens * 4 + 2 * tokens * 4, 0  # scores read; visible + masked and slot written, int32


OPS = [
    Op(
        "token_mask",
        ("token_mask",),
        make,
        eager,
        tuned,
        lambda inputs, backend: token_mask(inputs["noise"], inputs["keep"], backend=backend),
        dtypes=(torch.float32,),  # noise is drawn in float32, also under autocast
        traffic=traffic,
        view=view,
    )
]


def bench_mask(report):
    report()
