"""Triton kernels of the depthwise family: every tap is read through the table of neighbouring cells, so that no halo is
ever written; the sites around a tile are in the first-level cache after the first tap."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import ceil_div, check_count, check_dtypes, guard, power, sum_parts

# Multiply-adds may fuse here: a tap is one instruction instead of two.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@triton.jit
def _floor_div(value, H: tl.constexpr, R: tl.constexpr):
    """floor(value / H) for value >= -R * H."""
    return (value + R * H) // H - R


@triton.jit
def _site(neighbours, cell, y, x, inside, H: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    """The row of [T*H*W, C] at place (y, x) relative to the first site of `cell`, negative where it is absent."""
    cy, cx = _floor_div(y, H, R), _floor_div(x, W, R)
    side: tl.constexpr = 2 * R + 1
    at = cell.to(tl.int64) * (side * side) + (cy + R) * side + cx + R
    other = tl.load(neighbours + at, mask=inside, other=-1)
    return tl.where(other >= 0, (other * H + y - cy * H) * W + x - cx * W, -1)


@triton.jit
def depthwise_fwd_kernel(
    x, neighbours, weight, bias, y, rows, width,
    HAS_BIAS: tl.constexpr, FLIP: tl.constexpr, K: tl.constexpr, H: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS sites x BLOCK channels; the blocks of one tile of sites run side by side."""
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside, in_row = row < rows, col < width
    cell, i, j = row // (H * W), row // W % H, row % W
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + col, mask=in_row, other=0.0)[None, :]
    for ky in range(K):
        for kx in tl.static_range(K):
            site = _site(neighbours, cell, i + ky - K // 2, j + kx - K // 2, inside, H, W, R)
            tap = ky * K + kx
            if FLIP:
                tap = K * K - 1 - tap
            w = tl.load(weight + tap * width + col, mask=in_row, other=0.0)
            there = (site >= 0)[:, None] & in_row[None, :]
            value = tl.load(x + site.to(tl.int64)[:, None] * width + col[None, :], mask=there, other=0.0)
            acc += value.to(tl.float32) * w[None, :]
    mask = inside[:, None] & in_row[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * width + col[None, :], acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def depthwise_grad_weight_kernel(
    x, grad, neighbours, weight_parts, bias_parts, rows, each, width,
    K: tl.constexpr, H: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of taps (TAPS >= K), BLOCK channels, `each` consecutive sites; sums stay in registers until the end."""
    blocks = tl.cdiv(width, BLOCK)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ky = tl.program_id(0) // blocks
    part = tl.program_id(1)
    kx = tl.arange(0, TAPS)
    in_row = col < width
    taps = tl.zeros([TAPS, ROWS, BLOCK], tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    last = tl.minimum(part.to(tl.int64) * each + each, rows).to(tl.int32)
    for start in range(part * each, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < last
        cell, i, j = row // (H * W), row // W % H, row % W
        mask = inside[:, None] & in_row[None, :]
        g = tl.load(grad + row.to(tl.int64)[:, None] * width + col[None, :], mask=mask, other=0.0).to(tl.float32)
        wanted = inside[None, :] & (kx < K)[:, None]
        y, place = (i + ky - K // 2)[None, :], j[None, :] + kx[:, None] - K // 2
        site = _site(neighbours, cell[None, :], y, place, wanted, H, W, R)
        there = (site >= 0)[:, :, None] & in_row[None, None, :]
        value = tl.load(x + site.to(tl.int64)[:, :, None] * width + col[None, None, :], mask=there, other=0.0)
        taps += value.to(tl.float32) * g[None, :, :]
        total += g
    at = (part.to(tl.int64) * K + ky) * K + kx
    mask = (kx < K)[:, None] & in_row[None, :]
    tl.store(weight_parts + at[:, None] * width + col[None, :], tl.sum(taps, axis=1), mask=mask)
    if ky == 0:
        tl.store(bias_parts + part.to(tl.int64) * width + col, tl.sum(total, axis=0), mask=in_row)


def _block(width: int) -> int:
    """Channels of a program: whole 128-byte lines of float32, and as little padding as they allow."""
    return min(power(width), min((64, 32), key=lambda size: ceil_div(width, size) * size))


def _radius(neighbours: Tensor) -> int:
    return (round(neighbours.shape[1] ** 0.5) - 1) // 2


def depthwise(x: Tensor, neighbours: Tensor, weight: Tensor, bias: Tensor | None, flip: bool) -> Tensor:
    """x [T, h, w, C], neighbours [T, (2r + 1)^2], weight [k * k, C] and bias [C] in float32 -> y like x."""
    check_dtypes("depthwise", x)
    cells, h, w, width = x.shape
    y = torch.empty_like(x)
    rows = cells * h * w
    check_count("depthwise", "sites", rows)
    if not rows:
        return y
    block = _block(width)
    tile = min(max(1, 2048 // block), power(rows))
    size = round(weight.shape[0] ** 0.5)
    sizes = {"K": size, "H": h, "W": w, "R": _radius(neighbours), "ROWS": tile, "BLOCK": block}
    flags = {"HAS_BIAS": bias is not None, "FLIP": bool(flip)}
    with guard(x):
        depthwise_fwd_kernel[(ceil_div(rows, tile) * ceil_div(width, block),)](
            x, neighbours, weight, bias, y, rows, width, **flags, **sizes, **OPTIONS
        )
    return y


def depthwise_grad_weight(x: Tensor, grad: Tensor, neighbours: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """-> the gradients of the taps [k * k, C] and of the bias [C] in float32, from two stages in a fixed order."""
    check_dtypes("depthwise_grad_weight", x, grad)
    cells, h, w, width = x.shape
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)  # noqa: E731
    grad_weight, grad_bias = new(size * size, width), new(width)
    rows = cells * h * w
    check_count("depthwise_grad_weight", "sites", rows)
    if not rows:
        return grad_weight.zero_(), grad_bias.zero_()
    block = _block(width)
    taps = power(size)
    tile = max(1, 4096 // (taps * block))
    # About 1024 programs, of 64 sites or more: each leaves k rows of partial sums.
    pieces = max(1, min(ceil_div(rows, 64), 1024 // (size * ceil_div(width, block))))
    each = ceil_div(ceil_div(rows, pieces), tile) * tile
    pieces = ceil_div(rows, each)
    weight_parts, bias_parts = new(pieces, size * size, width), new(pieces, width)
    sizes = {"K": size, "H": h, "W": w, "R": _radius(neighbours), "TAPS": taps, "ROWS": tile, "BLOCK": block}
    with guard(x):
        depthwise_grad_weight_kernel[(size * ceil_div(width, block), pieces)](
            x, grad, neighbours, weight_parts, bias_parts, rows, each, width, **sizes, **OPTIONS
        )
        sum_parts(weight_parts, grad_weight)
        sum_parts(bias_parts, grad_bias)
    return grad_weight, grad_bias


OPS = {"depthwise": depthwise, "depthwise_grad_weight": depthwise_grad_weight}
