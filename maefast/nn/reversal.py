"""Gradient reversal: what follows learns a task, what stands before unlearns it (Ganin & Lempitsky, ICML 2015,
arXiv:1409.7495)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * -ctx.scale, None


def reverse_gradient(x: Tensor, scale: float = 1.0) -> Tensor:
    """x itself, whose gradient is multiplied by -`scale` on its way back.

    Args:
        x: any floating tensor. scale: lambda, not negative; 0 stops the gradient's effect.

    Raises:
        ValueError: scale is negative or not finite. TypeError: x is not a floating tensor.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if not 0 <= scale < float("inf"):
        raise ValueError(f"scale must be finite and not negative, got {scale}")
    return _Reversal.apply(x, scale)
