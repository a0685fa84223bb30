"""Triton kernels of the cells family: the active cells of a feature map, and back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import COPY, INT32, ceil_div, check_dtypes, guard, power, row_tile, sum_parts


@triton.jit
def pack_cells_kernel(
    x, cells, out, rows, h, columns, width, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Channels last: one item a row of a cell's sites, `width` = w * C elements on end on both sides."""
    blocks = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    item = pid // blocks * ROWS + tl.arange(0, ROWS)
    col = (pid % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    inside = item < rows
    cell = tl.load(cells + item // h, mask=inside, other=0)
    source = ((cell // columns).to(tl.int64) * h + item % h) * columns + cell % columns
    mask = inside[:, None] & (col < width)[None, :]
    value = tl.load(x + source[:, None] * width + col[None, :], mask=mask)
    tl.store(out + item.to(tl.int64)[:, None] * width + col[None, :], value, mask=mask)


@triton.jit
def unpack_cells_kernel(
    x, slot, fill, out, rows, h, columns, width, channels,
    HAS_FILL: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Channels last: one item a row of sites of one cell of the map, masked or not, as they lie in the map."""
    blocks = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    item = pid // blocks * ROWS + tl.arange(0, ROWS)
    col = (pid % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    inside = item < rows
    line = item // columns
    s = tl.load(slot + (line // h * columns + item % columns), mask=inside, other=-1)
    source = s.to(tl.int64) * h + line % h
    in_row = (col < width)[None, :]
    value = tl.load(x + source[:, None] * width + col[None, :], mask=(s >= 0)[:, None] & in_row, other=0.0)
    if HAS_FILL:
        value = tl.where((s >= 0)[:, None], value, tl.load(fill + col % channels, mask=col < width)[None, :])
    target = item.to(tl.int64)[:, None] * width + col[None, :]
    tl.store(out + target, value, mask=inside[:, None] & in_row)


@triton.jit(do_not_specialize=["h", "grid_rows", "columns"])  # they decide no access: w and channels do
def planes_kernel(
    cells_in, index, fill, out, h, w, grid_rows, columns, channels,
    PACK: tl.constexpr, HAS_FILL: tl.constexpr, SITES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Channels first, either way: one program a row of one cell's sites by a block of channels, transposed on chip.

    PACK: cells_in is the map and index the active cells; else cells_in is packed and index the slots.
    """
    col_blocks = tl.cdiv(channels, BLOCK)
    site_blocks = tl.cdiv(w, SITES)
    pid = tl.program_id(0)
    c = pid % col_blocks * BLOCK + tl.arange(0, BLOCK)
    j = pid // col_blocks % site_blocks * SITES + tl.arange(0, SITES)
    item = pid // col_blocks // site_blocks
    i = item % h
    found = tl.load(index + item // h).to(tl.int64)
    cell = found if PACK else (item // h).to(tl.int64)
    packed = (item // h).to(tl.int64) if PACK else found
    line = cell // columns % grid_rows * h + i
    plane = (cell // columns // grid_rows * channels + c) * (grid_rows * h)
    at_map = (plane + line)[None, :] * (columns * w) + (cell % columns * w + j)[:, None]
    at_cell = ((packed * h + i) * w + j)[:, None] * channels + c[None, :]
    mask = (j < w)[:, None] & (c < channels)[None, :]
    if PACK:
        tl.store(out + at_cell, tl.load(cells_in + at_map, mask=mask), mask=mask)
    else:
        active = (packed + j * 0 >= 0)[:, None]
        value = tl.load(cells_in + at_cell, mask=mask & active, other=0.0)
        if HAS_FILL:
            value = tl.where(active, value, tl.load(fill + c, mask=c < channels)[None, :])
        tl.store(out + at_map, value, mask=mask)


@triton.jit
def fill_sum_kernel(
    grad, slot, parts, sites, per_part, h, w, columns, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sum of the masked sites among `per_part` sites of the map; reads no others."""
    blocks = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0)
    col = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    part = (pid // blocks).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    last = tl.minimum(sites, (part + 1) * per_part)
    for start in range(part * per_part, last, ROWS):
        site = start + tl.arange(0, ROWS)
        x = site % (columns * w) // w
        y = site // (columns * w) // h  # of the whole batch's rows of cells
        masked = tl.load(slot + y * columns + x, mask=site < last, other=0) < 0
        at = site[:, None] * channels + col[None, :]
        total += tl.load(grad + at, mask=masked[:, None] & (col < channels)[None, :], other=0.0).to(tl.float32)
    tl.store(parts + part * channels + col, tl.sum(total, axis=0), mask=col < channels)


def _planes(x: Tensor, index: Tensor, fill: Tensor | None, out: Tensor, sizes: tuple[int, ...], pack: bool) -> None:
    items, h, w, grid_rows, columns, channels = sizes
    block = min(64, power(channels))
    tile = min(4096 // block, power(w), 64)
    grid = (items * h * ceil_div(w, tile) * ceil_div(channels, block),)
    flags = {"PACK": pack, "HAS_FILL": fill is not None, "SITES": tile, "BLOCK": block}
    planes_kernel[grid](x, index, fill, out, h, w, grid_rows, columns, channels, **flags, **COPY)


def pack_cells(x: Tensor, cells: Tensor, grid: list[int], channels_last: bool) -> Tensor:
    """x [B, H, W, C] or [B, C, H, W] -> [T, h, w, C]. Reads and writes T * h * w * C elements."""
    check_dtypes("pack_cells", x)
    (rows, columns), total = grid, cells.shape[0]
    (height, width), channels = (x.shape[1:3], x.shape[3]) if channels_last else (x.shape[2:4], x.shape[1])
    h, w = height // rows, width // columns
    out = torch.empty((total, h, w, channels), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    with guard(x):
        if not channels_last:
            _planes(x, cells, None, out, (total, h, w, rows, columns, channels), True)
            return out
        tile, block = row_tile(total * h, w * channels, x.element_size())
        launch = (ceil_div(total * h, tile) * ceil_div(w * channels, block),)
        args = x, cells, out, total * h, h, columns, w * channels
        pack_cells_kernel[launch](*args, WIDE=total * h + tile > INT32, ROWS=tile, BLOCK=block, **COPY)
    return out


def unpack_cells(x: Tensor, slot: Tensor, grid: list[int], fill: Tensor | None, channels_last: bool) -> Tensor:
    """x [T, h, w, C] -> the map [B, H, W, C] or [B, C, H, W]. Reads the active sites, writes all."""
    check_dtypes("unpack_cells", x, fill)
    (batch, rows, columns), (_, h, w, channels) = grid, x.shape
    size = (rows * h, columns * w)
    shape = (batch, *size, channels) if channels_last else (batch, channels, *size)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    with guard(x):
        if not channels_last:
            _planes(x, slot, fill, out, (batch * rows * columns, h, w, rows, columns, channels), False)
            return out
        items = batch * rows * h * columns
        tile, block = row_tile(items, w * channels, x.element_size())
        launch = (ceil_div(items, tile) * ceil_div(w * channels, block),)
        flags = {"HAS_FILL": fill is not None, "WIDE": items + tile > INT32, "ROWS": tile, "BLOCK": block}
        unpack_cells_kernel[launch](x, slot, fill, out, items, h, columns, w * channels, channels, **flags, **COPY)
    return out


def fill_sum(grad: Tensor, slot: Tensor, grid: list[int]) -> Tensor:
    """grad [B, H, W, C] -> [C] float32, the sum over the masked sites, which alone are read."""
    check_dtypes("fill_sum", grad)
    (_, rows, columns), (batch, height, width, channels) = grid, grad.shape
    out = torch.empty((channels,), dtype=torch.float32, device=grad.device)
    sites = batch * height * width
    if sites == 0:
        return out.zero_()
    tile, block = row_tile(sites, channels, 4)
    blocks = ceil_div(channels, block)
    per_part = ceil_div(sites, tile * max(1, min(ceil_div(1024, blocks), ceil_div(sites, 4 * tile)))) * tile
    count = ceil_div(sites, per_part)
    parts = torch.empty((count, channels), dtype=torch.float32, device=grad.device)
    sizes = sites, per_part, height // rows, width // columns, columns, channels
    with guard(grad):
        fill_sum_kernel[(count * blocks,)](grad, slot, parts, *sizes, ROWS=tile, BLOCK=block, **COPY)
        sum_parts(parts, out)
    return out


OPS = {"pack_cells": pack_cells, "unpack_cells": unpack_cells, "fill_sum": fill_sum}
