"""patch_loss: pixels of the masked patches against predictions.

The prediction is that of all tokens, as published models make it; `ours` also takes masked rows alone, which is
what maefast's own models hand over, and is listed as its own op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maefast.bench.micro.bench_embed import flat, patches, plan_of
from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import patch_loss

EPS = 1e-6


def make(shape: Shape, dtype: torch.dtype, generator: torch.Generator, rows: str) -> Inputs:
    def normal(*sizes):
        return torch.randn(sizes, generator=generator, device=generator.device)

    plan, _, _ = plan_of(shape, generator)
    count = shape.tokens if rows == "all" else shape.masked
    return {
        # Images stay float32: under autocast a prediction meets pixels that were never cast.
        "images": normal(shape.batch, shape.channels, *shape.size),
        "pred": normal(shape.batch, count, shape.values).to(dtype),
        "plan": plan,
        "mask": plan.mask.float(),
        "ids_masked": plan.ids_masked,
        "patch": shape.patch,
        "norm": shape.norm,
        "rows": rows,
    }


def normalise(target: Tensor, norm: str, channels: int) -> Tensor:
    """[..., K] with K ordered (pixels, C)."""
    if norm == "videomae":
        pixels = target.unflatten(-1, (-1, channels))
        var, mean = torch.var_mean(pixels, -2, keepdim=True)
        return ((pixels - mean) / (var.sqrt() + EPS)).flatten(-2)
    var, mean = torch.var_mean(target, -1, keepdim=True)
    return (target - mean) / (var + EPS) ** 0.5


def eager(inputs: Inputs) -> Tensor:
    """As published with MAE: targets of all patches, normalised, squared distance, mask, mean."""
    images, pred = inputs["images"], inputs["pred"]
    target = normalise(patches(images, inputs["patch"], channels_last=True), inputs["norm"], images.shape[1])
    if inputs["rows"] == "masked":
        target = torch.gather(target, 1, inputs["ids_masked"].unsqueeze(-1).expand(-1, -1, target.shape[2]))
        return ((pred - target) ** 2).mean()
    loss = ((pred - target) ** 2).mean(-1)
    return (loss * inputs["mask"]).sum() / inputs["mask"].sum()


def tuned(inputs: Inputs) -> Tensor:
    """Targets of the masked patches only."""
    images, pred, ids_masked = inputs["images"], inputs["pred"], inputs["ids_masked"]
    target = patches(images, inputs["patch"], channels_last=True)
    index = flat(ids_masked, target.shape[1])
    target = normalise(target.flatten(0, 1).index_select(0, index), inputs["norm"], images.shape[1])
    pred = pred.flatten(0, 1)
    if inputs["rows"] == "all":
        pred = pred.index_select(0, index)
    return torch.nn.functional.mse_loss(pred.float(), target)


def ours(inputs: Inputs, backend: str) -> Tensor:
    names = ("pred", "images", "plan", "patch")
    return patch_loss(*(inputs[n] for n in names), norm=inputs["norm"], rows=inputs["rows"], backend=backend)


def traffic(shape: Shape, item: int, rows: str) -> tuple[int, int]:
    masked = shape.batch * shape.masked
    pixels, pred = masked * shape.values * 4, masked * shape.values * item
    written = pred if rows == "masked" else shape.batch * shape.tokens * shape.values * item
    return pixels + pred + masked * 4, pixels + pred + written


OPS = [
    Op(
        name,
        ("patch_loss", "patch_loss_backward"),
        lambda shape, dtype, generator, rows=rows: make(shape, dtype, generator, rows),
        eager,
        tuned,
        ours,
        leaves=("pred",),
        traffic=lambda shape, item, rows=rows: traffic(shape, item, rows),
    )
    for name, rows in (("patch_loss", "all"), ("patch_loss (masked rows)", "masked"))
]


def bench_loss(report):
    report()
