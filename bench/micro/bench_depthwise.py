"""depthwise_cells: the 7 x 7 convolutions of a ConvNeXt-T, one of each stage, against the dense ones.

The peers compute what published code does, the dense convolution of the masked map times the mask, channels last. Their
maps stand unpacked and ours packed before the clock starts; results and gradients are compared at the active sites.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.bench.micro.bench_sparse_conv import plan_of
from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import depthwise_cells, pack_cells, unpack_cells

KERNEL = 7


def channels_of(shape: Shape, level: int) -> int:
    """A ConvNeXt-T is 96 wide where a ResNet-50's shape says 64."""
    return shape.width * 3 // 2 * (level // 4)


def eager(inputs: Inputs) -> Tensor:
    x = inputs["map"]
    return F.conv2d(x, inputs["weight"], inputs["bias"], 1, KERNEL // 2, 1, x.shape[1]) * inputs["mask"]


def tuned(inputs: Inputs) -> Tensor:
    x = inputs["map"]
    return F.conv2d(x, inputs["weight"], inputs["bias"], 1, KERNEL // 2, 1, x.shape[1]).mul_(inputs["mask"])


def ours(inputs: Inputs, backend: str | None) -> Tensor:
    return depthwise_cells(*(inputs[name] for name in ("x", "plan", "weight", "bias")), backend=backend)


def layer(name: str, level: int) -> Op:
    """At 1 / level of the image."""

    def make(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        def normal(*sizes):
            return torch.randn(sizes, generator=generator, device=generator.device).to(dtype)

        plan, channels = plan_of(shape, generator), channels_of(shape, level)
        x = normal(plan.total, *(patch // level for patch in shape.patch), channels)
        return {
            "x": x,
            "map": unpack_cells(x, plan).contiguous(memory_format=torch.channels_last),
            "weight": normal(channels, 1, KERNEL, KERNEL) / KERNEL,
            "bias": normal(channels),
            "mask": plan.upsampled_mask(tuple(size // level for size in shape.size)).to(dtype),
            "plan": plan,
        }

    def traffic(shape: Shape, item: int) -> tuple[int, int]:
        sites = shape.batch * shape.keep * (shape.patch[0] // level) * (shape.patch[1] // level)
        one = sites * channels_of(shape, level) * item
        return 2 * one, 4 * one  # x, y; grad y twice, x, grad x

    def flops(shape: Shape) -> tuple[int, int]:
        """Held against the rate of matrix products, which a GPU's kernel cannot use: there a bound that is too low."""
        sites = shape.batch * shape.keep * (shape.patch[0] // level) * (shape.patch[1] // level)
        one = 2 * sites * channels_of(shape, level) * KERNEL**2
        return one, 2 * one

    return Op(
        f"depthwise_cells ({name})",
        ("depthwise", "depthwise_grad_weight"),
        make,
        eager,
        tuned,
        ours,
        leaves=("x", "weight", "bias"),
        traffic=traffic,
        flops=flops,
        maps={"x": "map"},
        pack=lambda inputs, full: pack_cells(full, inputs["plan"]),
        cells=True,
    )


OPS = [layer(f"7x7 stage {stage}", 2 ** (stage + 1)) for stage in (1, 2, 3, 4)]


def bench_depthwise(report):
    report()
