"""`conv_cells`' route "implicit": matrix products whose rows of taps are read in place (Triton)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maefast.ops import _autograd, _registry

_raw_op = _registry.family("implicit_conv", cpp=False)  # a CPU has a better way


@_raw_op(
    "implicit_conv(Tensor x, Tensor neighbours, Tensor weight, Tensor? bias, SymInt[] kernel, SymInt[] stride,"
    " SymInt[] padding, SymInt[] dilation) -> Tensor"
)
def _implicit_conv_fake(x, neighbours, weight, bias, kernel, stride, padding, dilation):
    cells, h, w, _ = x.shape
    return x.new_empty((cells, h // stride[0], w // stride[1], weight.shape[2]))


@_raw_op(
    "implicit_conv_grad_x(Tensor grad, Tensor neighbours, Tensor weight, SymInt[] kernel, SymInt[] stride,"
    " SymInt[] padding, SymInt[] dilation) -> Tensor"
)
def _implicit_conv_grad_x_fake(grad, neighbours, weight, kernel, stride, padding, dilation):
    cells, h, w, _ = grad.shape
    return grad.new_empty((cells, h * stride[0], w * stride[1], weight.shape[1]))


@_raw_op(
    "implicit_conv_grad_weight(Tensor x, Tensor grad, Tensor neighbours, SymInt[] kernel, SymInt[] stride,"
    " SymInt[] padding, SymInt[] dilation) -> Tensor"
)
def _implicit_conv_grad_weight_fake(x, grad, neighbours, kernel, stride, padding, dilation):
    return x.new_empty((math.prod(kernel), x.shape[3], grad.shape[3]), dtype=torch.float32)


class Implicit(torch.autograd.Function):
    """Nothing but x, the table and the weight is kept, and nothing is written but the result."""

    @staticmethod
    def forward(ctx, x, neighbours, weight, bias, window, groups, name):
        if ctx is not None:
            ctx.save_for_backward(x, neighbours, weight)
            ctx.window, ctx.backend = window, name
        bias = None if bias is None else bias.contiguous()
        return _registry.raw("implicit_conv", name)(x, neighbours, _taps_first(weight), bias, *window)

    @staticmethod
    @_autograd.once("conv_cells")
    def backward(ctx, grad):
        x, neighbours, weight = ctx.saved_tensors
        window, name = ctx.window, ctx.backend
        need_x, _, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if need_x:
            grad_x = _registry.raw("implicit_conv_grad_x", name)(grad, neighbours, _taps_first(weight), *window)
        if need_weight:
            sums = _registry.raw("implicit_conv_grad_weight", name)(x, grad, neighbours, *window)
            grad_weight = sums.to(weight.dtype).unflatten(0, window.kernel).permute(3, 2, 0, 1)
        grad_bias = grad.sum((0, 1, 2)) if need_bias else None
        return grad_x, None, grad_weight, grad_bias, None, None, None


def _taps_first(weight: Tensor) -> Tensor:
    """[Co, Ci, kh, kw] -> [kh * kw, Ci, Co]."""
    return weight.permute(2, 3, 1, 0).flatten(0, 1).contiguous()
