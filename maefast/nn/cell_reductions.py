"""torch's reductions of `Cells`: over the sites of a sample that are seen, or over the channels of each site."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast import ops
from maefast.nn.cell_channels import along
from maefast.nn.cell_elementwise import ELEMENTWISE, handles, of_sides, wrap
from maefast.nn.cells import HANDLERS, Cells, UnknownSparseArgument, complete, where


def _over_sites(x: Cells, dim) -> bool:
    """Whether `dim` is every side of the map."""
    return isinstance(dim, (tuple, list)) and tuple(sorted(d % x.ndim for d in dim)) == x.site_dims


def _pooled(x: Cells, out: Tensor, keepdim: bool, dtype=None) -> Tensor:
    """[B, C] as torch gives it."""
    out = out.to(dtype or x.dtype)
    for dim in x.site_dims if keepdim else ():
        out = out.unsqueeze(dim)
    return out


def _per_site(x: Cells, what: str, dim, keepdim: bool) -> None:
    """Raise unless the reduction leaves one channel of every site."""
    single = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if not isinstance(single, int) or single % x.ndim != x.channel_dim:
        every = "both" if x.ndim == 4 else "all"
        raise UnknownSparseArgument(
            f"{where()}the {what} of cells is over {every} sides of the map {x.site_dims}, or over the channels;"
            f" not {dim}"
        )
    if not keepdim:
        raise UnknownSparseArgument(f"{where()}the {what} of cells over their channels takes keepdim=True")


@handles(torch.mean, Tensor.mean)
def mean(input: Cells, dim=None, keepdim=False, *, dtype=None) -> Tensor | Cells:
    """Over the active sites of each sample, or over the channels of each site."""
    if _over_sites(input, dim):
        return _pooled(input, ops.global_pool_cells(input.rows, input.plan), keepdim, dtype)
    _per_site(input, "mean", dim, keepdim)
    return input.like(input.rows.mean(-1, True, dtype=dtype))


@handles(torch.sum, Tensor.sum)
def total(input: Cells, dim=None, keepdim=False, *, dtype=None) -> Tensor | Cells:
    if _over_sites(input, dim) and input.rows.is_floating_point():
        return _pooled(input, ops.segment_sum(input.rows, input.plan), keepdim, dtype)
    _per_site(input, "sum", dim, keepdim)
    return input.like(input.rows.sum(-1, True, dtype=dtype))


@handles(torch.linalg.vector_norm, torch.norm, Tensor.norm)
def vector_norm(x: Cells, p=2, dim=None, keepdim=False, dtype=None, *, ord=2) -> Tensor | Cells:
    """The root of the sum of squares over the active sites of each sample: what ConvNeXt V2's GRN starts from."""
    p = {None: 2, "fro": 2}.get(p, p)
    if not _over_sites(x, dim):
        _per_site(x, "norm", dim, keepdim)
        return x.like(torch.linalg.vector_norm(x.rows, p if p != 2 else ord, -1, True, dtype=dtype))
    if {ord, p} != {2}:
        raise UnknownSparseArgument(f"{where()}the norm of cells over the sides of the map is the 2-norm")
    wide = torch.promote_types(x.dtype, torch.float32)
    squares = ops.segment_sum(x.rows.to(wide).square(), x.plan)
    root = squares.clamp(min=torch.finfo(wide).tiny).sqrt() * (squares > 0)  # no gradient through a root of zero
    return _pooled(x, root, keepdim, dtype)


def _extremum(function: Callable) -> Callable:
    def handler(x: Cells, dim=(), keepdim=False) -> Tensor | Cells:
        if not _over_sites(x, dim):
            _per_site(x, "extremum", dim, keepdim)
            return x.like(function(x.rows, -1, True))
        return _pooled(x, function(_never_chosen(x, function).flatten(2), 2), keepdim)

    return handler


def _never_chosen(x: Cells, function: Callable) -> Tensor:
    """The map with values at masked sites that no extremum takes, so that ties are broken as in the dense one."""
    worst = float("-inf") if function.__name__ in ("amax", "max") else float("inf")
    return x.dense(x.rows.new_full((x._channels,), worst))


for _function in (torch.amax, Tensor.amax, torch.amin, Tensor.amin):
    HANDLERS[_function] = _extremum(_function)


def _of_channels(function: Callable, what: str) -> Callable:
    def handler(x: Cells, dim=None, *args, **kwargs) -> Cells | tuple:
        keepdim = kwargs.get("keepdim", bool(args) and args[-1])
        _per_site(x, what, dim, keepdim)
        return wrap(x, function(x.rows, -1, *args, **kwargs))

    return handler


for _name in ("var", "std", "var_mean", "std_mean", "logsumexp", "prod", "argmax", "argmin", "any", "all"):
    for _space in (torch, Tensor):
        if hasattr(_space, _name):
            HANDLERS[getattr(_space, _name)] = _of_channels(getattr(_space, _name), _name)


def _max_or_min(function: Callable) -> Callable:
    """Of two maps, or over the channels."""
    reduced = _of_channels(function, function.__name__)

    def handler(input, *args, **kwargs) -> Cells | tuple:
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, (Tensor, Cells)):
            complete()
            return ELEMENTWISE[getattr(torch, f"{function.__name__}imum")](input, other)
        return reduced(input, *args, **kwargs)

    return handler


for _function in (torch.max, Tensor.max, torch.min, Tensor.min):
    HANDLERS[_function] = _max_or_min(_function)


def _adaptive_avg_pool(sides: int) -> Callable:
    what = f"adaptive_avg_pool{sides}d"

    def handler(input: Cells, output_size) -> Tensor:
        _to_one(input, what, output_size, sides)
        return mean(input, input.site_dims, keepdim=True)

    return handler


def _adaptive_max_pool(sides: int, function: Callable) -> Callable:
    what = f"adaptive_max_pool{sides}d"

    def handler(input: Cells, output_size, return_indices=False) -> Tensor:
        _to_one(input, what, output_size, sides)
        if return_indices:
            raise UnknownSparseArgument(f"{where()}{what} with indices is not known on packed cells")
        return function(_never_chosen(input, torch.amax), 1)

    return handler


def _to_one(x: Cells, what: str, size, sides: int) -> None:
    along(x, f"left by {what}", 1)
    of_sides(x, what, sides)
    if size != 1 and tuple(size if isinstance(size, (tuple, list)) else (size,)) != (1,) * sides:
        raise UnknownSparseArgument(f"{where()}{what} to {size} is not known on packed cells, only to 1")


HANDLERS[F.adaptive_avg_pool2d], HANDLERS[F.adaptive_avg_pool3d] = _adaptive_avg_pool(2), _adaptive_avg_pool(3)
HANDLERS[F.adaptive_max_pool2d] = _adaptive_max_pool(2, F.adaptive_max_pool2d)
HANDLERS[F.adaptive_max_pool3d] = _adaptive_max_pool(3, F.adaptive_max_pool3d)
