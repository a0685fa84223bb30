"""Triton kernels of the pool family: windows over packed cells, forward and, in gather form, backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import COPY, ceil_div, check_count, check_dtypes, guard, row_tile

OUTSIDE = tl.constexpr(-2)


@triton.jit
def _site(site, h, w):
    """(cell, row, column) of a packed site."""
    return site // (h * w), site // w % h, site % w


@triton.jit
def _read(table, cell, row, column, inside, h, w, SIDE: tl.constexpr):
    """(neighbour, row in it, column in it) of a site of `cell`, both counted from the table's first cell."""
    y, x = row // h, column // w
    there = tl.load(table + cell.to(tl.int64) * (SIDE * SIDE) + (y * SIDE + x), mask=inside, other=OUTSIDE)
    return there, row - y * h, column - x * w


@triton.jit
def pool_fwd_kernel(
    x, table, y, argmax, sites, h, w, out_h, out_w, channels,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    SIDE: tl.constexpr, MAX: tl.constexpr, INCLUDE_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS sites of y by BLOCK channels, tap by tap. Masked sites are 0; beyond the image is nothing."""
    blocks = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0)
    site = pid // blocks * ROWS + tl.arange(0, ROWS)
    col = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = site < sites
    in_row = (col < channels)[None, :]
    cell, i, j = _site(site, out_h, out_w)
    top = i * SH - PH + SIDE // 2 * h
    left = j * SW - PW + SIDE // 2 * w
    if MAX:
        best = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
        arg = tl.full([ROWS, BLOCK], -1, tl.int32)
    else:
        best = tl.zeros([ROWS, BLOCK], tl.float32)
        count = tl.zeros([ROWS], tl.int32)
    for k in range(KH * KW):
        there, row, column = _read(table, cell, top + k // KW, left + k % KW, inside, h, w, SIDE)
        at = (there.to(tl.int64) * h + row) * w + column
        mask = (there >= 0)[:, None] & in_row
        value = tl.load(x + at[:, None] * channels + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if MAX:  # the first of equal values, and a NaN always, as in PyTorch
            wins = (there != OUTSIDE)[:, None] & ((value > best) | (value != value) | (arg < 0))
            best = tl.where(wins, value, best)
            arg = tl.where(wins, k, arg)
        else:
            best += value
            count += (there != OUTSIDE).to(tl.int32)
    target = site.to(tl.int64)[:, None] * channels + col[None, :]
    mask = inside[:, None] & in_row
    if MAX:
        tl.store(argmax + target, arg.to(tl.uint8), mask=mask)
    elif INCLUDE_PAD:
        best = best / (KH * KW)
    else:
        best = best / tl.maximum(count, 1).to(tl.float32)[:, None]
    tl.store(y + target, best.to(y.dtype.element_ty), mask=mask)


@triton.jit
def pool_bwd_kernel(
    grad, argmax, counts, table, grad_x, sites, h, w, out_h, out_w, channels,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    SIDE: tl.constexpr, MAX: tl.constexpr, INCLUDE_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS sites of x by BLOCK channels: tap by tap, the windows that read the site through it."""
    blocks = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0)
    site = pid // blocks * ROWS + tl.arange(0, ROWS)
    col = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = site < sites
    in_row = (col < channels)[None, :]
    cell, i, j = _site(site, h, w)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(KH * KW):
        y = i + PH - k // KW + SIDE // 2 * h  # h is a multiple of SH, so this shift keeps the remainder
        x = j + PW - k % KW + SIDE // 2 * w
        starts = inside & (y % SH == 0) & (x % SW == 0)
        there, row, column = _read(table, cell, y // SH, x // SW, starts, out_h, out_w, SIDE)
        at = (there.to(tl.int64) * out_h + row) * out_w + column
        mask = (there >= 0)[:, None] & in_row
        value = tl.load(grad + at[:, None] * channels + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if MAX:  # chosen after the load: a mask that changes within a row would make it an element at a time
            chosen = tl.load(argmax + at[:, None] * channels + col[None, :], mask=mask, other=0)
            value = tl.where(chosen.to(tl.int32) == k, value, 0.0)
        elif INCLUDE_PAD:
            value = value / (KH * KW)
        else:
            value = value / tl.load(counts + at, mask=there >= 0, other=1).to(tl.float32)[:, None]
        total += value
    target = site.to(tl.int64)[:, None] * channels + col[None, :]
    tl.store(grad_x + target, total.to(grad_x.dtype.element_ty), mask=inside[:, None] & in_row)


@triton.jit
def pool_count_kernel(
    table, counts, sites, h, w, out_h, out_w,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    SIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """How many sites of each window lie in the image."""
    site = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = site < sites
    cell, i, j = _site(site, out_h, out_w)
    count = tl.zeros([ROWS], tl.int32)
    for k in range(KH * KW):
        row = i * SH - PH + SIDE // 2 * h + k // KW
        there, _, _ = _read(table, cell, row, j * SW - PW + SIDE // 2 * w + k % KW, inside, h, w, SIDE)
        count += (there != OUTSIDE).to(tl.int32)
    tl.store(counts + site, count, mask=inside)


def _flags(neighbours: Tensor, kernel, stride, padding) -> dict[str, int]:
    side = round(neighbours.shape[1] ** 0.5)
    names = ("KH", "KW", "SH", "SW", "PH", "PW")
    return {**dict(zip(names, (*kernel, *stride, *padding))), "SIDE": side}


def _forward(x: Tensor, neighbours: Tensor, kernel, stride, padding, kind: str, include_pad: bool):
    check_dtypes(kind, x)
    cells, h, w, channels = x.shape
    check_count(kind, "sites", cells * h * w)
    out_h, out_w = h // stride[0], w // stride[1]
    y = torch.empty((cells, out_h, out_w, channels), dtype=x.dtype, device=x.device)
    argmax = torch.empty(y.shape, dtype=torch.uint8, device=x.device) if kind == "max_pool_cells" else None
    if y.numel() == 0:
        return y, argmax
    sites = cells * out_h * out_w
    tile, block = row_tile(sites, channels, 4)
    if channels % 16:  # element by element, which takes more registers
        tile = max(1, tile // 2)
    flags = {**_flags(neighbours, kernel, stride, padding), "MAX": argmax is not None, "INCLUDE_PAD": include_pad}
    sizes = sites, h, w, out_h, out_w, channels
    with guard(x):
        launch = (ceil_div(sites, tile) * ceil_div(channels, block),)
        pool_fwd_kernel[launch](x, neighbours, y, argmax, *sizes, **flags, ROWS=tile, BLOCK=block, **COPY)
    return y, argmax


def _backward(grad: Tensor, argmax: Tensor | None, neighbours: Tensor, kernel, stride, padding, include_pad: bool):
    kind = "max_pool_cells_backward" if argmax is not None else "avg_pool_cells_backward"
    check_dtypes(kind, grad)
    cells, out_h, out_w, channels = grad.shape
    h, w = out_h * stride[0], out_w * stride[1]
    grad_x = torch.empty((cells, h, w, channels), dtype=grad.dtype, device=grad.device)
    if grad_x.numel() == 0:
        return grad_x
    window = _flags(neighbours, kernel, stride, padding)
    sites = cells * h * w
    check_count(kind, "sites", sites)
    tile, block = row_tile(sites, channels, 4)
    counts = None
    with guard(grad):
        if not include_pad:
            windows = cells * out_h * out_w
            counts = torch.empty((windows,), dtype=torch.int32, device=grad.device)
            args = neighbours, counts, windows, h, w, out_h, out_w
            pool_count_kernel[(ceil_div(windows, 256),)](*args, **window, ROWS=256, **COPY)
        flags = {**window, "MAX": argmax is not None, "INCLUDE_PAD": include_pad}
        launch = (ceil_div(sites, tile) * ceil_div(channels, block),)
        args = grad, argmax, counts, neighbours, grad_x, sites, h, w, out_h, out_w, channels
        pool_bwd_kernel[launch](*args, **flags, ROWS=tile, BLOCK=block, **COPY)
    return grad_x


def max_pool_cells(x: Tensor, neighbours: Tensor, kernel, stride, padding) -> tuple[Tensor, Tensor]:
    """x [T, h, w, C] -> y [T, h/s, w/s, C] and the winning taps, uint8. Overlapping reads of x come from the cache."""
    return _forward(x, neighbours, kernel, stride, padding, "max_pool_cells", True)


def max_pool_cells_backward(grad: Tensor, argmax: Tensor, neighbours: Tensor, kernel, stride, padding) -> Tensor:
    """grad, argmax [T, h/s, w/s, C] -> [T, h, w, C]."""
    return _backward(grad, argmax, neighbours, kernel, stride, padding, True)


def avg_pool_cells(x: Tensor, neighbours: Tensor, kernel, stride, padding, count_include_pad: bool) -> Tensor:
    """x [T, h, w, C] -> y [T, h/s, w/s, C]."""
    return _forward(x, neighbours, kernel, stride, padding, "avg_pool_cells", bool(count_include_pad))[0]


def avg_pool_cells_backward(grad: Tensor, neighbours: Tensor, kernel, stride, padding, count_include_pad: bool):
    """grad [T, h/s, w/s, C] -> [T, h, w, C]."""
    return _backward(grad, None, neighbours, kernel, stride, padding, bool(count_include_pad))


OPS = {
    "max_pool_cells": max_pool_cells,
    "max_pool_cells_backward": max_pool_cells_backward,
    "avg_pool_cells": avg_pool_cells,
    "avg_pool_cells_backward": avg_pool_cells_backward,
}
