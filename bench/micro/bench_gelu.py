"""bias_gelu: between the two linear layers of a decoder block's MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import bias_gelu


def make(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    def normal(*sizes):
        return torch.randn(sizes, generator=generator, device=generator.device).to(dtype)

    hidden = 4 * shape.decoder_width
    return {"x": normal(shape.batch, shape.prefix + shape.tokens, hidden), "bias": normal(hidden)}


def eager(inputs: Inputs) -> Tensor:
    """Exact GELU of the sum. (A linear layer can add its bias itself; then only the GELU remains.)"""
    return F.gelu(inputs["x"] + inputs["bias"])


def ours(inputs: Inputs, backend: str) -> Tensor:
    return bias_gelu(inputs["x"], inputs["bias"], backend=backend)


def traffic(shape: Shape, item: int) -> tuple[int, int]:
    values = shape.batch * (shape.prefix + shape.tokens) * 4 * shape.decoder_width
    return 2 * values * item, 3 * values * item


OPS = [
    Op(
        "bias_gelu",
        ("bias_gelu", "bias_gelu_backward"),
        make,
        eager,
        eager,
        ours,
        leaves=("x", "bias"),
        traffic=traffic,
    )
]


def bench_gelu(report):
    report()
