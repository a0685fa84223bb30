"""torch's functions along the channels of `Cells`: every site by itself, so that nothing is mixed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.nn.cell_elementwise import handles, operand, per_cell, wrap
from maefast.nn.cell_views import channels
from maefast.nn.cells import HANDLERS, Cells, UnknownSparseArgument, where


def along(x: Cells, what: str, dim) -> None:
    """Raise unless `dim` is that of the channels."""
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    if not isinstance(dim, int) or dim % x.ndim != x.channel_dim:
        raise UnknownSparseArgument(
            f"{where()}cells are {what} along their channels only (dimension {x.channel_dim}), not along {dim}"
        )


# --- parts and wholes --------------------------------------------------------------------------------------


@handles(torch.cat, torch.concat, torch.concatenate)
def cat(tensors, dim=0) -> Cells:
    parts = [tensors] if isinstance(tensors, Cells) else list(tensors)
    first = next(part for part in parts if isinstance(part, Cells))
    along(first, "concatenated", dim)
    return first.like(torch.cat([_values(first, part) for part in parts], -1))


def _values(x: Cells, part: Cells | Tensor) -> Tensor:
    """Of a whole map with as many channels as it likes."""
    if isinstance(part, Cells):
        return operand(x, part)
    sites = slice(x.site_dims[0], x.site_dims[-1] + 1)
    if part.ndim != x.ndim or part.shape[sites] != x.shape[sites]:
        raise UnknownSparseArgument(f"{where()}a map {tuple(part.shape)} cannot be concatenated with {x!r}")
    return operand(Cells(x.rows[..., :1], x.plan, x.channels_last), part).expand(*x.rows.shape[:-1], -1)


def _parts(function: Callable) -> Callable:
    def handler(x: Cells, *args, dim=0, **kwargs) -> tuple[Cells, ...]:
        *args, dim = args if len(args) > 1 else (*args, dim)
        along(x, "split", dim)
        sizes = [part.shape[-1] for part in function(x.rows, *args, dim=-1, **kwargs)]
        return tuple(x.part(channels(slice(end - n, end))) for n, end in zip(sizes, accumulate(sizes)))

    return handler


for _function in (
    *(torch.chunk, Tensor.chunk, torch.unsafe_chunk, Tensor.unsafe_chunk, torch.tensor_split, Tensor.tensor_split),
    *(torch.split, Tensor.split, torch.split_with_sizes, Tensor.split_with_sizes),
):
    HANDLERS[_function] = _parts(_function)


@handles(torch.narrow, Tensor.narrow)
def narrow(x: Cells, dim, start, length) -> Cells:
    along(x, "narrowed", dim)
    start %= x._channels
    return x.part(channels(slice(start, start + length)))


@handles(torch.index_select, Tensor.index_select)
def index_select(x: Cells, dim, index) -> Cells:
    along(x, "selected", dim)
    return x.like(x.rows.index_select(-1, index))


@handles(torch.flip, Tensor.flip)
def flip(x: Cells, *args, dims=()) -> Cells:
    along(x, "flipped", dims or (args[0] if len(args) == 1 else args))
    return x.like(x.rows.flip(-1))


@handles(Tensor.__getitem__)
def getitem(x: Cells, index) -> Cells:
    """``x[:, 4:8]``, ``x[..., :4]``: channels of every site."""
    index = index if isinstance(index, tuple) else (index,)
    if any(i is Ellipsis for i in index):
        at = next(n for n, i in enumerate(index) if i is Ellipsis)
        index = (*index[:at], *(slice(None),) * (x.ndim + 1 - len(index)), *index[at + 1 :])
    index = (*index, *(slice(None),) * (x.ndim - len(index)))
    chosen = index[x.channel_dim] if len(index) == x.ndim else None
    others = [i for n, i in enumerate(index) if n != x.channel_dim]
    known = isinstance(chosen, (slice, list)) or (isinstance(chosen, Tensor) and chosen.ndim == 1)
    if not known or any(not isinstance(i, slice) or i != slice(None) for i in others):
        raise UnknownSparseArgument(f"{where()}an index of packed cells takes some of their channels, all of the rest")
    return x.part(channels(chosen)) if isinstance(chosen, slice) else x.like(x.rows[..., chosen])


@handles(torch.channel_shuffle, F.channel_shuffle)
def channel_shuffle(x: Cells, groups) -> Cells:
    along(x, "shuffled", 1)
    return x.like(x.rows.unflatten(-1, (groups, -1)).transpose(-1, -2).flatten(-2))


# --- layout ------------------------------------------------------------------------------------------------


@handles(torch.permute, Tensor.permute)
def permute(x: Cells, *args, **kwargs) -> Cells:
    return x.permute(*args, **kwargs)


def _moved(function: Callable) -> Callable:
    def handler(x: Cells, *args, **kwargs) -> Cells:
        sizes = tuple(range(2, 2 + x.ndim))
        return x.permute([sizes.index(s) for s in function(torch.empty(sizes, device="meta"), *args, **kwargs).shape])

    return handler


for _name in ("movedim", "moveaxis", "transpose", "swapaxes", "swapdims"):
    for _space in (torch, Tensor):
        HANDLERS[getattr(_space, _name)] = _moved(getattr(_space, _name))


@handles(Tensor.expand_as)
def expand_as(x: Cells | Tensor, other: Cells | Tensor) -> Cells | Tensor:
    """A gate stays as small as it is: whatever takes it with cells broadcasts it."""
    if not isinstance(x, Cells):
        operand(other, x)
        return x
    return expand(x, *other.shape)


@handles(Tensor.expand, torch.broadcast_to, Tensor.broadcast_to)
def expand(x: Cells, *size) -> Cells:
    size = tuple(size[0] if len(size) == 1 else size)
    full = [have if want == -1 else want for have, want in zip(x.shape, size)]
    kept = [d for d in range(x.ndim) if d != x.channel_dim]
    if len(size) != x.ndim or any(full[d] != x.shape[d] for d in kept) or x._channels not in (1, full[x.channel_dim]):
        raise UnknownSparseArgument(f"{where()}cells {tuple(x.shape)} cannot be expanded to {size}")
    return x.part((lambda rows: rows.expand(*(-1,) * (x.ndim - 1), full[x.channel_dim]), _never))


@handles(Tensor.detach, torch.detach)
def detach(x: Cells) -> Cells:
    return x.part((torch.detach, _never))


def _never(rows: Tensor, new: Tensor) -> Tensor:
    raise UnknownSparseArgument(f"{where()}expanded or detached cells are not changed in place: clone them first")


# --- functions of the channels of a site -------------------------------------------------------------------


def _function_of_channels(function: Callable, position: int, default: int | None = None) -> Callable:
    """With the argument `dim` at `position`."""

    def handler(x: Cells, *args, **kwargs) -> Cells:
        dim = args[position - 1] if len(args) >= position else kwargs.get("dim", default)
        along(x, f"given to {function.__name__}", dim)
        args = (*args[: position - 1], -1, *args[position:]) if len(args) >= position else args
        return wrap(x, function(x.rows, *args, **({**kwargs, "dim": -1} if len(args) < position else kwargs)))

    return handler


for _name in ("softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp"):
    for _space in (torch, Tensor, F):
        if hasattr(_space, _name):
            HANDLERS[getattr(_space, _name)] = _function_of_channels(getattr(_space, _name), 1)
for _function, _position, _default in ((F.softmin, 1, None), (F.glu, 1, -1), (F.normalize, 2, 1)):
    HANDLERS[_function] = _function_of_channels(_function, _position, _default)


@handles(F.rms_norm, torch.rms_norm)
def rms_norm(x: Cells, normalized_shape, weight=None, eps=None) -> Cells:
    if not x.channels_last or tuple(normalized_shape) != (x._channels,):
        raise UnknownSparseArgument(f"{where()}rms_norm of cells is over the channels of {x.layouts[1]}")
    return x.like(F.rms_norm(x.rows, normalized_shape, weight, eps))


@handles(torch.prelu, Tensor.prelu, F.prelu)
def prelu(x: Cells, weight) -> Cells:
    if weight.numel() > 1:
        along(x, "given the weights of a prelu", 1)
    return x.like(F.prelu(x.rows.movedim(-1, 1), weight).movedim(1, -1))


@handles(F.dropout2d, F.dropout3d, torch.feature_dropout)
def dropout_of_channels(x: Cells, p=0.5, training=True, inplace=False) -> Cells:
    """Whole channels of a sample."""
    along(x, "dropped", 1)
    if not training or p == 0.0:
        return x
    ones = x.rows.new_ones(x.plan.batch, x._channels, 1, 1)
    scale = F.dropout2d(ones, p).reshape(x.plan.batch, *(1,) * (x.ndim - 2), x._channels)
    if inplace:
        return x.replace(x.like(x.rows * per_cell(scale, x)))
    return x.like(x.rows * per_cell(scale, x))
