"""Transposed convolutions over the active cells of a masked convnet, as U-Net decoders have them.

Every one of the stride x stride sites that an input site becomes is an ordinary convolution of the input with some of
the taps (Shi et al., 2016, "sub-pixel convolution"). So it is one convolution at stride 1 with stride x stride as many
channels (stride x stride x stride of volumes), whose kernel is the same weight in another order, and then a
rearrangement inside the cell. At kernel = stride
that convolution is 1x1 and nothing is computed twice; at a kernel of 3 or 4 and stride 2 it is 3x3, of which a part of
the taps is zero: 36 products instead of 9 or 16, for which a CPU does better to compute the whole map.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _checks, _dispatch
from maefast.ops._conv_table import ROUTES, Sides
from maefast.ops.cells import (
    CellMask,
    check_cells,
    layout,
    pack_cells,
    pack_cells_reference,
    unpack_cells,
    unpack_cells_reference,
)
from maefast.ops.sparse_conv import conv_cells, library_fails, reaches_over, within


def conv_transpose_cells(
    x: Tensor,
    plan: CellMask,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sides = 1,
    padding: int | Sides = 0,
    output_padding: int | Sides = 0,
    groups: int = 1,
    dilation: int | Sides = 1,
    *,
    route: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """``pack(conv_transpose2d(unpack(x), weight, bias, ...))``: of the masked map, at its active cells alone; of
    volumes conv_transpose3d.

    Args:
        x: packed cells [T, h, w, Ci], of volumes [T, d, h, w, Ci]. weight: [Ci, Co / groups, kh, kw] or
            [Ci, Co / groups, kd, kh, kw]. bias: [Co] or None.
        stride, padding, output_padding, groups, dilation: as in `torch.nn.functional.conv_transpose2d`. They must be
            such that a map of H sites becomes one of H * stride: dilation * (kernel - 1) + output_padding + 1
            - 2 * padding = stride.
        route: "dense": the whole map by torch; else that of the convolution at stride 1 that this is, as in
            `conv_cells`. None: dense on a CPU where windows overlap (kernel > stride).

    Returns:
        [T, h * stride, w * stride, Co], of volumes with d * stride, in x's dtype (the autocast dtype where autocast is
        on). Gradients are computed without atomics.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, the output would not lie on the same cells, or the
            route does not serve this convolution.
    """
    check_cells(plan, x)
    if route is not None:
        _checks.one_of("route", route, ROUTES)
    stride, padding, output_padding, dilation = _check(
        x, weight, bias, stride, padding, output_padding, groups, dilation
    )
    dtype = x.dtype
    autocast = _checks.autocast(x.device.type)
    if autocast is not None and dtype is not torch.float64:
        dtype = autocast
        x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype is not dtype:
            raise TypeError(f"x is {dtype} but {what} is {tensor.dtype}")
    forced = _dispatch.check_name(backend, "backend") or _dispatch.forced()
    if forced == "reference" and route is None:
        args = (stride, padding, output_padding, groups, dilation)
        return conv_transpose_cells_reference(x, plan, weight, bias, *args)
    if route is None and backend is None and forced is None and x.device.type == "cpu":
        route = "dense" if any(_reach(*side) for side in _sides(weight, stride, padding, dilation)) else None
    if route == "dense":
        full = unpack_cells(x, plan, backend=backend)
        full = _library(full, weight, bias, stride, padding, output_padding, groups, dilation)
        return pack_cells(full, plan, backend=backend)
    kernel, reach = _subpixel(weight, stride, padding, dilation, groups)
    if bias is not None:
        bias = bias.reshape(groups, 1, -1).expand(groups, math.prod(stride), -1).flatten()
    out = conv_cells(x, plan, kernel, bias, 1, reach, 1, groups, route=route, backend=backend)
    sides, sites = len(stride), [n * s for n, s in zip(out.shape[1:-1], stride)]
    out = out.unflatten(-1, (groups, *stride, weight.shape[1]))
    out = out.permute(0, *(at + side for side in range(1, sides + 1) for at in (0, sides + 1)), sides + 1, -1)
    return out.reshape(x.shape[0], *sites, groups * weight.shape[1])


def conv_transpose_cells_reference(
    x: Tensor,
    plan: CellMask,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sides,
    padding: Sides,
    output_padding: Sides,
    groups: int,
    dilation: Sides,
) -> Tensor:
    """The definition, differentiable."""
    full = unpack_cells_reference(x, plan)
    out = _library(full, weight, bias, stride, padding, output_padding, groups, dilation)
    return pack_cells_reference(out * plan.upsampled_mask(out.shape[2:]), plan)


def _check(x, weight, bias, stride, padding, output_padding, groups, dilation) -> tuple[Sides, ...]:
    sides = x.ndim - 2
    _checks.tensor("weight", weight, ndim=sides + 2)
    _checks.integer("groups", groups, 1)
    if weight.shape[0] != x.shape[-1] or weight.shape[0] % groups or 0 in weight.shape:
        kernel = "kh, kw" if sides == 2 else "kd, kh, kw"
        raise ValueError(
            f"the weight of a transposed convolution of {x.shape[-1]} channels in {groups} groups is [{x.shape[-1]},"
            f" Co / groups, {kernel}], got {list(weight.shape)} (packed cells are {layout(sides)})"
        )
    if bias is not None:
        _checks.tensor("bias", bias)
        if tuple(bias.shape) != (weight.shape[1] * groups,):
            raise ValueError(f"bias must be [{weight.shape[1] * groups}], got {list(bias.shape)}")
    _checks.same_device(x=x, weight=weight, bias=bias)
    stride, padding = _checks.sides("stride", stride, 1, sides), _checks.sides("padding", padding, 0, sides)
    output_padding = _checks.sides("output_padding", output_padding, 0, sides)
    dilation = _checks.sides("dilation", dilation, 1, sides)
    for k, s, p, more, d in zip(weight.shape[2:], stride, padding, output_padding, dilation):
        if more >= max(s, d):
            raise ValueError(f"output_padding {more} must be smaller than the stride {s} or the dilation {d}")
        if d * (k - 1) + more + 1 - 2 * p != s:
            raise ValueError(
                f"a transposed convolution of kernel {k}, stride {s}, padding {p}, output_padding {more}, dilation {d}"
                " does not map H sites to H * stride, so its output lies on no cells: dilation * (kernel - 1)"
                " + output_padding + 1 - 2 * padding must be the stride"
            )
    return stride, padding, output_padding, dilation


def _subpixel(weight: Tensor, stride: Sides, padding: Sides, dilation: Sides, groups: int) -> tuple[Tensor, Sides]:
    """The weight [groups * sh * sw * Co / groups, Ci / groups, 2 rh + 1, 2 rw + 1] at stride 1, and (rh, rw).

    Site r of the stride sites takes tap t from the input site (r + padding - dilation * t) / stride away, where that is
    whole. With taps of zeros before and behind, tap t stands at stride * (reach - that distance) + r; a convolution
    counts the distance the other way round.
    """
    reach = []
    count = len(stride)
    sides = _sides(weight, stride, padding, dilation)
    for dim, (last, s, p), d in zip(range(2, 2 * count + 2, 2), sides, dilation):  # each after the last
        r = _reach(last, s, p)
        weight = _dilated(weight, dim, d).movedim(dim, -1)
        before = s * r - p
        weight = F.pad(weight, (before, s * (2 * r + 1) - before - last - 1)).unflatten(-1, (2 * r + 1, s))
        weight = weight.movedim((-2, -1), (dim, dim + 1))
        reach.append(r)
    # [Ci, Co / groups, kh, sh, kw, sw]
    kernel, steps = range(2, 2 * count + 2, 2), range(4, 2 * count + 4, 2)
    weight = weight.flip(tuple(kernel)).unflatten(0, (groups, -1)).permute(0, *steps, 2, 1, *(k + 1 for k in kernel))
    return weight.flatten(0, count + 1), tuple(reach)


def _sides(weight: Tensor, stride: Sides, padding: Sides, dilation: Sides) -> list[tuple[int, int, int]]:
    """(distance of the last tap, stride, padding) of each."""
    return [(d * (k - 1), s, p) for k, s, p, d in zip(weight.shape[2:], stride, padding, dilation)]


def _reach(last: int, stride: int, padding: int) -> int:
    """How many input sites away the farthest tap reads."""
    return max(-(-padding // stride), (last - padding) // stride, 0)


def _function(x: Tensor) -> Callable:
    return F.conv_transpose2d if x.ndim == 4 else F.conv_transpose3d


def _library(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, added, groups: int, dilation) -> Tensor:
    """torch's transposed convolution, around what oneDNN gets wrong."""
    dtype = x.dtype
    sides = zip(x.shape[2:], _sides(weight, stride, padding, dilation), added)
    sizes = [(n - 1) * s - 2 * p + last + 1 + more for n, (last, s, p), more in sides]  # of the result
    over = reaches_over(x, sizes, weight, dilation)
    if dtype.itemsize == 2 and (over or _one_wide(x, stride) or library_fails(x, dilation, groups)):
        x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))
    if not over:
        return _function(x)(x, weight, bias, stride, padding, added, groups, dilation).to(dtype)
    # Without padding, by the taps that write to the result, which is cut out of theirs or lies around it.
    weight, zeros, dilation = within(weight, sizes, x.shape[2:], stride, padding, dilation)
    out = F.pad(_function(x)(x, weight, None, stride, 0, 0, groups, dilation), [-n for n in zeros])
    return (out if bias is None else out + bias.view(-1, *(1,) * len(sizes))).to(dtype)


def _one_wide(x: Tensor, stride: Sides) -> bool:
    """Whether oneDNN by AMX leaves the gradient of x as it found it: that is a convolution at a stride, whose results
    are one site wide (as in `sparse_conv._one_wide`)."""
    return x.device.type == "cpu" and x.dtype is torch.bfloat16 and x.shape[-1] == 1 and stride[-1] > 1


def _dilated(weight: Tensor, dim: int, dilation: int) -> Tensor:
    """Zeros between the taps of one side."""
    if dilation == 1 or weight.shape[dim] == 1:
        return weight
    taps = F.pad(weight.movedim(dim, -1).unsqueeze(-1), (0, dilation - 1)).flatten(-2)
    return taps[..., : 1 - dilation].movedim(-1, dim)
