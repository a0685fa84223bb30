"""farthest_points and knn: a cloud into groups of 32, as Point-MAE makes them (1024 points, 64 groups).

The peers are vectorised PyTorch. `eager` is what one writes without a CUDA extension: farthest points by a loop over
all clouds at once, neighbours by a matrix of distances (`torch.cdist`) and `topk`; `tuned` ranks by the matrix product
alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import farthest_points, knn

NEIGHBOURS = 32


def cloud(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape.batch, 16 * shape.tokens, 3, generator=generator, device=generator.device)


def make(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    points = cloud(shape, generator)
    return {"points": points, "centers": points[:, ::16].contiguous(), "count": shape.tokens}


def eager_farthest(inputs: Inputs) -> Tensor:
    points = inputs["points"]
    rows = torch.arange(len(points), device=points.device)
    nearest = points.new_full(points.shape[:2], 1e10)
    at, found = torch.zeros_like(rows), []
    for _ in range(inputs["count"]):
        found.append(at)
        nearest = torch.minimum(nearest, ((points - points[rows, at][:, None]) ** 2).sum(-1))
        at = nearest.argmax(1)
    return torch.stack(found, 1)


def eager_knn(inputs: Inputs) -> Tensor:
    """Sorted squared distances: which of two equal points comes first differs."""
    return torch.cdist(inputs["centers"], inputs["points"]).topk(NEIGHBOURS, largest=False).values ** 2


def tuned_knn(inputs: Inputs) -> Tensor:
    a, b = inputs["centers"], inputs["points"]
    distance = (a * a).sum(-1)[..., None] + (b * b).sum(-1)[:, None] - 2 * a @ b.mT
    return distance.topk(NEIGHBOURS, largest=False).values


def flops(shape: Shape) -> tuple[int, int]:
    """Eight a pair: three differences, three products, two sums. Sixteen points a token."""
    return 8 * shape.batch * 16 * shape.tokens**2, 0


OPS = [
    Op(
        "farthest_points",
        ("farthest_points",),
        make,
        eager_farthest,
        eager_farthest,
        lambda inputs, backend: farthest_points(inputs["points"], inputs["count"], backend=backend),
        dtypes=(torch.float32,),
        flops=flops,
        view=lambda out: (out.double(),),
        named=True,
    ),
    Op(
        "knn",
        ("knn",),
        make,
        eager_knn,
        tuned_knn,
        lambda inputs, backend: knn(inputs["centers"], inputs["points"], NEIGHBOURS, backend=backend)[1],
        dtypes=(torch.float32,),
        flops=flops,
        named=True,
    ),
]


def bench_points(report):
    report()
