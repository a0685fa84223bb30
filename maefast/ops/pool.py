"""Pooling over packed cells: `max_pool_cells`, `avg_pool_cells`, and `global_pool_cells` over the active sites."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _autograd, _checks, _dispatch, _registry
from maefast.ops._conv_table import Sides
from maefast.ops.cell_norm import segment_mean
from maefast.ops.cells import CellMask, check_cells, pack_cells_reference, times, unpack_cells_reference

_raw_op = _registry.family("pool")

MAX_SITES = {"max": 255, "avg": 1024}  # of a window: a max-pool keeps the number of the winner in a byte


def max_pool_cells(
    x: Tensor,
    plan: CellMask,
    kernel: int | Sides,
    stride: int | Sides | None = None,
    padding: int | Sides = 0,
    *,
    backend: str | None = None,
) -> Tensor:
    """The maximum of each window at the active cells, as SparK's (Tian et al., 2023): the dense pool of the map whose
    masked sites are 0, times the mask. A masked site is a 0 that may win; beyond the image there is nothing (-inf).

    Args:
        x: packed cells [T, h, w, C], of volumes [T, d, h, w, C]. kernel, stride, padding: as ``torch.nn.MaxPool2d``;
            stride None is the kernel.

    Returns:
        [T, h / stride, w / stride, C], of volumes with d / stride, in x's dtype. An exact choice: of equal values the
        first in the window wins, as in PyTorch, and the gradient of a window that a masked site won is dropped.
        Gradients are deterministic.

    Raises:
        TypeError, ValueError: x does not fit the plan, or the pool does not divide the map by its stride exactly.
    """
    check_cells(plan, x)
    window = _window(x, kernel, stride, padding, False, "max")
    name = _dispatch.choose("max_pool_cells", x.device.type, x.dtype, backend, solid=plan.sides == 3)
    if name == "reference":
        return max_pool_cells_reference(x, plan, *window)
    return _autograd.apply(_MaxPool, x, plan.neighbours(_radius(x, *window)), *window, name)


def max_pool_cells_reference(x: Tensor, plan: CellMask, kernel, stride, padding) -> Tensor:
    """The definition, differentiable."""
    run = F.max_pool2d if plan.sides == 2 else F.max_pool3d
    full = run(_wide_map(x, plan), kernel, stride, padding)
    return pack_cells_reference(full, plan).to(x.dtype)


def avg_pool_cells(
    x: Tensor,
    plan: CellMask,
    kernel: int | Sides,
    stride: int | Sides | None = None,
    padding: int | Sides = 0,
    count_include_pad: bool = True,
    ceil_mode: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """The mean of each window at the active cells, as SparK's (Tian et al., 2023): the dense pool of the map whose
    masked sites are 0, times the mask. The divisor is the dense one: masked sites count.

    Args:
        x: packed cells [T, h, w, C], of volumes [T, d, h, w, C]. kernel, stride, padding, count_include_pad, ceil_mode:
            as ``torch.nn.AvgPool2d``; stride None is the kernel. ceil_mode is allowed where it changes nothing.

    Returns:
        [T, h / stride, w / stride, C], of volumes with d / stride, in x's dtype, summed in float32 (float64 for
        float64) and rounded once.

    Raises:
        TypeError, ValueError: x does not fit the plan, or the pool does not divide the map by its stride exactly.
    """
    check_cells(plan, x)
    count_include_pad = _checks.flag("count_include_pad", count_include_pad)
    window = _window(x, kernel, stride, padding, _checks.flag("ceil_mode", ceil_mode), "avg")
    name = _dispatch.choose("avg_pool_cells", x.device.type, x.dtype, backend, solid=plan.sides == 3)
    if name == "reference":
        return avg_pool_cells_reference(x, plan, *window, count_include_pad)
    table = plan.neighbours(_radius(x, *window))
    return _autograd.apply(_AvgPool, x, table, *window, count_include_pad, name)


def avg_pool_cells_reference(x: Tensor, plan: CellMask, kernel, stride, padding, count_include_pad) -> Tensor:
    """The definition, differentiable."""
    run = F.avg_pool2d if plan.sides == 2 else F.avg_pool3d
    full = run(_wide_map(x, plan), kernel, stride, padding, count_include_pad=count_include_pad)
    return pack_cells_reference(full, plan).to(x.dtype)


def global_pool_cells(x: Tensor, plan: CellMask, *, backend: str | None = None) -> Tensor:
    """The mean over the active sites of each sample, for a head or squeeze-excite.

    Args:
        x: packed cells [T, h, w, C] or [T, d, h, w, C].

    Returns:
        [B, C] in x's dtype; 0 for a sample without active cells. Sums are float32 (float64 for float64) and
        deterministic.

    Raises:
        TypeError, ValueError: x does not fit the plan.
    """
    check_cells(plan, x)
    return segment_mean(x, plan, backend=backend).to(x.dtype)


def global_pool_cells_reference(x: Tensor, plan: CellMask) -> Tensor:
    """The definition, differentiable: the dense sum over the map's active sites, divided by their number."""
    total = _wide_map(x, plan).flatten(2).sum(2)
    count = plan.cu_cells.diff() * math.prod(x.shape[1:-1])
    return (total / count.clamp(min=1)[:, None]).to(x.dtype)


