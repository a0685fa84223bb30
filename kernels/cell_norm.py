"""Triton kernels of the cell_norm family: statistics of segments of rows, affine map with activation, and back.

Segment b holds rows [cu[b] * sites, cu[b + 1] * sites), or all rows without cu. A program takes one piece of one
segment and one block of columns; sums are finished by a second kernel in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS, ceil_div, check_dtypes, guard, power, sum_parts

SETTINGS = {"num_warps": 4, **OPTIONS}
PROGRAMS = 1024  # of a kernel that leaves partial sums: these fill any GPU of today


@triton.jit
def _place(pieces, BLOCK: tl.constexpr):
    """(piece, first column, segment) of a program. Pieces and segments share the first dimension of the grid, because
    the others end at 65535; blocks of columns are few."""
    pid = tl.program_id(0)
    return (pid % pieces).to(tl.int64), tl.program_id(1) * BLOCK, (pid // pieces).to(tl.int64)


@triton.jit
def _share(count, piece, pieces):
    """(start, size) of a piece of `count` rows; the first pieces get one more. One division: a second one spills."""
    each = count // pieces
    rest = count - each * pieces
    return each * piece + tl.minimum(piece, rest), each + (piece < rest).to(tl.int64)


@triton.jit
def _piece(cu, sites, rows, segment, piece, pieces, HAS_CU: tl.constexpr):
    """(first, last) row of a piece of a segment."""
    first = tl.zeros([], tl.int64)
    last = first + rows
    if HAS_CU:
        first = tl.load(cu + segment).to(tl.int64) * sites
        last = tl.load(cu + segment + 1).to(tl.int64) * sites
    count = last - first
    start, size = _share(count, piece, pieces)
    return first + start, first + start + size


@triton.jit
def _activate(z, ACT: tl.constexpr):
    """NaN passes, as in torch."""
    if ACT > 0:
        z = tl.where(z < 0.0, 0.0, z)
    if ACT == 2:
        z = tl.where(z > 6.0, 6.0, z)
    return z


@triton.jit
def _gated(g, z, ACT: tl.constexpr):
    if ACT > 0:
        g = tl.where(z > 0.0, g, 0.0)
    if ACT == 2:
        g = tl.where(z < 6.0, g, 0.0)
    return g


@triton.jit
def segment_stats_kernel(
    x, cu, parts, sites, rows, width, pieces,
    HAS_CU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts [segments, pieces, 2, C]: mean and sum of squared deviations, of each tile about its own mean."""
    piece, column, segment = _place(pieces, BLOCK)
    first, last = _piece(cu, sites, rows, segment, piece, pieces, HAS_CU)
    col = column + tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK], tl.float32)
    spread = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (col < width)[None, :]
        value = tl.load(x + row[:, None] * width + col[None, :], mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(last - start, ROWS).to(tl.float32)
        average = tl.sum(value, axis=0) / count
        centred = tl.where(inside, value - average[None, :], 0.0)
        share = count / (start - first + count)
        delta = average - mean
        mean += delta * share
        spread += tl.sum(centred * centred, axis=0) + delta * delta * share * (start - first).to(tl.float32)
    at = parts + (segment * pieces + piece) * 2 * width + col
    tl.store(at, mean, mask=col < width)
    tl.store(at + width, spread, mask=col < width)


@triton.jit
def stats_total_kernel(
    parts, cu, mean, var, sites, rows, width, pieces,
    HAS_CU: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, column, segment = _place(1, BLOCK)
    first, last = _piece(cu, sites, rows, segment, 0, 1, HAS_CU)
    count = last - first
    inverse = tl.where(count > 0, 1.0 / tl.maximum(count, 1).to(tl.float32), 0.0)
    col = column + tl.arange(0, BLOCK)
    base = parts + segment * pieces * 2 * width
    average = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pieces, PARTS):
        p = start + tl.arange(0, PARTS).to(tl.int64)
        here = (p < pieces)[:, None] & (col < width)[None, :]
        n = _share(count, p, pieces)[1].to(tl.float32) * inverse
        part = tl.load(base + p[:, None] * 2 * width + col[None, :], mask=here, other=0.0)
        average += tl.sum(part * n[:, None], axis=0)
    spread = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pieces, PARTS):
        p = start + tl.arange(0, PARTS).to(tl.int64)
        here = (p < pieces)[:, None] & (col < width)[None, :]
        n = _share(count, p, pieces)[1].to(tl.float32)
        at = base + p[:, None] * 2 * width + col[None, :]
        delta = tl.load(at, mask=here, other=0.0) - average[None, :]
        part = tl.load(at + width, mask=here, other=0.0)
        spread += tl.sum(tl.where(here, part + delta * delta * n[:, None], 0.0), axis=0)
    tl.store(mean + segment * width + col, average, mask=col < width)
    tl.store(var + segment * width + col, spread * inverse, mask=col < width)


