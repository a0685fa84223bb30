"""Products of rows of taps, [R, taps * Ci], with the weight of a convolution [Co, Ci / groups, kernel...]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maefast.ops.linear import _transpose_sum, linear


def product(taps: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Rows of taps times the weight: [R, Co]."""
    if groups == 1:
        return linear(taps, _flat(weight), bias)
    out = torch.einsum("rkgc,gokc->rgo", _split(taps, weight, groups), _split_weight(weight, groups))
    out = out.flatten(1).contiguous()
    return out if bias is None else out + bias


def spread(rows: Tensor, weight: Tensor, groups: int) -> Tensor:
    """The gradient of rows of taps from that of the outputs, [R, Co]."""
    if groups == 1:
        return linear(rows, _flat(weight).t())
    taps = torch.einsum("rgo,gokc->rkgc", rows.unflatten(1, (groups, -1)), _split_weight(weight, groups))
    return taps.flatten(1).contiguous()


def weight_gradient(rows, taps, weight, groups: int, need_bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of weight and bias from that of the outputs, `rows`."""
    out, per_group, *kernel = weight.shape
    if groups > 1:
        grad_weight = torch.einsum("rgo,rkgc->gokc", rows.unflatten(1, (groups, -1)), _split(taps, weight, groups))
        grad_bias = rows.sum(0) if need_bias else None
    elif rows.device.type == "cpu" and rows.dtype is torch.float32:
        columns, grad_bias = _transpose_sum(rows, need_bias)
        grad_weight = linear(columns, taps.t())
    else:
        grad_weight, grad_bias = linear(rows.t(), taps.t()), rows.sum(0) if need_bias else None
    if math.prod(kernel) == 1:  # in the weight's own order, as DDP wants it
        return grad_weight.reshape(weight.shape), grad_bias
    return grad_weight.reshape(out, *kernel, per_group).movedim(-1, 1), grad_bias


def _flat(weight: Tensor) -> Tensor:
    """[Co, Ci, kh, kw] -> [Co, kh * kw * Ci], the order of a row of taps."""
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


def _split(taps: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Rows of taps as [R, kh * kw, groups, Ci / groups]."""
    return taps.view(taps.shape[0], math.prod(weight.shape[2:]), groups, weight.shape[1])


def _split_weight(weight: Tensor, groups: int) -> Tensor:
    """[groups, Co / groups, kh * kw, Ci / groups]."""
    return weight.flatten(2).unflatten(0, (groups, -1)).transpose(2, 3)


def turned(weight: Tensor, groups: int) -> Tensor:
    """The weight of the gradient's convolution at stride 1: taps turned round, input and output channels exchanged."""
    return weight.flip(tuple(range(2, weight.ndim))).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