# --- windows -----------------------------------------------------------------------------------------------


def _window(x: Tensor, kernel, stride, padding, ceil_mode: bool, kind: str) -> tuple[Sides, ...]:
    """(kernel, stride, padding) of each side; raises unless the pool makes a map of exactly h / stride sites a cell."""
    sites = x.shape[1:-1]
    kernel = _checks.sides("kernel", kernel, 1, len(sites))
    stride = kernel if stride is None else _checks.sides("stride", stride, 1, len(sites))
    padding = _checks.sides("padding", padding, 0, len(sites))
    for size, k, s, p in zip(sites, kernel, stride, padding):
        if size % s:
            raise ValueError(
                f"cells of {times(sites)} sites cannot be pooled by a stride of {s}: the result would be"
                " coarser than the mask; go on with the dense map (unpack_cells)"
            )
        if not 0 < k - 2 * p <= s or (ceil_mode and k - 2 * p != s):
            raise ValueError(
                f"a window of {k} with stride {s}, padding {p} and ceil_mode={ceil_mode} does not make a map"
                f" of exactly 1/{s} of the sites; that takes kernel - 2 * padding "
                + (f"= {s}" if ceil_mode else f"from 1 to {s}")
            )
    if math.prod(kernel) > MAX_SITES[kind]:
        raise ValueError(f"a window has at most {MAX_SITES[kind]} sites here, got {times(kernel)}")
    return kernel, stride, padding


def _radius(x: Tensor, kernel, stride, padding) -> int:
    """How many cells away a window reaches."""
    reach = [max(p, k - s - p) for k, s, p in zip(kernel, stride, padding)]
    return max(max(0, -(-r // size)) for r, size in zip(reach, x.shape[1:-1]))


def _wide_map(x: Tensor, plan: CellMask) -> Tensor:
    return unpack_cells_reference(x if x.dtype is torch.float64 else x.float(), plan)


# --- autograd ----------------------------------------------------------------------------------------------


@_raw_op(
    "max_pool_cells(Tensor x, Tensor neighbours, SymInt[] kernel, SymInt[] stride, SymInt[] padding)"
    " -> (Tensor, Tensor)"
)
def _max_pool_cells_fake(x, neighbours, kernel, stride, padding):
    y = _avg_pool_cells_fake(x, neighbours, kernel, stride, padding, True)
    return y, y.new_empty(y.shape, dtype=torch.uint8)


@_raw_op(
    "max_pool_cells_backward(Tensor grad, Tensor argmax, Tensor neighbours, SymInt[] kernel, SymInt[] stride,"
    " SymInt[] padding) -> Tensor"
)
def _max_pool_cells_backward_fake(grad, argmax, neighbours, kernel, stride, padding):
    return _avg_pool_cells_backward_fake(grad, neighbours, kernel, stride, padding, True)


@_raw_op(
    "avg_pool_cells(Tensor x, Tensor neighbours, SymInt[] kernel, SymInt[] stride, SymInt[] padding,"
    " bool count_include_pad) -> Tensor"
)
def _avg_pool_cells_fake(x, neighbours, kernel, stride, padding, count_include_pad):
    return x.new_empty((x.shape[0], *(n // s for n, s in zip(x.shape[1:-1], stride)), x.shape[-1]))


@_raw_op(
    "avg_pool_cells_backward(Tensor grad, Tensor neighbours, SymInt[] kernel, SymInt[] stride, SymInt[] padding,"
    " bool count_include_pad) -> Tensor"
)
def _avg_pool_cells_backward_fake(grad, neighbours, kernel, stride, padding, count_include_pad):
    return grad.new_empty((grad.shape[0], *(n * s for n, s in zip(grad.shape[1:-1], stride)), grad.shape[-1]))


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, table, kernel, stride, padding, name):
        args = (list(kernel), list(stride), list(padding))
        y, argmax = _registry.raw("max_pool_cells", name)(x.contiguous(), table, *args)
        if ctx is not None:
            ctx.save_for_backward(argmax, table)
            ctx.args, ctx.backend = args, name
        return y

    @staticmethod
    @_autograd.once("max_pool_cells")
    def backward(ctx, grad):
        run = _registry.raw("max_pool_cells_backward", ctx.backend)
        return run(grad.contiguous(), *ctx.saved_tensors, *ctx.args), *(None,) * 5


class _AvgPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, table, kernel, stride, padding, count_include_pad, name):
        args = (list(kernel), list(stride), list(padding), count_include_pad)
        if ctx is not None:
            ctx.save_for_backward(table)
            ctx.args, ctx.backend = args, name
        return _registry.raw("avg_pool_cells", name)(x.contiguous(), table, *args)

    @staticmethod
    @_autograd.once("avg_pool_cells")
    def backward(ctx, grad):
        run = _registry.raw("avg_pool_cells_backward", ctx.backend)
        return run(grad.contiguous(), *ctx.saved_tensors, *ctx.args), *(None,) * 6
