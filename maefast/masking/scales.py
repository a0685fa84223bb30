"""Numbers of any size brought to where their squares neither overflow nor vanish."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Float32 at least."""
    return x if x.dtype.itemsize > 2 else x.float()


def scaled(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """x, float32 at least, times a power of two for each slice along `dim`: its largest magnitude comes to lie in
    [0.5, 1). Exact but for what is 2^-126 of that."""
    x = wide(x)
    exponent = torch.frexp(x.abs().amax(dim, keepdim=True)).exponent
    half = exponent.div(2, rounding_mode="floor")  # in two steps, whose factors are normal numbers
    return torch.ldexp(torch.ldexp(x, -half), half - exponent)
