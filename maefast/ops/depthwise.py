"""Depthwise convolution over packed cells: `depthwise_cells`, the spatial half of a ConvNeXt block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _autograd, _checks, _dispatch, _registry
from maefast.ops.cells import CellMask, check_cells, pack_cells_reference, unpack_cells_reference

_raw_op = _registry.family("depthwise")

KERNELS = (3, 5, 7)


def depthwise_cells(
    x: Tensor, plan: CellMask, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Each channel convolved with its own k x k kernel, stride 1, padding k // 2, at the active sites alone:

    ``y[p, c] = bias[c] + sum over d of weight[c, 0, d] * x[p + d - k // 2, c]``; sites that are masked or outside the
    image count as 0. Equal to a dense depthwise convolution of the map whose masked sites are 0, times the mask
    (SparK, Tian et al., 2023; ConvNeXt V2, Woo et al., 2023), at the cost of the active sites.

    Args:
        x: packed cells [T, h, w, C]. weight: [C, 1, k, k] with k = 3, 5 or 7. bias: [C] or None.

    Returns:
        [T, h, w, C] in x's dtype; under autocast in the autocast dtype, as a dense convolution. Products and sums are
        float32 (float64 for float64), rounded once. Gradients of weight and bias are deterministic.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or the kernel is not one of these.
    """
    check_cells(plan, x)
    if plan.sides == 3:
        raise ValueError("depthwise_cells takes maps of two sides; conv_cells takes volumes, with groups")
    channels = x.shape[3]
    _checks.tensor("weight", weight, ndim=4)
    if weight.shape[:2] != (channels, 1):
        want = f"[{channels}, 1, k, k]"
        raise ValueError(f"weight must be {want} for x of {channels} channels, got {tuple(weight.shape)}")
    size = weight.shape[2]
    if size not in KERNELS or weight.shape[3] != size:
        raise ValueError(
            f"a depthwise kernel has 3 x 3, 5 x 5 or 7 x 7 taps here, got {size} x {weight.shape[3]};"
            " conv_cells takes others"
        )
    if bias is not None:
        bias = _checks.vector("bias", bias, channels)
    _checks.same_device(x=x, weight=weight, bias=bias)
    autocast = _checks.autocast(x.device.type)
    if autocast is not None and x.dtype is not torch.float64:
        x = x.to(autocast)
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    if wide is torch.float32 and torch.float64 in (weight.dtype, weight.dtype if bias is None else bias.dtype):
        raise TypeError(f"weight and bias must not be float64 while x is {x.dtype}")
    name = _dispatch.choose("depthwise", x.device.type, x.dtype, backend)
    if name == "reference":
        return depthwise_cells_reference(x, plan, weight, bias)
    table = plan.neighbours(-(-(size // 2) // min(x.shape[1:3])))
    taps = weight.flatten(1).t().to(wide)
    return _autograd.apply(_Depthwise, x.contiguous(), table, taps, None if bias is None else bias.to(wide), name)


def depthwise_cells_reference(x: Tensor, plan: CellMask, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition, differentiable: the dense convolution of the whole map."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    bias = None if bias is None else bias.to(wide)
    with torch.autocast(x.device.type, enabled=False):
        full = unpack_cells_reference(x.to(wide), plan)
        full = F.conv2d(full, weight.to(wide), bias, padding=weight.shape[2] // 2, groups=x.shape[3])
        return pack_cells_reference(full, plan).to(x.dtype)


@_raw_op("depthwise(Tensor x, Tensor neighbours, Tensor weight, Tensor? bias, bool flip) -> Tensor")
def _depthwise_fake(x, neighbours, weight, bias, flip):
    return x.new_empty(x.shape)


@_raw_op("depthwise_grad_weight(Tensor x, Tensor grad, Tensor neighbours, SymInt size) -> (Tensor, Tensor)")
def _depthwise_grad_weight_fake(x, grad, neighbours, size):
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    return x.new_empty((size * size, x.shape[3]), dtype=wide), x.new_empty((x.shape[3],), dtype=wide)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, table, taps, bias, name):
        bias = None if bias is None else bias.contiguous()
        y = _registry.raw("depthwise", name)(x, table, taps.contiguous(), bias, False)
        if ctx is not None:
            ctx.save_for_backward(x, table, taps)
            ctx.backend = name
        return y

    @staticmethod
    @_autograd.once("depthwise_cells")
    def backward(ctx, grad):
        x, table, taps = ctx.saved_tensors
        grad = grad.contiguous()
        need_x, _, need_taps, need_bias, _ = ctx.needs_input_grad
        grad_x = grad_taps = grad_bias = None
        if need_x:  # the same sum with the taps turned round
            grad_x = _registry.raw("depthwise", ctx.backend)(grad, table, taps.contiguous(), None, True)
        if need_taps or need_bias:
            size = round(taps.shape[0] ** 0.5)
            grad_taps, grad_bias = _registry.raw("depthwise_grad_weight", ctx.backend)(x, grad, table, size)
        return grad_x, None, grad_taps if need_taps else None, grad_bias if need_bias else None, None
