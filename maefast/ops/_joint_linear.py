"""Several linear layers of one input as one product, without keeping a copy of their weights side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from maefast.ops import _autograd, _checks, _dispatch
from maefast.ops.linear import apart, linear, products


def joint_linear(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> Tensor:
    """x [..., K], weights [N_i, K], biases [N_i] or None (zero) -> [..., sum N_i], one layer's columns after another.

    `linear` of the weights side by side, which autograd would keep until the backward: of small batches more than the
    activations. Here the copy is made again there, or, where the library writes into slices, never.
    """
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases)])
    if (
        torch.compiler.is_compiling()  # whose graph has the copy as it likes
        or any(w.dtype is not x.dtype for w in weights)
        or _checks.autocast(x.device.type) is not None  # which keeps what it casts
        or _dispatch.forced() == "reference"
    ):
        return linear(x, torch.cat(weights), bias)
    return _autograd.apply(_JointLinear, x, bias, *weights)


def _layer(x: Tensor, weights: tuple[Tensor, ...]) -> tuple:
    """The products, and the weights as they take them."""
    inputs, outputs = x.shape[-1], sum(w.shape[0] for w in weights)
    found = apart(x.device.type, x.dtype, inputs, outputs)
    if found is not None:
        return found, tuple(w.contiguous() for w in weights)
    return products(x.device.type, x.dtype, x.numel() // max(1, inputs), inputs, outputs), torch.cat(weights)


class _JointLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, *weights):
        if ctx is not None:
            ctx.save_for_backward(x, *weights)
            ctx.bias_dtype = None if bias is None else bias.dtype
        layer, weight = _layer(x, weights)
        out = layer.forward(x.reshape(-1, x.shape[-1]), weight, bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @_autograd.once("linear")
    def backward(ctx, grad):
        x, *weights = ctx.saved_tensors
        need_x, need_bias, *need = ctx.needs_input_grad
        layer, weight = _layer(x, tuple(weights))
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        grad_x = layer.input_gradient(rows, weight).view(x.shape) if need_x else None
        if not any(need):
            return grad_x, rows.sum(0) if need_bias else None, *[None] * len(need)
        of_weight, of_bias = layer.weight_gradient(
            rows, x.reshape(-1, x.shape[-1]), weights[0].dtype, ctx.bias_dtype if need_bias else None
        )
        parts = of_weight.split([w.shape[0] for w in weights])
        return grad_x, of_bias, *[part if asked else None for part, asked in zip(parts, need)]
