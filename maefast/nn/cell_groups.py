"""`Cells` with their channels in groups, [B, G, C / G, H, W]: channel shuffles, split attention, selective kernels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from maefast.nn.cell_elementwise import handles
from maefast.nn.cells import (
    HANDLERS,
    Cells,
    UnknownSparseArgument,
    UnknownSparseAttribute,
    UnknownSparseFunction,
    name_of,
    serve,
    where,
)

GROUPED: dict[Callable, Callable] = {}  # of torch functions, on GroupedCells


class GroupedCells:
    """Stands in the place of a tensor [B, G, C / G, H, W]; `cells` are the same channels in one dimension."""

    def __init__(self, cells: Cells, groups: tuple[int, int]) -> None:
        self.cells, self.groups, self.ndim = cells, groups, cells.ndim + 1
        self.dtype, self.device = cells.dtype, cells.device

    @property
    def shape(self) -> torch.Size:
        batch, _, *sites = self.cells.shape
        return torch.Size((batch, *self.groups, *sites))

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def contiguous(self, **kwargs) -> GroupedCells:
        return self

    @property
    def parts(self) -> Tensor:
        """[T, h, w, G, C / G]."""
        return self.cells.rows.unflatten(-1, self.groups)

    def transpose(self, *args, **kwargs) -> GroupedCells:
        return torch.transpose(self, *args, **kwargs)

    def view(self, *shape) -> Cells | GroupedCells:
        return torch.reshape(self, shape[0] if len(shape) == 1 else shape)

    reshape = view

    def flatten(self, *args, **kwargs) -> Cells:
        return torch.flatten(self, *args, **kwargs)

    def sum(self, *args, **kwargs) -> Cells:
        return torch.sum(self, *args, **kwargs)

    def unbind(self, *args, **kwargs) -> tuple[Cells, ...]:
        return torch.unbind(self, *args, **kwargs)

    def __mul__(self, other) -> GroupedCells:
        return torch.mul(self, other)

    def __add__(self, other) -> GroupedCells:
        return torch.add(self, other)

    __rmul__, __radd__ = __mul__, __add__

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        raise UnknownSparseAttribute(f"{where()}packed cells in groups of channels have no Tensor.{name}")

    def __repr__(self) -> str:
        return f"GroupedCells(shape={tuple(self.shape)}, {self.cells.plan!r}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        handler = GROUPED.get(func)
        if handler is None:
            raise UnknownSparseFunction(f"{where()}{name_of(func)} is not known on packed cells in groups of channels")
        return serve(handler, func, args, kwargs)


def _refuse(operators: str) -> None:
    """Python looks for these on the class: they name the module, as functions do."""

    def refused(name: str) -> Callable:
        def call(self, *args):
            raise UnknownSparseFunction(f"{where()}{name} is not known on packed cells in groups of channels")

        return call

    for name in (f"__{operator}__" for operator in operators.split()):
        setattr(GroupedCells, name, refused(name))


_refuse(
    "sub rsub truediv rtruediv pow rpow matmul rmatmul neg abs iadd imul lt le gt ge getitem setitem contains len iter "
    "bool"
)


# --- there and back ----------------------------------------------------------------------------------------


def _sizes(shape, count: int) -> tuple[int, ...]:
    shape = tuple(shape)
    if -1 in shape:
        known = -math.prod(shape)
        shape = tuple(count // max(known, 1) if size == -1 else size for size in shape)
    return shape


@handles(Tensor.view, Tensor.reshape)
def view(x: Cells, *shape) -> Cells | GroupedCells | Tensor:
    shape = shape[0] if len(shape) == 1 else shape
    if isinstance(shape, int) or not isinstance(shape, (tuple, list)):
        raise UnknownSparseArgument(f"{where()}packed cells have no Tensor.view as {shape}")
    batch, _, *sites = x.shape
    wanted = _sizes(shape, x.numel())
    if wanted == tuple(x.shape):
        return x
    if not x.channels_last and max(sites) == 1 and wanted == tuple(x.shape[:2]):
        return x.dense().flatten(1)  # a pooled map is no map any more
    if not x.channels_last and len(wanted) == x.ndim + 1 and wanted[0] == batch and list(wanted[3:]) == sites:
        return GroupedCells(x.part(), wanted[1:3])
    raise UnknownSparseArgument(
        f"{where()}packed cells {tuple(x.shape)} have no Tensor.view as {tuple(shape)}, only groups of channels"
    )


HANDLERS[torch.reshape] = view


@handles(torch.unflatten, Tensor.unflatten)
def unflatten(x: Cells, dim, sizes) -> GroupedCells:
    batch, channels, *sites = x.shape
    if x.channels_last or dim % x.ndim != 1 or len(sizes) != 2:
        raise UnknownSparseArgument(f"{where()}cells {x.layouts[0]} are split into groups of channels only")
    return view(x, (batch, *_sizes(sizes, channels), *sites))


@handles(torch.stack)
def stack(tensors, dim=0) -> GroupedCells:
    parts = list(tensors)
    first = next(part for part in parts if isinstance(part, Cells))
    if dim % (first.ndim + 1) != 1 or not all(isinstance(part, Cells) and not part.channels_last for part in parts):
        raise UnknownSparseArgument(
            f"{where()}cells {first.layouts[0]} are stacked in front of their channels only, dim=1"
        )
    return GroupedCells(torch.cat(parts, 1), (len(parts), parts[0]._channels))


def _grouped(*functions: Callable):
    def register(handler):
        GROUPED.update(dict.fromkeys(functions, handler))
        return handler

    return register


@_grouped(torch.reshape)
def _reshape(x: GroupedCells, shape) -> Cells | GroupedCells:
    return view(x.cells, _sizes(shape, x.cells.numel()))


@_grouped(torch.flatten)
def _flatten(x: GroupedCells, start_dim=0, end_dim=-1) -> Cells:
    if (start_dim % x.ndim, end_dim % x.ndim) != (1, 2):
        raise UnknownSparseArgument(f"{where()}groups of channels are flattened from 1 to 2 only")
    return x.cells


# --- what groups are for -----------------------------------------------------------------------------------


@_grouped(torch.transpose)
def _transpose(x: GroupedCells, dim0, dim1) -> GroupedCells:
    if {dim0 % x.ndim, dim1 % x.ndim} != {1, 2}:
        raise UnknownSparseArgument(f"{where()}of cells in groups of channels, 1 and 2 are transposed only")
    return GroupedCells(x.cells.like(x.parts.transpose(-1, -2).flatten(-2)), x.groups[::-1])


@_grouped(torch.sum)
def _sum(x: GroupedCells, dim=None, keepdim=False) -> Cells:
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if keepdim or not isinstance(dim, int) or dim % x.ndim not in (1, 2):
        raise UnknownSparseArgument(f"{where()}cells in groups of channels are summed over 1 or 2 only")
    return x.cells.like(x.parts.sum(-2 if dim % x.ndim == 1 else -1))


@_grouped(torch.unbind)
def _unbind(x: GroupedCells, dim=0) -> tuple[Cells, ...]:
    if dim % x.ndim != 1:
        raise UnknownSparseArgument(f"{where()}groups of channels are unbound along 1 only")
    return x.cells.chunk(x.groups[0], 1)


def _binary(function: Callable) -> Callable:
    def handler(x, other) -> GroupedCells:
        x, other = (x, other) if isinstance(x, GroupedCells) else (other, x)
        if isinstance(other, GroupedCells):
            if other.groups != x.groups:
                raise UnknownSparseArgument(f"{where()}groups of {other!r} and {x!r}")
            other = other.cells
        elif isinstance(other, Tensor) and other.ndim:
            gate = other.reshape((1,) * (x.ndim - other.ndim) + tuple(other.shape))
            if gate.ndim != x.ndim or max(gate.shape[3:]) != 1:
                raise UnknownSparseArgument(f"{where()}a tensor {tuple(other.shape)} does not go with {x!r}")
            other = gate.expand(-1, *x.groups, *gate.shape[3:]).flatten(1, 2)
        return GroupedCells(function(x.cells, other), x.groups)

    return handler


for _function in (torch.mul, torch.add):
    GROUPED[_function] = GROUPED[getattr(Tensor, _function.__name__)] = _binary(_function)
