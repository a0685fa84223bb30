"""Triton kernels of the sparse_conv family: frames around packed cells, rows of taps, and their gradients.

Copies and short sums of rows of C channels; a program moves a tile of rows with wide accesses along the channels. A
site (i, j) relative to cell t lies in the cell (i // h, j // w) away from it, whose packed index the table holds;
numbers are shifted before a division, so that none is negative.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import COPY, INT32, ceil_div, check_dtypes, guard, row_tile


@triton.jit
def _source(neighbours, t, i, j, inside, h, w, RADIUS: tl.constexpr):
    """(row of the site (i, j) relative to cell t among the packed sites, whether it is active)."""
    REACH: tl.constexpr = 2 * RADIUS + 1
    i += RADIUS * h
    j += RADIUS * w
    near = t.to(tl.int64) * (REACH * REACH) + (i // h) * REACH + j // w
    cell = tl.load(neighbours + near, mask=inside, other=-1)
    return (cell.to(tl.int64) * h + i % h) * w + j % w, cell >= 0


@triton.jit
def halo_cells_fwd_kernel(
    x, neighbours, out, rows, h, w, width, top, left, lines, sites,
    RADIUS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One item a site of a framed cell: copied from where it lies, or zero."""
    blocks = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    item = pid // blocks * ROWS + tl.arange(0, ROWS)
    col = (pid % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    inside, in_row = item < rows, (col < width)[None, :]
    line = item // sites
    i, j = (line % lines - top).to(tl.int32), (item % sites - left).to(tl.int32)
    row, active = _source(neighbours, line // lines, i, j, inside, h, w, RADIUS)
    value = tl.load(x + row[:, None] * width + col[None, :], mask=active[:, None] & in_row, other=0.0)
    tl.store(out + item.to(tl.int64)[:, None] * width + col[None, :], value, mask=inside[:, None] & in_row)


@triton.jit
def halo_cells_bwd_kernel(
    grad, neighbours, out, rows, h, w, width, top, left, lines, sites,
    RADIUS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One item a site of a cell: the sum over the framed cells that it stands in, in the table's order."""
    REACH: tl.constexpr = 2 * RADIUS + 1
    blocks = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    item = pid // blocks * ROWS + tl.arange(0, ROWS)
    col = (pid % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    inside, in_row = item < rows, (col < width)[None, :]
    j, i = (item % w).to(tl.int32), (item // w % h).to(tl.int32)
    near = (item // w // h).to(tl.int64) * (REACH * REACH)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(REACH * REACH):
        line = i - (k // REACH - RADIUS) * h + top
        site = j - (k % REACH - RADIUS) * w + left
        framed = inside & (line >= 0) & (line < lines) & (site >= 0) & (site < sites)
        cell = tl.load(neighbours + near + k, mask=framed, other=-1)
        row = (cell.to(tl.int64) * lines + line) * sites + site
        mask = (framed & (cell >= 0))[:, None] & in_row
        total += tl.load(grad + row[:, None] * width + col[None, :], mask=mask, other=0.0).to(tl.float32)
    at = item.to(tl.int64)[:, None] * width + col[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside[:, None] & in_row)


@triton.jit
def gather_taps_fwd_kernel(
    x, neighbours, out, rows, h, w, width, ho, wo, kh, kw, sh, sw, ph, pw, dh, dw,
    RADIUS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One item a tap of an output."""
    blocks = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    item = pid // blocks * ROWS + tl.arange(0, ROWS)
    col = (pid % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    inside, in_row = item < rows, (col < width)[None, :]
    kx, ky = item % kw, item // kw % kh
    place = item // (kw * kh)
    i = (place // wo % ho * sh + ky * dh - ph).to(tl.int32)
    j = (place % wo * sw + kx * dw - pw).to(tl.int32)
    row, active = _source(neighbours, place // (wo * ho), i, j, inside, h, w, RADIUS)
    value = tl.load(x + row[:, None] * width + col[None, :], mask=active[:, None] & in_row, other=0.0)
    tl.store(out + item.to(tl.int64)[:, None] * width + col[None, :], value, mask=inside[:, None] & in_row)


@triton.jit
def gather_taps_bwd_kernel(
    grad, neighbours, out, rows, h, w, width, ho, wo, kh, kw, sh, sw, ph, pw, dh, dw,
    RADIUS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One item a site of a cell: the sum over the taps that read it, in their order."""
    REACH: tl.constexpr = 2 * RADIUS + 1
    blocks = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    item = pid // blocks * ROWS + tl.arange(0, ROWS)
    col = (pid % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    inside, in_row = item < rows, (col < width)[None, :]
    # One cell more than the table reaches: a place between two outputs of a stride may lie just beyond it.
    i = (item // w % h).to(tl.int32) + (RADIUS + 1) * h + ph
    j = (item % w).to(tl.int32) + (RADIUS + 1) * w + pw
    near = (item // w // h).to(tl.int64) * (REACH * REACH)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(kh * kw):
        y, x = i - k // kw * dh, j - k % kw * dw
        hit = inside & (y % sh == 0) & (x % sw == 0)
        y, x = y // sh, x // sw
        cell = tl.load(neighbours + near + (y // ho - 1) * REACH + x // wo - 1, mask=hit, other=-1)
        row = ((cell.to(tl.int64) * ho + y % ho) * wo + x % wo) * (kh * kw) + k
        mask = (hit & (cell >= 0))[:, None] & in_row
        total += tl.load(grad + row[:, None] * width + col[None, :], mask=mask, other=0.0).to(tl.float32)
    at = item.to(tl.int64)[:, None] * width + col[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside[:, None] & in_row)


def _radius(neighbours: Tensor) -> int:
    reach = round(neighbours.shape[1] ** 0.5)
    if reach * reach != neighbours.shape[1] or reach % 2 == 0:
        raise ValueError(f"neighbours must be [T, (2 radius + 1)^2], got {tuple(neighbours.shape)}")
    return reach // 2


def _launch(kernel, src: Tensor, neighbours: Tensor, out: Tensor, *args: int) -> Tensor:
    """Run `kernel` on tiles of the rows of out [..., C]."""
    check_dtypes(kernel.__name__, src, out)
    width = out.shape[-1]
    if out.numel() == 0:
        return out
    rows = out.numel() // width
    # The sums keep their tile in registers, beside the addresses of its rows.
    tile, block = row_tile(rows, width, 8 if "bwd" in kernel.__name__ else out.element_size())
    grid = (ceil_div(rows, tile) * ceil_div(width, block),)
    h, w, *rest = args
    with guard(src):
        kernel[grid](
            src, neighbours, out, rows, h, w, width, *rest,
            RADIUS=_radius(neighbours), WIDE=rows + tile > INT32, ROWS=tile, BLOCK=block, **COPY,
        )  # fmt: skip
    return out


def halo_cells(x: Tensor, neighbours: Tensor, halo) -> Tensor:
    """x [T, h, w, C] -> [T, top + h + bottom, left + w + right, C]. Reads and writes the output's size."""
    top, left, bottom, right = halo
    cells, h, w, width = x.shape
    lines, sites = top + h + bottom, left + w + right
    out = torch.empty((cells, lines, sites, width), dtype=x.dtype, device=x.device)
    return _launch(halo_cells_fwd_kernel, x, neighbours, out, h, w, top, left, lines, sites)


def halo_cells_backward(grad: Tensor, neighbours: Tensor, halo) -> Tensor:
    """grad [T, top + h + bottom, left + w + right, C] -> [T, h, w, C]. Reads each gradient once."""
    top, left, bottom, right = halo
    cells, lines, sites, width = grad.shape
    h, w = lines - top - bottom, sites - left - right
    out = torch.empty((cells, h, w, width), dtype=grad.dtype, device=grad.device)
    return _launch(halo_cells_bwd_kernel, grad, neighbours, out, h, w, top, left, lines, sites)


def gather_taps(x: Tensor, neighbours: Tensor, kernel, stride, padding, dilation) -> Tensor:
    """x [T, h, w, C] -> [rows of the table * h / sh * w / sw, kh * kw * C]. Reads and writes the output's size."""
    _, h, w, width = x.shape
    ho, wo = h // stride[0], w // stride[1]
    sites, taps = neighbours.shape[0] * ho * wo, kernel[0] * kernel[1]
    out = torch.empty((sites, taps, width), dtype=x.dtype, device=x.device)
    window = *kernel, *stride, *padding, *dilation
    return _launch(gather_taps_fwd_kernel, x, neighbours, out, h, w, ho, wo, *window).view(sites, taps * width)


def gather_taps_backward(grad: Tensor, neighbours: Tensor, size, kernel, stride, padding, dilation) -> Tensor:
    """grad [T * h / sh * w / sw, kh * kw * C] -> [T, h, w, C], size = (h, w, C). Reads each gradient once."""
    h, w, _ = size
    out = torch.empty((neighbours.shape[0], *size), dtype=grad.dtype, device=grad.device)
    window = *kernel, *stride, *padding, *dilation
    return _launch(gather_taps_bwd_kernel, grad, neighbours, out, h, w, h // stride[0], w // stride[1], *window)


OPS = {
    "halo_cells": halo_cells,
    "halo_cells_backward": halo_cells_backward,
    "gather_taps": gather_taps,
    "gather_taps_backward": gather_taps_backward,
}
