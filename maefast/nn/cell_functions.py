"""torch's functions on `Cells`: what a plain convnet calls, served by the ops of maefast on packed cells."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast import ops
from maefast.nn.cells import HANDLERS, Cells, PendingNorm, UnknownSparseOp, pending, where
from maefast.ops import CellMask


def handles(*functions: Callable):
    """Register the handler of torch functions."""

    def register(handler):
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


# --- convolutions, linear, norms ---------------------------------------------------------------------------


def _autocast(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """As autocast casts the arguments of a convolution."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype is torch.float64:
        return [x, *others]
    dtype = torch.get_autocast_dtype(x.device.type)
    return [t if t is None else t.to(dtype) for t in (x, *others)]


def _channels_first(x: Cells, what: str) -> None:
    if x.channels_last:
        raise UnknownSparseOp(f"{where()}{what} takes (B, C, H, W); these cells were permuted to (B, H, W, C)")


@handles(torch.conv2d, F.conv2d)
def conv2d(x: Cells, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Cells:
    _channels_first(x, "conv2d")
    if not _finer(x, stride):
        return _coarser(x, torch.conv2d, weight, bias, stride, padding, dilation, groups)
    rows, weight, bias = _autocast(x.rows, weight, bias)
    rows = ops.conv_cells(rows, x.plan, weight, bias, stride, padding, dilation, groups)
    return Cells(rows, x.plan)


def _finer(x: Cells, stride) -> bool:
    """Whether the sites of a cell divide into whole steps of `stride`."""
    steps = stride if isinstance(stride, (tuple, list)) else (stride, stride)
    return not any(sites % step for sites, step in zip(x._sites, steps))


def _coarser(x: Cells, function: Callable, *args) -> Cells:
    """A level coarser than the cells: masked sites count as zeros, and all sites of the result are active (nnssl)."""
    dense = function(x.dense(), *args)
    plan = CellMask.all_visible(x.plan.batch, tuple(dense.shape[2:]), dense.device)
    return Cells.pack(dense, plan)


@handles(F.linear)
def linear(x: Cells, weight, bias=None) -> Cells:
    if not x.channels_last:
        raise UnknownSparseOp(f"{where()}linear takes cells as (B, H, W, C): permute(0, 2, 3, 1) first")
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
        raise UnknownSparseOp(f"{where()}layer_norm of cells is over the channels of (B, H, W, C)")
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


@handles(F.max_pool2d, torch.max_pool2d)
def max_pool2d(x: Cells, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    _channels_first(x, "max_pool2d")
    if ceil_mode or return_indices or dilation not in (1, (1, 1), [1, 1]):
        raise UnknownSparseOp(f"{where()}max_pool2d with ceil_mode, dilation or indices is not known on packed cells")
    step = stride or kernel_size
    if not _finer(x, step):
        return _coarser(x, F.max_pool2d, kernel_size, step, padding)
    return x.like(ops.max_pool_cells(x.rows, x.plan, kernel_size, step, padding))


@handles(F.avg_pool2d)
def avg_pool2d(
    x: Cells, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
) -> Cells:
    _channels_first(x, "avg_pool2d")
    size = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
    step = stride or kernel_size
    if divisor_override is not None or (
        ceil_mode and (tuple(size) != ((step, step) if isinstance(step, int) else tuple(step)))
    ):
        raise UnknownSparseOp(f"{where()}avg_pool2d with ceil_mode or a divisor is not known on packed cells")
    if not _finer(x, step):
        return _coarser(x, F.avg_pool2d, kernel_size, step, padding, ceil_mode, count_include_pad)
    return x.like(ops.avg_pool_cells(x.rows, x.plan, kernel_size, step, padding, count_include_pad))


def _dims(dim) -> tuple[int, ...]:
    return () if dim is None else tuple(sorted(d % 4 for d in ((dim,) if isinstance(dim, int) else dim)))


@handles(torch.mean)
def mean(x: Cells, dim=None, keepdim=False, dtype=None) -> Tensor:
    """Over the active sites of each sample."""
    sites = (1, 2) if x.channels_last else (2, 3)
    if _dims(dim) != sites:
        raise UnknownSparseOp(f"{where()}the mean of cells is over both sides of the map {sites}, not {dim}")
    out = ops.global_pool_cells(x.rows, x.plan)
    out = out if dtype is None else out.to(dtype)
    return out if not keepdim else (out[:, None, None] if x.channels_last else out[:, :, None, None])


@handles(torch.linalg.vector_norm, torch.norm)
def vector_norm(x: Cells, ord=2, dim=None, keepdim=False, dtype=None, p=2) -> Tensor:
    """The root of the sum of squares over the active sites of each sample: what ConvNeXt V2's GRN starts from."""
    sites = (1, 2) if x.channels_last else (2, 3)
    if {ord, p} != {2} or _dims(dim) != sites:
        raise UnknownSparseOp(f"{where()}the norm of cells is the 2-norm over both sides of the map {sites}")
    wide = torch.promote_types(x.dtype, torch.float32)
    total = ops.segment_sum(x.rows.to(wide).square(), x.plan)
    root = total.clamp(min=torch.finfo(wide).tiny).sqrt() * (total > 0)  # no gradient through a root of zero
    out = root.to(dtype or x.dtype)
    return out if not keepdim else (out[:, None, None] if x.channels_last else out[:, :, None, None])


@handles(F.adaptive_avg_pool2d)
def adaptive_avg_pool2d(x: Cells, output_size) -> Tensor:
    if output_size not in (1, (1, 1), [1, 1]):
        raise UnknownSparseOp(f"{where()}adaptive_avg_pool2d to {output_size} is not known on packed cells, only to 1")
    return mean(x, (2, 3), keepdim=True)


# --- element by element ------------------------------------------------------------------------------------


def _activation(function: Callable, fused: str | None = None) -> Callable:
    def handler(x: Cells, *args, **kwargs) -> Cells:
        inplace = kwargs.pop("inplace", False)
        if x._norm is not None and fused is not None:
            out = x.like(x._norm.run(fused))
        else:
            out = x.like(function(x.rows, *args, **kwargs))
        return x.replace(out) if inplace else out

    return handler


for _functions, _fused in (
    ((F.relu, torch.relu), "relu"),
    ((F.relu6,), "relu6"),
    *(((f,), None) for f in (F.gelu, F.silu, F.hardswish, F.leaky_relu, F.elu, F.mish, F.dropout, F.hardtanh)),
):
    for _function in _functions:
        HANDLERS[_function] = _activation(_function, _fused)


def _relu_(x: Cells) -> Cells:
    return x.replace(HANDLERS[F.relu](x))


HANDLERS[torch.relu_] = _relu_


def _operand(x: Cells, other) -> Tensor | float:
    """`other` in a shape that combines with x.rows."""
    if isinstance(other, Cells):
        if other.plan is not x.plan or other._sites != x._sites or other.channels_last != x.channels_last:
            raise ValueError(f"{where()}cells of different plans, sizes or layouts: {other!r} and {x!r}")
        return other.rows
    if not isinstance(other, Tensor) or other.numel() == 1:
        return other
    value = other.reshape((1,) * (4 - other.ndim) + tuple(other.shape))
    value = value if x.channels_last else value.permute(0, 2, 3, 1)
    if value.shape[1:3] != (1, 1):
        raise UnknownSparseOp(f"{where()}a map {tuple(other.shape)} does not go with packed cells: pack it first")
    if value.shape[0] == 1:
        return value
    keep = x.plan.tokens.keep
    if keep is not None:  # one value for each sample
        return value[:, None].expand(-1, keep, 1, 1, value.shape[-1]).reshape(-1, 1, 1, value.shape[-1])
    sample = torch.div(x.plan.cells, x.plan.tokens.num_tokens, rounding_mode="floor")
    return value.index_select(0, sample)


def _swapped(x, other) -> tuple:
    return (x, other) if isinstance(x, Cells) else (other, x)


@handles(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def add(x, other, *, alpha=1) -> Cells:
    x, other = _swapped(x, other)
    if alpha == 1 and isinstance(other, Cells):
        first, second = (x, other) if x._norm is not None else (other, x)
        if first._norm is not None and first._norm.plus(second) is not None:
            _operand(Cells(second.rows, second.plan, second.channels_last), _shape_only(first))
            return pending(first._norm.plus(second), first)
    value = _operand(x, other)
    return x.like(x.rows + (value if alpha == 1 else alpha * value))


def _shape_only(x: Cells) -> Cells:
    """For the checks of `_operand`, without running what is pending."""
    probe = object.__new__(Cells)
    probe.__dict__.update(x.__dict__)
    probe._rows = x._norm.x if x._norm is not None else x._rows
    probe._norm = None
    return probe


@handles(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def mul(x, other) -> Cells:
    x, other = _swapped(x, other)
    return x.like(x.rows * _operand(x, other))


@handles(torch.sub, torch.Tensor.sub, torch.Tensor.__sub__)
def sub(x, other) -> Cells:
    if not isinstance(x, Cells):
        return other.like(_operand(other, x) - other.rows)
    return x.like(x.rows - _operand(x, other))


@handles(torch.div, torch.Tensor.div, torch.Tensor.__truediv__)
def div(x, other) -> Cells:
    if not isinstance(x, Cells):
        return other.like(_operand(other, x) / other.rows)
    return x.like(x.rows / _operand(x, other))


@handles(torch.cat, torch.concat)
def cat(parts, dim=0) -> Cells:
    first = next(part for part in parts if isinstance(part, Cells))
    if dim % 4 != first.channel_dim:
        raise UnknownSparseOp(f"{where()}cells are concatenated along their channels only, not along {dim}")
    if not all(isinstance(part, Cells) for part in parts):
        raise UnknownSparseOp(f"{where()}packed cells and plain maps cannot be concatenated: pack the map first")
    return first.like(torch.cat([_operand(first, part) for part in parts], -1))


@handles(torch.chunk)
def chunk(x: Cells, chunks, dim=0) -> tuple[Cells, ...]:
    if dim % 4 != x.channel_dim:
        raise UnknownSparseOp(f"{where()}cells are split along their channels only, not along {dim}")
    return tuple(x.like(part) for part in x.rows.chunk(chunks, -1))
