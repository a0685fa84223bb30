"""conv_transpose_cells: the steps up of a U-Net at the active cells, against the dense transposed convolution times the
mask (channels last). Maps stand unpacked and cells packed before the clock starts, as in `bench_sparse_conv`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.bench.micro.bench_sparse_conv import plan_of
from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import conv_transpose_cells, pack_cells, unpack_cells


def layer(name: str, level: int, wide_in: int, wide_out: int, kernel: int, padding: int) -> Op:
    """From 1 / level of the image to twice the sites, wide_in to wide_out times the width."""

    def make(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        def normal(*sizes):
            return torch.randn(sizes, generator=generator, device=generator.device).to(dtype)

        plan = plan_of(shape, generator)
        channels, out = wide_in * shape.width, wide_out * shape.width
        height, width = (patch // level for patch in shape.patch)
        x = normal(plan.total, height, width, channels)
        return {
            "x": x,
            "map": unpack_cells(x, plan).contiguous(memory_format=torch.channels_last),
            "weight": normal(channels, out, kernel, kernel) * (channels * kernel**2 / 4) ** -0.5,
            "mask": plan.upsampled_mask(tuple(2 * size // level for size in shape.size)).to(dtype),
            "plan": plan,
        }

    def eager(inputs: Inputs) -> Tensor:
        return F.conv_transpose2d(inputs["map"], inputs["weight"], None, 2, padding) * inputs["mask"]

    def tuned(inputs: Inputs) -> Tensor:
        return F.conv_transpose2d(inputs["map"], inputs["weight"], None, 2, padding).mul_(inputs["mask"])

    def ours(inputs: Inputs, backend: str | None) -> Tensor:
        x, plan, weight = (inputs[name] for name in ("x", "plan", "weight"))
        return conv_transpose_cells(x, plan, weight, None, 2, padding, backend=backend)

    def sizes(shape: Shape) -> tuple[int, int]:
        """(active sites in, values of the weight)."""
        sites = shape.batch * shape.keep * (shape.patch[0] // level) * (shape.patch[1] // level)
        return sites, wide_in * wide_out * (shape.width * kernel) ** 2

    def flops(shape: Shape) -> tuple[int, int]:
        sites, weight = sizes(shape)
        return 2 * sites * weight, 4 * sites * weight

    def traffic(shape: Shape, item: int) -> tuple[int, int]:
        sites, weight = sizes(shape)
        x, y = sites * wide_in * shape.width, 4 * sites * wide_out * shape.width
        return (x + weight + y) * item, (y + 2 * x + 2 * weight) * item

    return Op(
        f"conv_transpose_cells ({name})",
        (),
        make,
        eager,
        tuned,
        ours,
        leaves=("x", "weight"),
        traffic=traffic,
        flops=flops,
        maps={"x": "map"},
        pack=lambda inputs, full: pack_cells(full, inputs["plan"]),
        cells=True,
    )


OPS = [layer("2x2 s2 to stage 2", 16, 4, 2, 2, 0), layer("4x4 s2 to stage 2", 16, 4, 2, 4, 1)]


def bench_conv_transpose(report):
    report()
