"""conv_cells: the convolutions of a ResNet-50 over the active cells of a masked image, and of a 3-D U-Net's encoder
over those of a volume, against the dense ones.

The peers compute what published code does, the dense convolution of the masked map times the mask, channels last. Their
maps stand unpacked and ours packed before the clock starts; results and gradients are compared at the active sites.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast import masking
from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import VOLUME_OPS, Shape
from maefast.ops import CellMask, conv_cells, pack_cells, unpack_cells


def plan_of(shape: Shape, generator: torch.Generator) -> CellMask:
    grid = tuple(size // patch for size, patch in zip(shape.size, shape.patch, strict=True))
    noise = torch.rand(shape.batch, shape.tokens, generator=generator, device=generator.device)
    return CellMask(masking.random(shape.batch, shape.tokens, keep=shape.keep, noise=noise), grid)


def layer(name: str, level: int, wide_in: int, wide_out: int, kernel: int, stride: int) -> Op:
    """A convolution at 1 / level of the image, wide_in to wide_out times the width (0: from the image itself)."""
    name = f"conv_cells ({name})"
    solid = name in VOLUME_OPS
    conv, last = (F.conv3d, torch.channels_last_3d) if solid else (F.conv2d, torch.channels_last)

    def make(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        def normal(*sizes):
            return torch.randn(sizes, generator=generator, device=generator.device).to(dtype)

        plan = plan_of(shape, generator)
        channels, out = wide_in * shape.width or shape.channels, wide_out * shape.width
        sides = [patch // level for patch in shape.patch]
        x = normal(plan.total, *sides, channels)
        weight = normal(out, channels, *[kernel] * len(sides)) * (channels * kernel ** len(sides)) ** -0.5
        mask = plan.upsampled_mask(tuple(size // level // stride for size in shape.size))
        return {
            "x": x,
            "map": unpack_cells(x, plan).contiguous(memory_format=last),
            "weight": weight.contiguous(memory_format=last),
            "mask": mask.to(dtype),
            "plan": plan,
        }

    def eager(inputs: Inputs) -> Tensor:
        return conv(inputs["map"], inputs["weight"], None, stride, kernel // 2) * inputs["mask"]

    def tuned(inputs: Inputs) -> Tensor:
        return conv(inputs["map"], inputs["weight"], None, stride, kernel // 2).mul_(inputs["mask"])

    def ours(inputs: Inputs, backend: str | None) -> Tensor:
        x, plan, weight = (inputs[name] for name in ("x", "plan", "weight"))
        return conv_cells(x, plan, weight, None, stride, kernel // 2, backend=backend)

    def sizes(shape: Shape) -> tuple[int, int, int, int]:
        """(active sites in, active sites out, values of the weight, channels in)."""
        sites = shape.batch * shape.keep * prod(patch // level for patch in shape.patch)
        channels = wide_in * shape.width or shape.channels
        weight = channels * wide_out * shape.width * kernel ** len(shape.patch)
        return sites, sites // stride ** len(shape.patch), weight, channels

    def flops(shape: Shape) -> tuple[int, int]:
        """Whole windows at active sites; backward twice, or once where the image needs no gradient."""
        _, out, weight, _ = sizes(shape)
        return 2 * out * weight, (4 if wide_in else 2) * out * weight

    def traffic(shape: Shape, item: int) -> tuple[int, int]:
        sites, out, weight, channels = sizes(shape)
        x, y = sites * channels, out * wide_out * shape.width
        return (x + weight + y) * item, (y + x + weight + (x + weight if wide_in else 0)) * item

    return Op(
        name,
        (),
        make,
        eager,
        tuned,
        ours,
        leaves=("x", "weight") if wide_in else ("weight",),
        traffic=traffic,
        flops=flops,
        maps={"x": "map"} if wide_in else {},
        pack=lambda inputs, full: pack_cells(full, inputs["plan"]),
        cells=True,
        named=solid,
    )


OPS = [
    layer("stem 7x7 s2", 1, 0, 1, 7, 2),
    layer("3x3 stage 1", 4, 1, 1, 3, 1),
    layer("3x3 s2 stage 2", 4, 2, 2, 3, 2),
    layer("3x3 stage 2", 8, 2, 2, 3, 1),
    layer("3x3 s2 stage 3", 8, 4, 4, 3, 2),
    layer("3x3 stage 3", 16, 4, 4, 3, 1),
    layer("3x3 s2 stage 4", 16, 8, 8, 3, 2),
    layer("3x3 stage 4", 32, 8, 8, 3, 1),
    layer("1x1 stage 3", 16, 16, 4, 1, 1),
    layer("1x1 s2 stage 3", 8, 8, 16, 1, 2),
    layer("3x3x3 stage 1", 1, 1, 1, 3, 1),
    layer("3x3x3 s2 stage 2", 1, 1, 2, 3, 2),
    layer("3x3x3 stage 2", 2, 2, 2, 3, 1),
    layer("3x3x3 stage 3", 4, 4, 4, 3, 1),
    layer("3x3x3 stage 4", 8, 8, 8, 3, 1),
    layer("3x3x3 s2 stage 5", 8, 8, 10, 3, 2),
]


def bench_sparse_conv(report):
    report()