@triton.jit
def norm_act_fwd_kernel(
    x, residual, cu, mean, scale, bias, y, sites, rows, width, pieces,
    HAS_CU: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = act((x - mean) * scale + bias + residual)."""
    piece, column, segment = _place(pieces, BLOCK)
    first, last = _piece(cu, sites, rows, segment, piece, pieces, HAS_CU)
    col = column + tl.arange(0, BLOCK)
    m = tl.load(mean + segment * width + col, mask=col < width, other=0.0)[None, :]
    w = tl.load(scale + segment * width + col, mask=col < width, other=0.0)[None, :]
    b = tl.load(bias + col, mask=col < width, other=0.0)[None, :]
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (col < width)[None, :]
        at = row[:, None] * width + col[None, :]
        z = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - m) * w + b
        if HAS_RESIDUAL:
            z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + at, _activate(z, ACT).to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_act_sums_kernel(
    grad, x, gate, cu, mean, scale, bias, passed, parts, sites, rows, width, pieces, stride,
    HAS_CU: tl.constexpr, HAS_GATE: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts [pieces, 2, segments, C]: sums of g, the gradient behind the activation, and of g * (x - mean)."""
    piece, column, segment = _place(pieces, BLOCK)
    first, last = _piece(cu, sites, rows, segment, piece, pieces, HAS_CU)
    col = column + tl.arange(0, BLOCK)
    m = tl.load(mean + segment * width + col, mask=col < width, other=0.0)[None, :]
    w = tl.load(scale + segment * width + col, mask=col < width, other=0.0)[None, :]
    b = tl.load(bias + col, mask=col < width, other=0.0)[None, :]
    total = tl.zeros([BLOCK], tl.float32)
    product = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (col < width)[None, :]
        at = row[:, None] * width + col[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        centred = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - m
        if HAS_GATE:
            z = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
            if ACT == 2:  # the gate is the residual there, y itself for relu
                z = centred * w + b + z
            g = _gated(g, z, ACT)
            tl.store(passed + at, g.to(passed.dtype.element_ty), mask=inside)
        else:
            g = _gated(g, centred * w + b, ACT)
        total += tl.sum(g, axis=0)
        product += tl.sum(g * centred, axis=0)
    at = parts + piece * 2 * stride + segment * width + col
    tl.store(at, total, mask=col < width)
    tl.store(at + stride, product, mask=col < width)


@triton.jit
def norm_act_bwd_kernel(
    grad, x, cu, mean, scale, bias, offset, slope, grad_x, sites, rows, width, pieces,
    HAS_CU: tl.constexpr, MOVING: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x = g * scale - offset - (x - mean) * slope."""
    piece, column, segment = _place(pieces, BLOCK)
    first, last = _piece(cu, sites, rows, segment, piece, pieces, HAS_CU)
    col = column + tl.arange(0, BLOCK)
    table = segment * width + col
    w = tl.load(scale + table, mask=col < width, other=0.0)[None, :]
    m = tl.load(mean + table, mask=col < width, other=0.0)[None, :]
    b = tl.load(bias + col, mask=col < width, other=0.0)[None, :]
    if MOVING:
        k0 = tl.load(offset + table, mask=col < width, other=0.0)[None, :]
        k1 = tl.load(slope + table, mask=col < width, other=0.0)[None, :]
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (col < width)[None, :]
        at = row[:, None] * width + col[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if ACT > 0 or MOVING:
            centred = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - m
            g = _gated(g, centred * w + b, ACT)
        g = g * w
        if MOVING:
            g = g - k0 - centred * k1
        tl.store(grad_x + at, g.to(grad_x.dtype.element_ty), mask=inside)


class _Launch:
    """Tile and grid of the kernels on x [R, C]: 16 elements a thread, in blocks of columns with the least padding.
    Rows that 16 does not divide move one element at a time, and segments cost registers: half of it for each."""

    def __init__(self, x: Tensor, cu: Tensor | None, summed: bool):
        self.rows, self.width = x.shape
        self.segments = 1 if cu is None else cu.shape[0] - 1
        sizes = [size for size in (16, 32, 64, 128, 256) if size <= max(16, power(self.width))]
        self.block = min(sizes, key=lambda size: (ceil_div(self.width, size) * size, -size))
        self.tile = (2048 >> (self.width % 16 > 0) + (cu is not None)) // self.block
        columns = ceil_div(self.width, self.block)
        tiles = max(1, ceil_div(self.rows, self.tile * self.segments))
        self.pieces = min(tiles, max(1, PROGRAMS // (columns * self.segments))) if summed else tiles
        self.grid = (self.pieces * self.segments, columns)
        self.flags = {"HAS_CU": cu is not None, "ROWS": self.tile, "BLOCK": self.block, **SETTINGS}


def segment_stats(x: Tensor, cu: Tensor | None, sites: int) -> tuple[Tensor, Tensor]:
    """x [R, C] -> mean and biased variance [segments, C] in float32, zero for a segment without rows."""
    check_dtypes("segment_stats", x)
    launch = _Launch(x, cu, summed=True)
    segments, pieces, width = launch.segments, launch.pieces, launch.width
    parts = torch.empty((segments, pieces, 2, width), dtype=torch.float32, device=x.device)
    mean = torch.empty((segments, width), dtype=torch.float32, device=x.device)
    var = torch.empty_like(mean)
    block = min(64, power(width))
    with guard(x):
        segment_stats_kernel[launch.grid](x, cu, parts, sites, launch.rows, width, pieces, **launch.flags)
        stats_total_kernel[(segments, ceil_div(width, block))](
            parts, cu, mean, var, sites, launch.rows, width, pieces,
            HAS_CU=cu is not None, PARTS=min(32, power(pieces)), BLOCK=block, **SETTINGS,
        )  # fmt: skip
    return mean, var


def norm_act(
    x: Tensor,
    residual: Tensor | None,
    cu: Tensor | None,
    sites: int,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    act: int,
) -> Tensor:
    """-> y like x; mean and scale [segments, C], bias [C] in float32; act 0 none, 1 relu, 2 relu6."""
    check_dtypes("norm_act", x, residual, mean, scale, bias)
    y = torch.empty_like(x)
    if x.shape[0]:
        launch = _Launch(x, cu, summed=False)
        with guard(x):
            norm_act_fwd_kernel[launch.grid](
                x, residual, cu, mean, scale, bias, y, sites, launch.rows, launch.width, launch.pieces,
                HAS_RESIDUAL=residual is not None, ACT=act, **launch.flags,
            )  # fmt: skip
    return y


def norm_act_sums(
    grad: Tensor,
    x: Tensor,
    gate: Tensor | None,
    cu: Tensor | None,
    sites: int,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    act: int,
) -> tuple[Tensor, Tensor]:
    """-> the gradient g behind the activation like x (empty without gate), sums of g and g * (x - mean)
    [2, segments, C] in float32. gate, where a residual was added: y for relu, the residual for relu6."""
    check_dtypes("norm_act_sums", grad, x, gate, mean, scale, bias)
    passed = x.new_empty((0,)) if gate is None else torch.empty_like(x)
    launch = _Launch(x, cu, summed=True)
    segments, pieces, width = launch.segments, launch.pieces, launch.width
    parts = torch.empty((pieces, 2, segments, width), dtype=torch.float32, device=x.device)
    sums = torch.empty((2, segments, width), dtype=torch.float32, device=x.device)
    with guard(x):
        norm_act_sums_kernel[launch.grid](
            grad, x, gate, cu, mean, scale, bias, passed, parts, sites, launch.rows, width, pieces, segments * width,
            HAS_GATE=gate is not None, ACT=act, **launch.flags,
        )  # fmt: skip
        sum_parts(parts, sums)
    return passed, sums


def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    cu: Tensor | None,
    sites: int,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: Tensor | None,
    slope: Tensor | None,
    act: int,
) -> Tensor:
    """-> grad_x like x; offset and slope [segments, C], or None where mean and scale are constants."""
    check_dtypes("norm_act_backward", grad, x, mean, scale, bias, offset, slope)
    grad_x = torch.empty_like(x)
    if x.shape[0]:
        launch = _Launch(x, cu, summed=False)
        with guard(x):
            norm_act_bwd_kernel[launch.grid](
                grad, x, cu, mean, scale, bias, offset, slope, grad_x, sites, launch.rows, launch.width, launch.pieces,
                MOVING=slope is not None, ACT=act, **launch.flags,
            )  # fmt: skip
    return grad_x


OPS = {
    "segment_stats": segment_stats,
    "norm_act": norm_act,
    "norm_act_sums": norm_act_sums,
    "norm_act_backward": norm_act_backward,
}
