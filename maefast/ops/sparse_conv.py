"""Convolutions over the active cells of a masked convnet: `conv_cells`.

A site sees its masked neighbours as zeros and the image border as the dense convolution does, and only active sites are
computed: the dense convolution of the masked map, times the mask (SparK, Tian et al., 2023; ConvNeXt V2, Woo et al.,
2023). Cells are stored whole, so a convolution needs no hash map: one table of neighbouring cells is enough.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _autograd, _checks, _conv_table, _registry
from maefast.ops._conv_table import Sides, Window, reaching
from maefast.ops._tap_rows import product, spread, turned, weight_gradient
from maefast.ops.cells import (
    CellMask,
    check_cells,
    layout,
    pack_cells,
    pack_cells_reference,
    unpack_cells,
    unpack_cells_reference,
)
from maefast.ops.depthwise import depthwise_cells
from maefast.ops.implicit_conv import Implicit

_unsafe_view = torch.ops.aten._unsafe_view.default
_raw_op = _registry.family("sparse_conv")

# Bytes of gathered rows at a time. On a CPU, glibc gives larger blocks back to the system and pays for fresh pages.
CHUNK = defaultdict(lambda: 2**28, cpu=2**24)


def conv_cells(
    x: Tensor,
    plan: CellMask,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sides = 1,
    padding: int | Sides | str = 0,
    dilation: int | Sides = 1,
    groups: int = 1,
    *,
    route: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """``pack(conv2d(unpack(x), weight, bias, ...))``: a convolution of the masked map, at its active cells alone; of
    volumes conv3d.

    Args:
        x: packed cells [T, h, w, Ci], of volumes [T, d, h, w, Ci]. weight: [Co, Ci / groups, kh, kw] or
            [Co, Ci / groups, kd, kh, kw]. bias: [Co] or None.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`. The cell must be a multiple of the
            stride, and the padding such that a map of H sites becomes one of H / stride.
        route: how it is computed; None chooses from measurements (`_conv_table`). "rows" (one matrix product, where no
            tap leaves its own cell), "depthwise" (`depthwise_cells`, flat maps), "halo" (the library's convolution of
            framed cells), "taps" (one matrix product over gathered taps), "dense" (the whole map) or, only where it is
            asked for, "implicit" (one matrix product whose taps are read inside a Triton kernel; no groups, flat maps).

    Returns:
        [T, h / stride, w / stride, Co] or [T, d / stride, h / stride, w / stride, Co] in x's dtype (the autocast
        dtype where autocast is on). Gradients are computed
        without atomics.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, the output would not lie on the same cells, or the
            route does not serve this convolution.
    """
    check_cells(plan, x)
    window = _check(x, weight, bias, stride, padding, dilation, groups)
    if route is not None:
        _checks.one_of("route", route, _conv_table.ROUTES)
    kind, dtype, depthwise = x.device.type, x.dtype, _is_depthwise(x, weight, window, groups)
    autocast = _checks.autocast(kind)
    if autocast is not None and dtype is not torch.float64:
        dtype = autocast
    call = _conv_table.Call(kind, dtype, tuple(x.shape[1:-1]), window, groups, x.shape[-1], weight.shape[0], depthwise)
    name, route = _conv_table.choose(call, backend, route)
    if route == "depthwise":
        out = depthwise_cells(x, plan, weight, bias, backend=backend)
        return out if window.stride == (1, 1) else out[:, :: window.stride[0], :: window.stride[1]].contiguous()
    if dtype is not x.dtype or autocast is not None:
        x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype is not dtype:
            raise TypeError(f"x is {dtype} but {what} is {tensor.dtype}")
    if route == "reference":
        return conv_cells_reference(x, plan, weight, bias, window, groups)
    if route == "rows":
        return _rows(x, weight, bias, window, groups)
    if route == "dense":
        return _dense(x, plan, weight, bias, window, groups, backend)
    neighbours = plan.neighbours(window.radius(call.cell))
    return _autograd.apply(_RUN[route], x.contiguous(), neighbours, weight, bias, window, groups, name)


def conv_cells_reference(
    x: Tensor, plan: CellMask, weight: Tensor, bias: Tensor | None, window: Window, groups: int
) -> Tensor:
    """The definition, differentiable."""
    out = _conv(unpack_cells_reference(x, plan), weight, bias, window, groups)
    return pack_cells_reference(out * plan.upsampled_mask(out.shape[2:]), plan)


# --- checks ------------------------------------------------------------------------------------------------


def _check(x, weight, bias, stride, padding, dilation, groups) -> Window:
    sides = x.ndim - 2
    _checks.tensor("weight", weight, ndim=sides + 2)
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must be positive and divide the {weight.shape[0]} output channels, got {groups!r}")
    if weight.shape[1] * groups != x.shape[-1] or 0 in weight.shape:
        raise ValueError(
            f"a weight {list(weight.shape)} in {groups} groups takes {weight.shape[1] * groups} channels, but x has"
            f" {x.shape[-1]} (packed cells are {layout(sides)})"
        )
    if bias is not None:
        _checks.tensor("bias", bias)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    _checks.same_device(x=x, weight=weight, bias=bias)
    kernel, stride = tuple(weight.shape[2:]), _checks.sides("stride", stride, 1, sides)
    # One tap has no dilation; oneDNN computes wrong weight gradients where it is told of one.
    dilation = tuple(1 if k == 1 else d for k, d in zip(kernel, _checks.sides("dilation", dilation, 1, sides)))
    most = tuple(d * (k - 1) for k, d in zip(kernel, dilation))  # of both sides together
    if isinstance(padding, str):
        _checks.one_of("padding", padding, ("same", "valid"))
        padding = tuple(n // 2 for n in most) if padding == "same" else 0
    window = Window(kernel, stride, _checks.sides("padding", padding, 0, sides), dilation)
    for name, size, s in zip(("depth", "height", "width")[-sides:], x.shape[1:-1], stride):
        if size % s:
            raise ValueError(
                f"stride {s} does not divide the {name} {size} of a cell: the output would be coarser than the cells."
                " Choose larger mask cells, or run the remaining levels on the dense map"
            )
    for p, n, s in zip(window.padding, most, stride):
        if not n + 1 - s <= 2 * p <= n:
            fits = range(max(0, (n + 2 - s) // 2), n // 2 + 1)  # 2 q from n + 1 - s to n
            raise ValueError(
                f"{window} does not map H sites to H / stride, so its output lies on no cells: "
                + (f"padding {' or '.join(map(str, fits))} does" if fits else "no symmetric padding does")
            )
    return window


def _is_depthwise(x: Tensor, weight: Tensor, window: Window, groups: int) -> bool:
    """Whether `depthwise_cells` serves the call, at stride 1 or all but the sites that a stride skips."""
    size = window.kernel[0]
    same = Window((size, size), window.stride, (size // 2, size // 2), (1, 1))
    return window == same and size in (3, 5, 7) and 1 < groups == x.shape[-1] == weight.shape[0]


# --- routes ------------------------------------------------------------------------------------------------


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
    """No tap leaves its own cell (1x1, kernel = stride): one matrix product over rows of taps."""
    cells, *sites, channels = x.shape
    sites = [size // s for size, s in zip(sites, window.stride)]
    if max(window.stride) > 1:
        for dim, (size, s, d, n) in enumerate(zip(sites, window.stride, window.dilation, window.span()), 1):
            x = x.unflatten(dim, (size, s)).movedim(dim + 1, -2)[..., :n:d, :]
    rows = x.reshape(cells * math.prod(sites), math.prod(window.kernel) * channels)
    return product(rows, weight, bias, groups).view(cells, *sites, weight.shape[0])


def _dense(x, plan: CellMask, weight, bias, window: Window, groups: int, backend: str | None) -> Tensor:
    """The whole map, as a dense network computes it."""
    full = _conv(unpack_cells(x, plan, backend=backend), weight, bias, window, groups)
    return pack_cells(full, plan, backend=backend)


# 16-bit dtypes whose 3-D convolutions oneDNN cannot compute here: torch's own loop takes over, many times slower than
# oneDNN in float32.
SLOW = {
    dtype
    for dtype, name in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported"))
    if not getattr(torch.ops.mkldnn, name, lambda: True)()
}


def library(x: Tensor) -> Callable:
    """torch's convolution of maps [B, C, H, W] or [B, C, D, H, W]."""
    return F.conv2d if x.ndim == 4 else F.conv3d


def conv_maps(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides, dilation: Sides, groups: int
) -> Tensor:
    """torch's convolution of dense maps [B, C, (D,) H, W], autocast included, around what a CPU's oneDNN gets wrong."""
    dtype = _checks.autocast(x.device.type)
    if dtype is not None and x.dtype is not torch.float64:
        x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    return _conv(x, weight, bias, Window(tuple(weight.shape[2:]), stride, padding, dilation), groups)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
    stride, padding, dilation = window[1:]
    if reaches_over(x, x.shape[2:], weight, dilation):
        spans = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:])]
        outputs = [(n + 2 * p - span) // s + 1 for n, p, span, s in zip(x.shape[2:], padding, spans, stride)]
        weight, zeros, dilation = within(weight, x.shape[2:], outputs, stride, padding, dilation)
        x, padding = F.pad(x, zeros), (0,) * len(stride)
    if max(weight.shape[2:]) == 1 and max(stride) > 1:
        # oneDNN's weight gradient of a 1x1 convolution with a stride writes out of bounds (torch 2.13, channels last,
        # few channels), so the sites it skips are left out here.
        for dim, s in enumerate(stride, 2):
            x = x[(slice(None),) * dim + (slice(None, None, s),)]
        stride = (1,) * len(stride)
    wide = library_fails(x, dilation, groups)
    return _library_conv(x, weight, bias, stride, padding, dilation, groups, wide)


def reaches_over(x: Tensor, sizes: Sides, weight: Tensor, dilation: Sides) -> bool:
    """Whether a CPU's convolution has a kernel longer than the maps of `sizes` that it reads. There oneDNN's weight
    gradient is wrong or crashes (torch 2.13: in bfloat16 by AVX-512, of volumes in float32, too)."""
    return x.device.type == "cpu" and any(d * (k - 1) >= n for k, d, n in zip(weight.shape[2:], dilation, sizes))


def within(
    weight: Tensor, sizes: Sides, outputs: Sides, stride: Sides, padding: Sides, dilation: Sides
) -> tuple[Tensor, list[int], Sides]:
    """The taps that reach maps of `sizes`, the zeros around these that they read (as `F.pad` takes them), and their
    dilation."""
    zeros, steps = [], []
    for dim, (n, m, s, p, d) in enumerate(zip(sizes, outputs, stride, padding, dilation), 2):
        taps = reaching(n, m, weight.shape[dim], s, p, d)
        weight = weight.narrow(dim, taps.first, taps.count)
        zeros = [taps.before, taps.after, *zeros]
        steps.append(d if taps.count > 1 else 1)
    return weight, zeros, tuple(steps)


def _library_conv(x: Tensor, weight, bias, stride, padding, dilation, groups: int, wide: bool) -> Tensor:
    """torch's convolution, around what oneDNN gets wrong; `wide`: computed in float32."""
    dtype = x.dtype
    if wide:
        x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))
    x, stride, padding = _one_wide(x, weight, stride, padding, dilation)
    return library(x)(x, weight, bias, stride, padding, dilation, groups).to(dtype)


def _one_wide(x: Tensor, weight: Tensor, stride: Sides, padding: Sides, dilation: Sides) -> tuple[Tensor, Sides, Sides]:
    """Maps, stride and padding of the same convolution without a stride along the last dimension, where the result is
    one site wide there: by AMX, oneDNN leaves such results in bfloat16 unwritten (torch 2.10 to 2.13)."""
    if x.device.type != "cpu" or x.dtype is not torch.bfloat16 or stride[-1] == 1:
        return x, stride, padding
    span, width = dilation[-1] * (weight.shape[-1] - 1) + 1, x.shape[-1] + 2 * padding[-1]
    if not span <= width < span + stride[-1]:
        return x, stride, padding
    x = F.pad(x, (padding[-1], span - padding[-1] - x.shape[-1]))  # less than nothing cuts off
    return x, (*stride[:-1], 1), (*padding[:-1], 0)


def library_fails(x: Tensor, dilation: Sides, groups: int) -> bool:
    """Whether a 16-bit convolution of a CPU is better computed in float32: oneDNN's weight gradient is wrong for some
    sizes with groups and dilation together (torch 2.13), or volumes are `SLOW`."""
    if x.device.type != "cpu" or x.dtype.itemsize != 2:
        return False
    return (groups > 1 and max(dilation) > 1) or _slow(x)


def _slow(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.ndim == 5 and x.dtype in SLOW


@_raw_op("halo_cells(Tensor x, Tensor neighbours, SymInt[] halo) -> Tensor")
def _halo_cells_fake(x, neighbours, halo):
    return x.new_empty((x.shape[0], *(n + more for n, more in zip(x.shape[1:-1], _added(halo))), x.shape[-1]))


@_raw_op("halo_cells_backward(Tensor grad, Tensor neighbours, SymInt[] halo) -> Tensor")
def _halo_cells_backward_fake(grad, neighbours, halo):
    sites = (n - more for n, more in zip(grad.shape[1:-1], _added(halo)))
    return grad.new_empty((grad.shape[0], *sites, grad.shape[-1]))


def _added(halo) -> list[int]:
    """How much longer each side of a framed cell is."""
    sides = len(halo) // 2
    return [before + after for before, after in zip(halo[:sides], halo[sides:])]


class _Halo(torch.autograd.Function):
    """A frame of neighbouring sites around every cell, then the library's dense convolution of these small images.

    The frames are made again in the backward: a copy costs less than keeping up to twice the activations. At stride 1
    the gradient of x is the same kind of convolution, of grad's frames; else the frames' gradients are folded back.
    """

    @staticmethod
    def forward(ctx, x, neighbours, weight, bias, window, groups, name):
        if ctx is not None:
            ctx.save_for_backward(x, neighbours, weight)
            ctx.window, ctx.groups, ctx.backend = window, groups, name
        return _framed_conv(x, neighbours, weight, bias, window, groups, name)

    @staticmethod
    @_autograd.once("conv_cells")
    def backward(ctx, grad):
        x, neighbours, weight = ctx.saved_tensors
        window, groups, name = ctx.window, ctx.groups, ctx.backend
        need_x, _, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = grad_weight = None
        fold = need_x and max(window.stride) > 1
        if need_x and not fold:
            grad_x = _framed_conv(grad, neighbours, turned(weight, groups), None, window, groups, name)
        if fold or need_weight:
            frames = _registry.raw("halo_cells", name)(x, neighbours, window.halo()).movedim(-1, 1)
            # The library sums a float16 weight gradient of a CPU image by image, and these are many small images.
            small = need_weight and x.device.type == "cpu" and x.dtype is torch.float16
            wide = torch.float32 if small or library_fails(x, window.dilation, groups) else x.dtype
            inputs = (t.to(wide) for t in (grad.movedim(-1, 1), frames, weight))
            none = (0,) * len(window.kernel)
            args = None, window.stride, none, window.dilation, False, none, groups, (fold, need_weight, False)
            folded, grad_weight, _ = torch.ops.aten.convolution_backward(*inputs, *args)
            folded, grad_weight = (None if t is None else t.to(x.dtype) for t in (folded, grad_weight))
            if fold:
                folded = folded.movedim(1, -1).contiguous()
                grad_x = _registry.raw("halo_cells_backward", name)(folded, neighbours, window.halo())
        grad_bias = grad.flatten(0, -2).sum(0) if need_bias else None
        return grad_x, None, grad_weight if need_weight else None, grad_bias, None, None, None


def _framed_conv(x, neighbours, weight, bias, window: Window, groups: int, name: str) -> Tensor:
    frames = _registry.raw("halo_cells", name)(x, neighbours, window.halo()).movedim(-1, 1)
    none = (0,) * len(window.kernel)
    wide = _slow(frames)  # of what fails, the backward asks
    out = _library_conv(frames, weight, bias, window.stride, none, window.dilation, groups, wide).movedim(1, -1)
    if torch.compiler.is_compiling():  # torch 2.11 loses the gradient of a Function that returns a view
        return out.clone(memory_format=torch.contiguous_format)
    return _unsafe_view(out.contiguous(), out.shape)  # no view: it may be written into


@_raw_op(
    "gather_taps(Tensor x, Tensor neighbours, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation)"
    " -> Tensor"
)
def _gather_taps_fake(x, neighbours, kernel, stride, padding, dilation):
    rows = neighbours.shape[0] * math.prod(n // s for n, s in zip(x.shape[1:-1], stride))
    return x.new_empty((rows, math.prod(kernel) * x.shape[-1]))


@_raw_op(
    "gather_taps_backward(Tensor grad, Tensor neighbours, SymInt[] size, SymInt[] kernel, SymInt[] stride,"
    " SymInt[] padding, SymInt[] dilation) -> Tensor"
)
def _gather_taps_backward_fake(grad, neighbours, size, kernel, stride, padding, dilation):
    return grad.new_empty((neighbours.shape[0], *size))


class _Taps(torch.autograd.Function):
    """Every tap of every output as a row, then one matrix product, some cells at a time so that the rows stay small.

    Rows are gathered again in the backward. At stride 1 the gradient of x is the same kind of product, of grad's rows.
    """

    @staticmethod
    def forward(ctx, x, neighbours, weight, bias, window, groups, name):
        if ctx is not None:
            ctx.save_for_backward(x, neighbours, weight)
            ctx.window, ctx.groups, ctx.backend = window, groups, name
        return _taps_conv(x, neighbours, weight, bias, window, groups, name)

    @staticmethod
    @_autograd.once("conv_cells")
    def backward(ctx, grad):
        x, neighbours, weight = ctx.saved_tensors
        window, groups, name = ctx.window, ctx.groups, ctx.backend
        need_x, _, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if need_x and max(window.stride) == 1:
            grad_x = _taps_conv(grad, neighbours, turned(weight, groups), None, window, groups, name)
        elif need_x:
            taps = spread(grad.flatten(0, -2), weight, groups)
            grad_x = _registry.raw("gather_taps_backward", name)(taps, neighbours, x.shape[1:], *window)
        if need_weight:
            tables = _some_cells(neighbours, x, window)
            # Many parts are not summed in 16 bits, which would lose the small ones.
            wide = torch.promote_types(x.dtype, torch.float32) if len(tables) > 1 else x.dtype
            for rows, table in zip(grad.split([t.shape[0] for t in tables]), tables):
                taps = _registry.raw("gather_taps", name)(x, table, *window)
                part = weight_gradient(rows.flatten(0, -2), taps, weight, groups, need_bias)
                part = [None if t is None else t.to(wide) for t in part]
                if grad_weight is None:
                    grad_weight, grad_bias = part
                else:
                    grad_weight += part[0]
                    grad_bias = grad_bias + part[1] if need_bias else None
            grad_weight, grad_bias = (None if t is None else t.to(x.dtype) for t in (grad_weight, grad_bias))
        elif need_bias:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, None, grad_weight, grad_bias, None, None, None


def _taps_conv(x, neighbours, weight, bias, window: Window, groups: int, name: str) -> Tensor:
    parts = []
    for table in _some_cells(neighbours, x, window):
        taps = _registry.raw("gather_taps", name)(x, table, *window)
        parts.append(product(taps, weight, bias, groups))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    sites = (n // s for n, s in zip(x.shape[1:-1], window.stride))
    return _unsafe_view(out, (x.shape[0], *sites, weight.shape[0]))


def _some_cells(neighbours: Tensor, x: Tensor, window: Window) -> tuple[Tensor, ...]:
    """The neighbour table in parts whose rows of taps take CHUNK bytes (one part under torch.compile)."""
    if torch.compiler.is_compiling():
        return (neighbours,)
    cell = x[0].numel() * x.element_size() if x.shape[0] else 1
    return neighbours.split(
        max(1, CHUNK[x.device.type] * math.prod(window.stride) // (cell * math.prod(window.kernel)))
    )


_RUN = {"halo": _Halo, "taps": _Taps, "implicit": Implicit}
