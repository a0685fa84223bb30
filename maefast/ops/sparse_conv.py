"""Convolutions over the active cells of a masked convnet: `conv_cells`.

A site sees its masked neighbours as zeros and the image border as the dense convolution does, and only active sites are
computed: the dense convolution of the masked map, times the mask (SparK, Tian et al., 2023; ConvNeXt V2, Woo et al.,
2023). Cells are stored whole, so a convolution needs no hash map: one table of neighbouring cells is enough.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _checks, _dispatch
from maefast.ops.cells import (
    CellMask,
    check_cells,
    pack_cells,
    pack_cells_reference,
    unpack_cells,
    unpack_cells_reference,
)
from maefast.ops.depthwise import depthwise_cells
from maefast.ops.linear import linear

ROUTES = ("rows", "depthwise", "dense")

Pair = tuple[int, int]


class Window(NamedTuple):
    """Where a convolution reads: (rows, columns) each."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @property
    def span(self) -> Pair:
        """Sites from the first tap to the last one."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation))

    @property
    def halo(self) -> tuple[int, int, int, int]:
        """(top, left, bottom, right) sites around a cell that its own sites read."""
        before = self.padding
        after = tuple(max(0, n - p - s) for n, p, s in zip(self.span, self.padding, self.stride))
        return *before, *after

    def radius(self, cell: Pair) -> int:
        """How many cells away the halo reaches."""
        return max(-(-n // size) for n, size in zip(self.halo, cell * 2))


def conv_cells(
    x: Tensor,
    plan: CellMask,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    route: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """``pack(conv2d(unpack(x), weight, bias, ...))``: a convolution of the masked map, at its active cells alone.

    Args:
        x: packed cells [T, h, w, Ci]. weight: [Co, Ci / groups, kh, kw]. bias: [Co] or None.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`. The cell must be a multiple of the
            stride, and the padding such that a map of H sites becomes one of H / stride.
        route: how it is computed; None chooses from measurements (`_conv_table`). "rows" (one matrix product, where no
            tap leaves its own cell) or "dense" (the whole map).

    Returns:
        [T, h / stride, w / stride, Co] in x's dtype (the autocast dtype where autocast is on).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or the output would not lie on the same cells.
    """
    check_cells(plan, x)
    window = _check(x, weight, bias, stride, padding, dilation, groups)
    if route is not None:
        _checks.one_of("route", route, ROUTES)
    if route == "depthwise" or (route is None and _is_depthwise(x, weight, window, groups)):
        if not _is_depthwise(x, weight, window, groups):
            raise ValueError(
                f'route "depthwise" does not take {_words(window)} in {groups} groups: see depthwise_cells'
            )
        return depthwise_cells(x, plan, weight, bias, backend=backend)
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype is not x.dtype:
            raise TypeError(f"x is {x.dtype} but {name} is {tensor.dtype}")

    if (_dispatch.check_name(backend, "backend") or _dispatch.forced()) == "reference" and route is None:
        return conv_cells_reference(x, plan, weight, bias, window, groups)
    inside = not any(window.halo)
    if route == "rows" and not inside:
        raise ValueError(f'route "rows" needs taps inside the cell, but {_words(window)} reads {window.halo} beyond it')
    if inside and route in (None, "rows"):
        return _rows(x, weight, bias, window, groups)
    return _dense(x, plan, weight, bias, window, groups)


def conv_cells_reference(
    x: Tensor, plan: CellMask, weight: Tensor, bias: Tensor | None, window: Window, groups: int
) -> Tensor:
    """The definition, differentiable."""
    out = F.conv2d(unpack_cells_reference(x, plan), weight, bias, *window[1:], groups)
    rows, columns = plan.grid
    h, w = out.shape[2] // rows, out.shape[3] // columns
    return pack_cells_reference(out * plan.upsampled_mask((rows * h, columns * w)), plan)


def _is_depthwise(x: Tensor, weight: Tensor, window: Window, groups: int) -> bool:
    """Whether `depthwise_cells` serves the call: one kernel of 3, 5 or 7 for each channel, same padding."""
    size = window.kernel[0]
    return (
        groups == x.shape[3] == weight.shape[0]
        and groups > 1
        and size in (3, 5, 7)
        and window == Window((size, size), (1, 1), (size // 2, size // 2), (1, 1))
    )


# --- checks ------------------------------------------------------------------------------------------------


def _pair(name: str, value: int | Pair, least: int) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(n, int) and n >= least for n in pair):
        raise ValueError(f"{name} must be an integer or two, at least {least}, got {value!r}")
    return pair


def _check(x, weight, bias, stride, padding, dilation, groups) -> Window:
    _checks.tensor("weight", weight, ndim=4)
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must be positive and divide the {weight.shape[0]} output channels, got {groups!r}")
    if weight.shape[1] * groups != x.shape[3] or 0 in weight.shape:
        raise ValueError(
            f"a weight {list(weight.shape)} in {groups} groups takes {weight.shape[1] * groups} channels, but x has"
            f" {x.shape[3]} (packed cells are [T, h, w, C])"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    _checks.same_device(x=x, weight=weight, bias=bias)
    kernel = tuple(weight.shape[2:])
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    most = tuple(d * (k - 1) for k, d in zip(kernel, dilation))  # of both sides together
    if padding == "valid":
        padding = 0
    elif padding == "same":
        padding = tuple(n // 2 for n in most)
    elif isinstance(padding, str):
        raise ValueError(f"padding must be an integer, two, 'same' or 'valid', got {padding!r}")
    window = Window(kernel, stride, _pair("padding", padding, 0), dilation)
    for name, size, s in zip(("height", "width"), x.shape[1:3], stride):
        if size % s:
            raise ValueError(
                f"stride {s} does not divide the {name} {size} of a cell: the output would be coarser than the cells."
                " Choose larger mask cells, or run the remaining levels on the dense map"
            )
    for p, n, s in zip(window.padding, most, stride):
        if not n + 1 - s <= 2 * p <= n:
            fits = [q for q in range(n // 2 + 1) if 2 * q >= n + 1 - s]
            raise ValueError(
                f"{_words(window)} does not map H sites to H / stride, so its output lies on no cells: "
                + (f"padding {' or '.join(map(str, fits))} does" if fits else "no symmetric padding does")
            )
    return window


def _words(window: Window) -> str:
    one = lambda pair: str(pair[0]) if pair[0] == pair[1] else str(pair)  # noqa: E731
    (kh, kw), *rest = window
    names = zip(("stride", "padding", "dilation"), rest)
    return f"a {kh}x{kw} convolution of " + ", ".join(f"{name} {one(pair)}" for name, pair in names)


# --- routes ------------------------------------------------------------------------------------------------


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
    """No tap leaves its own cell (1x1, kernel = stride): one matrix product over rows of taps."""
    cells, h, w, channels = x.shape
    (sh, sw), (dh, dw), (nh, nw) = window.stride, window.dilation, window.span
    ho, wo = h // sh, w // sw
    if window.stride != (1, 1):
        x = x.view(cells, ho, sh, wo, sw, channels)[:, :, :nh:dh, :, :nw:dw].permute(0, 1, 3, 2, 4, 5)
    rows = x.reshape(cells * ho * wo, -1)
    return _product(rows, weight, bias, groups).view(cells, ho, wo, -1)


def _dense(x: Tensor, plan: CellMask, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
    """The whole map, as a dense network computes it."""
    return pack_cells(F.conv2d(unpack_cells(x, plan), weight, bias, *window[1:], groups), plan)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Rows of taps [R, kh * kw * Ci] times the weight: [R, Co]."""
    out_channels, per_group, kh, kw = weight.shape
    if groups == 1:
        return linear(rows, weight.permute(0, 2, 3, 1).reshape(out_channels, -1), bias)
    weight = weight.reshape(groups, -1, per_group, kh * kw)
    out = torch.einsum("rkgc,gock->rgo", rows.view(-1, kh * kw, groups, per_group), weight).flatten(1)
    return out if bias is None else out + bias
