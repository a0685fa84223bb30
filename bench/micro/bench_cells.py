"""pack_cells and unpack_cells, against what published code does to a dense map: times the mask, or a mask token."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from maefast import masking
from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import CellMask, pack_cells, unpack_cells
from maefast.ops.cells import pack_cells_reference


def plan_of(shape: Shape, generator: torch.Generator) -> CellMask:
    grid = tuple(size // cell for size, cell in zip(shape.size, shape.patch))
    tokens = masking.random(
        shape.batch, shape.tokens, keep=shape.keep, generator=generator, device=generator.device, backend="reference"
    )
    return CellMask(tokens, grid)


def map_of(shape: Shape, stride: int, channels: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """A level of `stride`: the plan, the dense mask, the zero-filled map channels last, its packed cells."""
    plan = plan_of(shape, generator)
    size = tuple(side // stride for side in shape.size)
    mask = plan.upsampled_mask(size).to(dtype)
    full = torch.randn(shape.batch, *size, channels, generator=generator, device=generator.device)
    full = (full.to(dtype).permute(0, 3, 1, 2) * mask).contiguous(memory_format=torch.channels_last)
    return {"plan": plan, "mask": mask, "full": full, "x": pack_cells_reference(full, plan).contiguous()}


def to_cells(inputs: Inputs, full: Tensor) -> Tensor:
    return pack_cells_reference(full, inputs["plan"])


# --- pack_cells --------------------------------------------------------------------------------------------


def make_image(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    inputs = map_of(shape, 1, shape.channels, dtype, generator)
    image = torch.randn(inputs["full"].shape, generator=generator, device=generator.device)
    return {"plan": inputs["plan"], "mask": inputs["mask"], "full": image.to(dtype)}


def masked(inputs: Inputs) -> Tensor:
    return inputs["full"] * inputs["mask"]


def pack(inputs: Inputs, backend: str | None) -> Tensor:
    return pack_cells(inputs["full"], inputs["plan"], backend=backend)


# --- unpack_cells ------------------------------------------------------------------------------------------


def make_token(stride: int, widths: int, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    inputs = map_of(shape, stride, shape.width * widths, dtype, generator)
    token = torch.randn(1, shape.width * widths, 1, 1, generator=generator, device=generator.device)
    return {**inputs, "token": token.to(dtype), "active": inputs["mask"].bool()}


def densified(inputs: Inputs) -> Tensor:
    """SparK's densify. One more dimension tells the map that comes out from the gradient that goes in (`to_x`)."""
    full = inputs["full"]
    return torch.where(inputs["active"].expand_as(full), full, inputs["token"])[None]


def densified_tuned(inputs: Inputs) -> Tensor:
    """The mask broadcast, so that it is read once a site; the token's gradient is summed over masked sites."""
    return torch.where(inputs["active"], inputs["full"], inputs["token"])[None]


def unpack(inputs: Inputs, backend: str | None) -> Tensor:
    return unpack_cells(inputs["x"], inputs["plan"], inputs["token"].flatten(), backend=backend)[None]


def to_x(inputs: Inputs, value: Tensor) -> Tensor:
    return value if value.ndim == 5 else to_cells(inputs, value)


def image_traffic(shape: Shape, item: int) -> tuple[int, int]:
    active, whole = (shape.batch * n * shape.values for n in (shape.keep, shape.tokens))
    return 2 * active * item, (active + whole) * item


def map_traffic(stride: int, widths: int, shape: Shape, item: int) -> tuple[int, int]:
    cell = shape.values // shape.channels // stride**2 * shape.width * widths
    active, whole = (shape.batch * n * cell for n in (shape.keep, shape.tokens))
    return (active + whole) * item, (active + whole) * item  # the gradient is read whole: its masked part for the token


LEVELS = {"stage 1": (4, 4), "stage 2": (8, 8), "stage 3": (16, 16), "stage 4": (32, 32)}  # stride, multiple of width

OPS = [
    Op(
        "pack_cells (image)",
        ("pack_cells", "unpack_cells"),
        make_image,
        masked,
        masked,
        pack,
        leaves=("full",),
        traffic=image_traffic,
        cells=True,
        pack=to_cells,
    ),
    *(
        Op(
            f"unpack_cells ({name})",
            ("unpack_cells", "pack_cells", "fill_sum"),
            partial(make_token, *level),
            densified,
            densified_tuned,
            unpack,
            leaves=("x", "token"),
            traffic=partial(map_traffic, *level),
            cells=True,
            maps={"x": "full"},
            pack=to_x,
        )
        for name, level in LEVELS.items()
    ),
]


def bench_cells(report):
    report()
