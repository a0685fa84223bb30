"""Triton kernels of the implicit_conv family: convolutions of packed cells as matrix products of rows never written.

A tile of sites is multiplied by the weight of one tap after another; the rows of a tap are read where they lie, through
the table of neighbouring cells, and absent ones count as zeros. Products accumulate in float32 (of float32 inputs in
float32, not TF32). No sum crosses a program except those of the weight gradient, which takes two stages in a fixed
order: nothing is atomic, and runs agree bit for bit. Tiles are not tuned: nothing was measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import INT32, ceil_div, check_count, check_dtypes, guard, power, sum_parts
from .sparse_conv import _radius, _source


@triton.jit
def _add_tap(acc, src, row, active, weight, col, in_col, depth, by_depth, by_col, BLOCK_K: tl.constexpr):
    """acc + src[row] @ weight, where src has rows of `depth` channels and weight is [depth, col], strides given."""
    k = tl.arange(0, BLOCK_K)
    left = src + row[:, None] * depth + k[None, :]
    right = weight + k[:, None] * by_depth + col[None, :] * by_col
    for start in range(0, depth, BLOCK_K):
        there = k < depth - start
        a = tl.load(left + start, mask=active[:, None] & there[None, :], other=0.0)
        b = tl.load(right + start * by_depth, mask=there[:, None] & in_col[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def implicit_conv_fwd_kernel(
    x, neighbours, weight, bias, out, rows, ci, co,
    H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, RADIUS: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ROWS outputs x COLS channels; the blocks of channels of one tile of outputs run side by side."""
    HO: tl.constexpr = H // SH
    WO: tl.constexpr = W // SW
    blocks = tl.cdiv(co, COLS)
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    item = pid // blocks * ROWS + tl.arange(0, ROWS)
    col = (pid % blocks * COLS + tl.arange(0, COLS)).to(tl.int32)
    inside, in_col = item < rows, col < co
    cell, i, j = item // (HO * WO), (item // WO % HO).to(tl.int32), (item % WO).to(tl.int32)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    if bias is not None:
        acc += tl.load(bias + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
    for tap in range(KH * KW):
        y, z = i * SH + (tap // KW * DH - PH), j * SW + (tap % KW * DW - PW)
        row, active = _source(neighbours, cell, y, z, inside, H, W, RADIUS)
        acc = _add_tap(acc, x, row, active, weight + tap * ci * co, col, in_col, ci, co, 1, BLOCK_K)
    mask = inside[:, None] & in_col[None, :]
    tl.store(out + item.to(tl.int64)[:, None] * co + col[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def implicit_conv_bwd_x_kernel(
    grad, neighbours, weight, out, rows, ci, co,
    H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, RADIUS: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ROWS sites x COLS channels. A program's sites have one place within the stride, so that they are read through
    the same taps, and the others cost nothing."""
    HO: tl.constexpr = H // SH
    WO: tl.constexpr = W // SW
    blocks = tl.cdiv(ci, COLS)
    pid = tl.program_id(0)
    phase_y, phase_x = tl.program_id(1) // SW, tl.program_id(1) % SW
    if WIDE:
        pid = pid.to(tl.int64)
    item = pid // blocks * ROWS + tl.arange(0, ROWS)
    col = (pid % blocks * COLS + tl.arange(0, COLS)).to(tl.int32)
    inside, in_col = item < rows, col < ci
    cell, i, j = item // (HO * WO), (item // WO % HO).to(tl.int32), (item % WO).to(tl.int32)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for tap in range(KH * KW):
        y, z = phase_y + PH - tap // KW * DH, phase_x + PW - tap % KW * DW
        if (y % SH == 0) & (z % SW == 0):
            row, active = _source(neighbours, cell, i + y // SH, j + z // SW, inside, HO, WO, RADIUS)
            acc = _add_tap(acc, grad, row, active, weight + tap * ci * co, col, in_col, co, 1, co, BLOCK_K)
    site = (cell.to(tl.int64) * H + i * SH + phase_y) * W + j * SW + phase_x
    mask = inside[:, None] & in_col[None, :]
    tl.store(out + site[:, None] * ci + col[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def implicit_conv_bwd_weight_kernel(
    x, grad, neighbours, parts, rows, each, ci, co,
    H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, RADIUS: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ROWS input x COLS output channels of one tap, summed over `each` consecutive outputs, BLOCK_K at a time."""
    HO: tl.constexpr = H // SH
    WO: tl.constexpr = W // SW
    blocks = tl.cdiv(co, COLS)
    part, tap = tl.program_id(1), tl.program_id(0) // (blocks * tl.cdiv(ci, ROWS))
    left = tl.program_id(0) // blocks % tl.cdiv(ci, ROWS) * ROWS + tl.arange(0, ROWS)
    right = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    in_left, in_right = left < ci, right < co
    if WIDE:
        part = part.to(tl.int64)
    last = tl.minimum(part * each + each, rows)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(part * each, last, BLOCK_K):
        item = start + tl.arange(0, BLOCK_K)
        inside = item < last
        cell, i, j = item // (HO * WO), (item // WO % HO).to(tl.int32), (item % WO).to(tl.int32)
        y, z = i * SH + (tap // KW * DH - PH), j * SW + (tap % KW * DW - PW)
        row, active = _source(neighbours, cell, y, z, inside, H, W, RADIUS)
        a = tl.load(x + row[:, None] * ci + left[None, :], mask=active[:, None] & in_left[None, :], other=0.0)
        at = grad + item.to(tl.int64)[:, None] * co + right[None, :]
        b = tl.load(at, mask=inside[:, None] & in_right[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    at = ((part.to(tl.int64) * (KH * KW) + tap) * ci + left)[:, None] * co + right[None, :]
    tl.store(parts + at, acc, mask=in_left[:, None] & in_right[None, :])


def _tile(rows: int, cols: int, itemsize: int, aligned: bool) -> dict[str, int]:
    """Tile and launch options of a product of [rows, K] and [K, cols]; the dots take 16 or more of each.

    Float32 has no tensor cores here: its operands stand in registers, so its tiles are half as large each way. So are
    those of channels that 16 does not divide (not `aligned`): they are loaded one by one, each with its address.
    """
    most, deep = (128, 32) if itemsize == 2 else (64, 16)
    high, wide = (min(size, max(16, power(n))) for n, size in ((rows, most), (cols, most if aligned else 64)))
    warps = 8 if high * wide >= 8192 else 4
    sizes = {"ROWS": high, "COLS": wide, "BLOCK_K": deep}
    # Multiply-adds may fuse: each is an addend of a sum.
    return {**sizes, "num_warps": warps, "num_stages": 3 if itemsize == 2 else 2, "enable_fp_fusion": True}


def _aligned(*widths: int) -> bool:
    return all(width % 16 == 0 for width in widths)


def _names(h: int, w: int, neighbours: Tensor, kernel, stride, padding, dilation) -> dict[str, int]:
    """The constants of a convolution of cells of h x w sites."""
    sizes = {"H": h, "W": w, "RADIUS": _radius(neighbours)}
    for name, (down, across) in zip("KSPD", (kernel, stride, padding, dilation)):
        sizes[name + "H"], sizes[name + "W"] = down, across
    return sizes


def implicit_conv(x: Tensor, neighbours: Tensor, weight: Tensor, bias: Tensor | None, *window) -> Tensor:
    """x [T, h, w, Ci], weight [kh * kw, Ci, Co], bias [Co] -> [T, h / sh, w / sw, Co]."""
    check_dtypes("implicit_conv", x, weight, bias)
    check_count("implicit_conv", "elements of a weight", weight.numel())
    (cells, h, w, ci), co, (sh, sw) = x.shape, weight.shape[2], window[1]
    out = torch.empty((cells, h // sh, w // sw, co), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = out.numel() // co
    tile = _tile(rows, co, x.element_size(), _aligned(ci, co))
    grid = (ceil_div(rows, tile["ROWS"]) * ceil_div(co, tile["COLS"]),)
    wide = rows + tile["ROWS"] > INT32
    with guard(x):
        implicit_conv_fwd_kernel[grid](
            x, neighbours, weight, bias, out, rows, ci, co, **_names(h, w, neighbours, *window), WIDE=wide, **tile
        )
    return out


def implicit_conv_grad_x(grad: Tensor, neighbours: Tensor, weight: Tensor, *window) -> Tensor:
    """grad [T, h / sh, w / sw, Co], weight [kh * kw, Ci, Co] -> [T, h, w, Ci]."""
    check_dtypes("implicit_conv_grad_x", grad, weight)
    check_count("implicit_conv_grad_x", "elements of a weight", weight.numel())
    (cells, ho, wo, co), ci, (sh, sw) = grad.shape, weight.shape[1], window[1]
    h, w = ho * sh, wo * sw
    out = torch.empty((cells, h, w, ci), dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    rows = cells * ho * wo
    tile = _tile(rows, ci, grad.element_size(), _aligned(ci, co))
    grid = (ceil_div(rows, tile["ROWS"]) * ceil_div(ci, tile["COLS"]), sh * sw)
    wide = rows + tile["ROWS"] > INT32
    with guard(grad):
        implicit_conv_bwd_x_kernel[grid](
            grad, neighbours, weight, out, rows, ci, co, **_names(h, w, neighbours, *window), WIDE=wide, **tile
        )
    return out


def implicit_conv_grad_weight(x: Tensor, grad: Tensor, neighbours: Tensor, *window) -> Tensor:
    """x [T, h, w, Ci], grad [T, h / sh, w / sw, Co] -> [kh * kw, Ci, Co] in float32, from two stages."""
    check_dtypes("implicit_conv_grad_weight", x, grad)
    (_, h, w, ci), co, (kh, kw) = x.shape, grad.shape[3], window[0]
    check_count("implicit_conv_grad_weight", "elements of a weight", kh * kw * ci * co)
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)  # noqa: E731
    out, rows = new(kh * kw, ci, co), grad.numel() // co
    if rows == 0:
        return out.zero_()
    tile = _tile(ci, co, x.element_size(), _aligned(ci, co))
    programs = kh * kw * ceil_div(ci, tile["ROWS"]) * ceil_div(co, tile["COLS"])
    # About 1024 programs, of 256 outputs or more: each leaves a partial sum of its tile.
    pieces = max(1, min(ceil_div(rows, 256), 1024 // programs))
    each = ceil_div(ceil_div(rows, pieces), tile["BLOCK_K"]) * tile["BLOCK_K"]
    pieces = ceil_div(rows, each)
    parts = new(pieces, kh * kw, ci, co)
    wide = rows + each > INT32
    with guard(x):
        implicit_conv_bwd_weight_kernel[(programs, pieces)](
            x, grad, neighbours, parts, rows, each, ci, co, **_names(h, w, neighbours, *window), WIDE=wide, **tile
        )
        sum_parts(parts, out)
    return out


OPS = {
    "implicit_conv": implicit_conv,
    "implicit_conv_grad_x": implicit_conv_grad_x,
    "implicit_conv_grad_weight": implicit_conv_grad_weight,
}
