"""chamfer: the masked groups of Point-MAE, 38 of 64 a cloud, 32 points each. The peer is `torch.cdist`, squared."""

from __future__ import annotations

import torch
from torch import Tensor

from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import chamfer

POINTS = 32


def make(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    def normal():
        return torch.randn(shape.batch * shape.masked, POINTS, 3, generator=generator, device=generator.device)

    return {"a": normal(), "b": normal()}


def nearest(distance: Tensor) -> Tensor:
    return distance.min(2).values.mean() + distance.min(1).values.mean()


def eager(inputs: Inputs) -> Tensor:
    return nearest(torch.cdist(inputs["a"], inputs["b"]) ** 2)


def tuned(inputs: Inputs) -> Tensor:
    """Without the root, whose gradient is costly."""
    return nearest((inputs["a"][:, :, None] - inputs["b"][:, None]).square().sum(-1))


def traffic(shape: Shape, item: int) -> tuple[int, int]:
    values = 2 * shape.batch * shape.masked * POINTS * 3 * item
    return values, 2 * values


def flops(shape: Shape) -> tuple[int, int]:
    """Eight a pair: three differences, three products, two sums."""
    return 8 * shape.batch * shape.masked * POINTS**2, 0


OPS = [
    Op(
        "chamfer",
        ("chamfer", "chamfer_backward"),
        make,
        eager,
        tuned,
        lambda inputs, backend: chamfer(inputs["a"], inputs["b"], backend=backend),
        leaves=("a", "b"),
        dtypes=(torch.float32,),
        traffic=traffic,
        flops=flops,
        named=True,
    )
]


def bench_chamfer(report):
    report()
