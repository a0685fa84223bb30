"""feature_loss: the visible rows of a student against those of a teacher that ran on every token.

DMAE, 50 of 197 rows of 1024 values; G2SD, every row of 512; MaskAlign, 59 rows of 768. The peers compute in float32, as
torch.autocast makes them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import feature_loss


def make(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    device = generator.device
    count, rows, width = shape.prefix + shape.tokens, shape.prefix + shape.keep, shape.width
    pred = torch.randn(shape.batch, rows, width, generator=generator, device=device).to(dtype)
    target = torch.randn(shape.batch, count, width, generator=generator, device=device).to(dtype)
    if rows == count:
        return {"pred": pred, "target": target, "index": None, "flat": None}
    index = torch.rand(shape.batch, count, generator=generator, device=device).argsort(1)[:, :rows]
    return {
        "pred": pred,
        "target": target,
        "index": index,
        "flat": (index + count * torch.arange(shape.batch, device=device)[:, None]).int(),
    }


def gathered(inputs: Inputs) -> tuple[Tensor, Tensor]:
    pred, target, index = inputs["pred"], inputs["target"], inputs["index"]
    if index is not None:
        target = target.gather(1, index[..., None].expand(-1, -1, target.shape[-1]))
    return pred.float(), target.float()


def selected(inputs: Inputs) -> tuple[Tensor, Tensor]:
    pred, target, flat = (inputs[name] for name in ("pred", "target", "flat"))
    target = target.flatten(0, 1)
    target = target if flat is None else target.index_select(0, flat.flatten())
    return pred.flatten(0, 1).float(), target.float()


def layernorm(rows):
    def run(inputs: Inputs) -> Tensor:
        pred, target = rows(inputs)
        return F.smooth_l1_loss(pred, F.layer_norm(target, target.shape[-1:], eps=1e-6))

    return run


def l2(inputs: Inputs) -> Tensor:
    pred, target = gathered(inputs)
    return F.l1_loss(F.normalize(pred, dim=-1), F.normalize(target, dim=-1))


def l2_tuned(inputs: Inputs) -> Tensor:
    pred, target = selected(inputs)
    pred, target = (x * x.square().sum(-1, keepdim=True).rsqrt() for x in (pred, target))
    return F.l1_loss(pred, target)


def cosine(inputs: Inputs) -> Tensor:
    pred, target = (F.normalize(x, dim=-1) for x in gathered(inputs))
    return (1 - (pred * target).sum(-1)).pow(2).mean()


def cosine_tuned(inputs: Inputs) -> Tensor:
    return (1 - F.cosine_similarity(*selected(inputs), dim=-1)).square().mean()


def op(name: str, eager, tuned, **options) -> Op:
    def ours(inputs: Inputs, backend: str | None) -> Tensor:
        return feature_loss(inputs["pred"], inputs["target"], index=inputs["flat"], **options, backend=backend)

    def traffic(shape: Shape, size: int) -> tuple[int, int]:
        rows = shape.batch * (shape.prefix + shape.keep) * shape.width * size
        return 2 * rows, 3 * rows

    raw = ("feature_loss", "feature_loss_backward")
    return Op(f"feature_loss ({name})", raw, make, eager, tuned, ours, leaves=("pred",), traffic=traffic, named=True)


OPS = [
    op("layernorm, smooth l1", layernorm(gathered), layernorm(selected), norm="layernorm", loss="smooth_l1"),
    op("l2, l1", l2, l2_tuned, norm="l2", loss="l1"),
    op("cosine", cosine, cosine_tuned, loss="cosine", power=2.0),
]


def bench_feature_loss(report):
    report()
