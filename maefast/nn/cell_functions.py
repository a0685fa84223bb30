"""torch's functions on `Cells` that the ops of maefast serve: convolutions, linear layers, norms, pooling windows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast import ops
from maefast.nn.cell_elementwise import handles, of_sides
from maefast.nn.cell_padding import PaddedCells, merged
from maefast.nn.cells import HANDLERS, Cells, PendingNorm, UnknownSparseOp, pending, where
from maefast.ops import _checks

# --- convolutions, linear, norms ---------------------------------------------------------------------------


def _autocast(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """As autocast casts the arguments of a convolution."""
    dtype = _checks.autocast(x.device.type)
    if dtype is None or x.dtype is torch.float64:
        return [x, *others]
    return [t if t is None else t.to(dtype) for t in (x, *others)]


def _channels_first(x: Cells, what: str, sides: int | None = None) -> None:
    """Raise unless `x` is (B, C, ...), and has so many sides as the function is for."""
    if x.channels_last:
        first, last = x.layouts
        raise UnknownSparseOp(f"{where()}{what} takes {first}; these cells were permuted to {last}")
    if sides is not None:
        of_sides(x, what, sides)


def _conv(sides: int, function: Callable) -> Callable:
    def handler(x: Cells, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Cells:
        _channels_first(x, f"conv{sides}d", sides)
        x, weight, padding = merged(x, weight, padding, dilation)
        if not _finer(x, stride):
            return _coarser(x, function, weight, bias, stride, padding, dilation, groups)
        rows, weight, bias = _autocast(x.rows, weight, bias)
        rows = ops.conv_cells(rows, x.plan, weight, bias, stride, padding, dilation, groups)
        return Cells(rows, x.plan)

    return handler


HANDLERS[torch.conv2d] = HANDLERS[F.conv2d] = _conv(2, torch.conv2d)
HANDLERS[torch.conv3d] = HANDLERS[F.conv3d] = _conv(3, torch.conv3d)


def _conv_transpose(sides: int) -> Callable:
    def handler(x: Cells, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1) -> Cells:
        _channels_first(x, f"conv_transpose{sides}d", sides)
        rows, weight, bias = _autocast(x.rows, weight, bias)
        args = (stride, padding, output_padding, groups, dilation)
        return Cells(ops.conv_transpose_cells(rows, x.plan, weight, bias, *args), x.plan)

    return handler


HANDLERS[torch.conv_transpose2d] = HANDLERS[F.conv_transpose2d] = _conv_transpose(2)
HANDLERS[torch.conv_transpose3d] = HANDLERS[F.conv_transpose3d] = _conv_transpose(3)


def _each(x: Cells, size) -> tuple[int, ...]:
    """One of every side of the map."""
    return tuple(size) if isinstance(size, (tuple, list)) else (size,) * len(x._sites)


def _finer(x: Cells, stride) -> bool:
    """Whether the sites of a cell divide into whole steps of `stride`."""
    return not any(sites % step for sites, step in zip(x._sites, _each(x, stride)))


def _coarser(x: Cells, function: Callable, *args) -> Cells:
    """A level coarser than the cells: masked sites count as zeros, and all sites of the result are active (nnssl)."""
    dense = function(_map(x), *args)
    return Cells.pack(dense, x.plan.coarser(dense.shape[2:]))


def _map(x: Cells) -> Tensor:
    return x.padded_map() if isinstance(x, PaddedCells) else x.dense()


def _repacked(x: Cells, function: Callable, kernel, step, *args) -> Cells:
    """Windows that the kernels do not know, by way of the map: not dear for a pooling alone."""
    if not _finer(x, step):
        return _coarser(x, function, kernel, step, *args)
    dense = function(_map(x), kernel, step, *args)
    sides = (x.cells if isinstance(x, PaddedCells) else x).shape[2:]
    if any(size * s != full for size, s, full in zip(dense.shape[2:], _each(x, step), sides)):
        raise UnknownSparseOp(f"{where()}a pooling of {kernel} by {step} leaves the grid of the mask (ceil_mode?)")
    return Cells.pack(dense, x.plan)


@handles(F.linear)
def linear(x: Cells, weight, bias=None) -> Cells:
    if not x.channels_last:
        order = ", ".join(map(str, (0, *x.site_dims, 1)))
        raise UnknownSparseOp(f"{where()}linear takes cells as {x.layouts[1]}: permute({order}) first")
    return Cells(ops.linear(x.rows, weight, bias), x.plan, True)


@handles(F.batch_norm)
def batch_norm(
    x: Cells, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> Cells:
    _channels_first(x, "batch_norm")
    args = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    return pending(PendingNorm(x, **args, training=training, momentum=momentum, eps=eps), x)


def sync_batch_norm(x: Cells, **args) -> Cells:
    """What SyncBatchNorm does, called by its sparse form in `maefast.nn.sparsify`."""
    _channels_first(x, "SyncBatchNorm")
    return pending(PendingNorm(x, **args), x)


@handles(F.layer_norm)
def layer_norm(x: Cells, normalized_shape, weight=None, bias=None, eps=1e-5) -> Cells:
    if not x.channels_last or tuple(normalized_shape) != (x._channels,):
        raise UnknownSparseOp(f"{where()}layer_norm of cells is over the channels of {x.layouts[1]}")
    rows = x.rows
    if weight is None or bias is None:
        return x.like(F.layer_norm(rows, normalized_shape, weight, bias, eps))
    return x.like(ops.add_norm(rows, None, weight, bias, eps=eps)[1])


@handles(F.group_norm)
def group_norm(x: Cells, num_groups, weight=None, bias=None, eps=1e-5) -> Cells:
    _channels_first(x, "group_norm")
    return x.like(ops.group_norm_cells(x.rows, x.plan, num_groups, weight, bias, eps))


@handles(F.instance_norm)
def instance_norm(
    x: Cells,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
) -> Cells:
    _channels_first(x, "instance_norm")
    if not use_input_stats or running_mean is not None:
        raise UnknownSparseOp(f"{where()}instance_norm with running statistics is not known on packed cells")
    return x.like(ops.instance_norm_cells(x.rows, x.plan, weight, bias, eps))


# --- pooling -----------------------------------------------------------------------------------------------


def _max_pool(sides: int, function: Callable) -> Callable:
    def handler(x: Cells, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        _channels_first(x, f"max_pool{sides}d", sides)
        if return_indices:
            raise UnknownSparseOp(f"{where()}max_pool{sides}d with indices is not known on packed cells")
        step = stride or kernel_size
        if isinstance(x, PaddedCells) or ceil_mode or max(_each(x, dilation)) > 1:
            return _repacked(x, function, kernel_size, step, padding, dilation, ceil_mode)
        if not _finer(x, step):
            return _coarser(x, function, kernel_size, step, padding)
        return x.like(ops.max_pool_cells(x.rows, x.plan, kernel_size, step, padding))

    return handler


def _avg_pool(sides: int, function: Callable) -> Callable:
    def handler(
        x: Cells, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
    ) -> Cells:
        _channels_first(x, f"avg_pool{sides}d", sides)
        step = stride or kernel_size
        clips = ceil_mode and _each(x, kernel_size) != _each(x, step)
        if isinstance(x, PaddedCells) or clips or divisor_override is not None:
            args = (ceil_mode, count_include_pad, divisor_override)
            return _repacked(x, function, kernel_size, step, padding, *args)
        if not _finer(x, step):
            return _coarser(x, function, kernel_size, step, padding, ceil_mode, count_include_pad)
        return x.like(ops.avg_pool_cells(x.rows, x.plan, kernel_size, step, padding, count_include_pad))

    return handler


HANDLERS[torch.max_pool2d] = HANDLERS[F.max_pool2d] = _max_pool(2, F.max_pool2d)
HANDLERS[torch.max_pool3d] = HANDLERS[F.max_pool3d] = _max_pool(3, F.max_pool3d)
HANDLERS[F.avg_pool2d], HANDLERS[F.avg_pool3d] = _avg_pool(2, F.avg_pool2d), _avg_pool(3, F.avg_pool3d)
