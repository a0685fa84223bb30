"""Pools of packed cells, against SparK's: the dense pool of the zero-filled map, times the mask."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.bench.micro.bench_cells import map_of, to_cells
from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import avg_pool_cells, global_pool_cells, max_pool_cells


def make(stride: int, widths: int, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Behind a ReLU, so that zeros tie with masked sites, as they do in a network."""
    inputs = map_of(shape, stride, shape.width * widths, dtype, generator)
    pooled = inputs["mask"][:, :, ::2, ::2].contiguous()
    count = inputs["mask"].float().sum((2, 3)).to(dtype)
    return {**inputs, "full": inputs["full"].relu(), "x": inputs["x"].relu(), "pooled": pooled, "count": count}


def max_dense(inputs: Inputs) -> Tensor:
    return F.max_pool2d(inputs["full"], 3, 2, 1) * inputs["pooled"]


def max_ours(inputs: Inputs, backend: str | None) -> Tensor:
    return max_pool_cells(inputs["x"], inputs["plan"], 3, 2, 1, backend=backend)


def avg_dense(inputs: Inputs) -> Tensor:
    return F.avg_pool2d(inputs["full"], 2) * inputs["pooled"]


def avg_ours(inputs: Inputs, backend: str | None) -> Tensor:
    return avg_pool_cells(inputs["x"], inputs["plan"], 2, backend=backend)


def global_dense(inputs: Inputs) -> Tensor:
    """The map is zero where it is masked: its sum over the number of active sites."""
    return inputs["full"].sum((2, 3)) / inputs["count"]


def global_ours(inputs: Inputs, backend: str | None) -> Tensor:
    return global_pool_cells(inputs["x"], inputs["plan"], backend=backend)


def to_x(inputs: Inputs, value: Tensor) -> Tensor:
    """The mean over all sites has no layout to change."""
    return value if value.ndim == 2 else to_cells(inputs, value)


def traffic(stride: int, widths: int, tap: int, shape: Shape, item: int) -> tuple[int, int]:
    """tap: bytes of what the backward needs to know for each window."""
    x = shape.batch * shape.keep * (shape.values // shape.channels // stride**2) * shape.width * widths
    both = x * item + x // 4 * (item + tap)
    return both, both


def global_traffic(stride: int, widths: int, shape: Shape, item: int) -> tuple[int, int]:
    x = shape.batch * shape.keep * (shape.values // shape.channels // stride**2) * shape.width * widths
    return x * item, x * item


MAX, AVG = ("max_pool_cells", "max_pool_cells_backward"), ("avg_pool_cells", "avg_pool_cells_backward")
MEAN = ("segment_stats",)
STEM, STAGE_1, STAGE_3, STAGE_4 = (2, 1), (4, 4), (16, 16), (32, 32)  # stride, multiple of width
TABLE = [
    ("max_pool_cells (stem)", MAX, STEM, max_dense, max_ours, partial(traffic, *STEM, 1)),
    ("avg_pool_cells (stage 1)", AVG, STAGE_1, avg_dense, avg_ours, partial(traffic, *STAGE_1, 0)),
    ("avg_pool_cells (stage 3)", AVG, STAGE_3, avg_dense, avg_ours, partial(traffic, *STAGE_3, 0)),
    ("global_pool_cells (stage 1)", MEAN, STAGE_1, global_dense, global_ours, partial(global_traffic, *STAGE_1)),
    ("global_pool_cells (stage 4)", MEAN, STAGE_4, global_dense, global_ours, partial(global_traffic, *STAGE_4)),
]

OPS = [
    Op(
        name,
        raw,
        partial(make, *level),
        dense,
        dense,  # torch's own pools are one kernel each, channels last: there is no better eager form
        ours,
        leaves=("x",),
        traffic=moved,
        cells=True,
        maps={"x": "full"},
        pack=to_x,
        waits=("maefast-reference",) if raw is MEAN else (),  # which splits the rows by sample
    )
    for name, raw, level, dense, ours, moved in TABLE
]


def bench_pool(report):
    report()
