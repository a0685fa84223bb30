"""linear: the layers of a block, on the library that `ops.linear_library` names for this CPU.

float32 on a CPU only: everything else is `F.linear` itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import linear


def layer(part: str, wide_in: int, wide_out: int) -> Op:
    """A layer of the encoder or the decoder, wide_in to wide_out times its width, over all its tokens."""

    def sizes(shape: Shape) -> tuple[int, int, int]:
        """(rows of a sample, values of each, values of each result)."""
        encoder = part == "encoder"
        width, tokens = (shape.width, shape.keep) if encoder else (shape.decoder_width, shape.tokens)
        return shape.prefix + tokens, wide_in * width, wide_out * width

    def flops(shape: Shape) -> tuple[int, int]:
        rows, k, n = sizes(shape)
        return 2 * shape.batch * rows * k * n, 4 * shape.batch * rows * k * n

    def traffic(shape: Shape, item: int) -> tuple[int, int]:
        rows, k, n = sizes(shape)
        x, out = shape.batch * rows * k, shape.batch * rows * n
        return (x + k * n + out) * item, (out + 2 * x + 2 * k * n) * item

    def make(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        def normal(*sizes):
            return torch.randn(sizes, generator=generator, device=generator.device).to(dtype)

        rows, k, n = sizes(shape)
        return {
            "x": normal(shape.batch, rows, k),
            "weight": normal(n, k) * k**-0.5,
            "bias": normal(n),
        }

    name = {(1, 3): "qkv", (1, 4): "MLP up", (4, 1): "MLP down"}[wide_in, wide_out]
    return Op(
        f"linear ({part} {name})",
        (),
        make,
        eager,
        eager,
        ours,
        leaves=("x", "weight", "bias"),
        traffic=traffic,
        flops=flops,
        dtypes=(torch.float32,),
        devices=("cpu",),
    )


def eager(inputs: Inputs) -> Tensor:
    return F.linear(inputs["x"], inputs["weight"], inputs["bias"])


def ours(inputs: Inputs, backend: str | None) -> Tensor:
    return linear(inputs["x"], inputs["weight"], inputs["bias"])


OPS = [layer(part, *wide) for part in ("encoder", "decoder") for wide in ((1, 3), (1, 4), (4, 1))]


def bench_linear(report):
    report()
