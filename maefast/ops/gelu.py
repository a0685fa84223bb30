"""Bias and GELU in one pass: `bias_gelu`, between the two linear layers of an MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _autograd, _checks, _dispatch, _registry

_raw_op = _registry.family("gelu")


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """``GELU(x + bias)`` (Hendrycks and Gimpel, 2016); the backward also sums the gradient of the bias.

    Args:
        x: [..., D]. bias: [D] or None. approximate: "none" (erf, as in ViT and MAE) or "tanh".

    Returns:
        Like x. 16-bit input is computed in float32 and rounded once. The gradient of the bias is deterministic.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.
    """
    _checks.tensor("x", x)
    if x.ndim < 1:
        raise ValueError("x must have at least one dimension, [..., D]; got a tensor of none")
    _checks.one_of("approximate", approximate, ("none", "tanh"))
    _checks.same_device(x=x, bias=bias)
    if bias is not None:
        bias = _checks.vector("bias", bias, x.shape[-1])
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        bias = (bias if bias.dtype is wide else bias.to(wide)).contiguous()
    name = _dispatch.choose("bias_gelu", x.device.type, x.dtype, backend)
    if name == "reference" or not x.shape[-1]:  # rows of nothing cannot be counted
        return bias_gelu_reference(x, bias, approximate == "tanh")
    return _autograd.apply(_BiasGelu, x.contiguous(), bias, approximate == "tanh", name)


def bias_gelu_reference(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """The definition, differentiable."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    shifted = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    return F.gelu(shifted, approximate="tanh" if tanh else "none").to(x.dtype)


@_raw_op("bias_gelu(Tensor x, Tensor? bias, bool tanh) -> Tensor")
def _bias_gelu_fake(x, bias, tanh):
    return x.new_empty(x.shape)


# With need_out the GELU once more, else empty.
@_raw_op(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias, bool tanh, bool need_bias, bool need_out=False)"
    " -> (Tensor, Tensor, Tensor)"
)
def _bias_gelu_backward_fake(grad, x, bias, tanh, need_bias, need_out=False):
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[1:] if need_bias else (0,), dtype=wide),
        x.new_empty((x.shape[0] if need_out else 0, x.shape[1])),
    )


class _BiasGelu(torch.autograd.Function):
    """Takes and returns [..., D]; the views are taken in here for the reasons that `_AddNorm` has."""

    @staticmethod
    def forward(ctx, x, bias, tanh, name):
        if ctx is not None:
            ctx.save_for_backward(x, bias)
            ctx.tanh, ctx.backend = tanh, name
        out = _registry.raw("bias_gelu", name)(x.view(-1, x.shape[-1]), bias, tanh)
        return torch.ops.aten._unsafe_view.default(out, x.shape)

    @staticmethod
    @_autograd.once("bias_gelu")
    def backward(ctx, grad):
        x, bias = ctx.saved_tensors
        need_x, need_bias = ctx.needs_input_grad[:2]
        run = _registry.raw("bias_gelu_backward", ctx.backend)
        rows = (-1, x.shape[-1])
        grad_x, grad_bias, _ = run(grad.reshape(rows).contiguous(), x.view(rows), bias, ctx.tanh, need_bias)
        return grad_x.view(x.shape) if need_x else None, grad_bias if need_bias else None, None, None
