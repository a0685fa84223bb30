"""add_norm: residual add and LayerNorm, between the halves of a decoder block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import add_norm

EPS = 1e-6


def make(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """A float32 stream, as under autocast; what is added and what comes out have the measured dtype."""
    rows = shape.batch, shape.prefix + shape.tokens, shape.decoder_width

    def normal(*sizes):
        return torch.randn(sizes, generator=generator, device=generator.device)

    return {
        "x": normal(*rows),
        "delta": normal(*rows).to(dtype),
        "weight": normal(shape.decoder_width),
        "bias": normal(shape.decoder_width),
        "dtype": dtype,
    }


def eager(inputs: Inputs) -> Tensor:
    """What a pre-norm block does: add, normalise, and the cast that autocast makes before the next product."""
    x = inputs["x"] + inputs["delta"]
    return F.layer_norm(x, x.shape[-1:], inputs["weight"], inputs["bias"], EPS).to(inputs["dtype"])


def ours(inputs: Inputs, backend: str) -> Tensor:
    names = ("x", "delta", "weight", "bias")
    return add_norm(*(inputs[n] for n in names), EPS, dtype=inputs["dtype"], backend=backend)[1]


def traffic(shape: Shape, item: int) -> tuple[int, int]:
    values = shape.batch * (shape.prefix + shape.tokens) * shape.decoder_width
    forward = values * (4 + item + 4 + item)  # x, delta; sum, y
    return forward, values * (item + 4 + 4 + (item if item != 4 else 0))  # grad y, sum; grad x, grad delta


OPS = [
    Op(
        "add_norm",
        ("add_norm", "add_norm_backward"),
        make,
        eager,
        eager,  # torch's own LayerNorm is one kernel already: there is no better eager form
        ours,
        leaves=("x", "delta", "weight", "bias"),
        traffic=traffic,
    )
]


def bench_norm(report):
    report()
