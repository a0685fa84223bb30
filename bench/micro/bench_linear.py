"""linear: the layers of a block, on the library that `ops.linear_library` names for this CPU.

float32 on a CPU only: everything else is `F.linear` itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.bench.micro.shapes import Shape
from maefast.bench.micro.suite import Inputs, Op
from maefast.ops import linear


def layer(part: str, wide_in: int, wide_out: int) -> Op:
    """A layer of the encoder or the decoder, wide_in to wide_out times its width, over all its tokens."""

    def make(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        encoder = part == "encoder"
        width, tokens = (shape.width, shape.keep) if encoder else (shape.decoder_width, shape.tokens)

        def normal(*sizes):
            return torch.randn(sizes, generator=generator, device=generator.device).to(dtype)

        k, n = wide_in * width, wide_out * width
        return {
            "x": normal(shape.batch, shape.prefix + tokens, k),
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
