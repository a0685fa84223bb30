"""Triton kernels of the norm family: residual add + LayerNorm in one pass, and back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS, ceil_div, check_dtypes, guard, power, sum_parts


@triton.jit
def add_norm_fwd_kernel(
    x, delta, weight, bias, shift, residual, y, mean, rstd, rows, width, eps,
    HAS_DELTA: tl.constexpr, HAS_SHIFT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whole rows in registers: each element is read once and written once (twice with a residual)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    at = row[:, None] * width + col[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        added = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_SHIFT:
            added += tl.load(shift + col, mask=col < width, other=0.0)[None, :]
        value += added
        stored = value.to(residual.dtype.element_ty)
        tl.store(residual + at, stored, mask=inside)
        value = stored.to(tl.float32)  # the norm is that of the stream as it is kept
    average = tl.sum(value, axis=1) / width
    centred = tl.where(inside, value - average[:, None], 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / width + eps)
    w = tl.load(weight + col, mask=col < width, other=0.0)
    b = tl.load(bias + col, mask=col < width, other=0.0)
    out = centred * scale[:, None] * w[None, :] + b[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + row, average, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit
def add_norm_bwd_kernel(
    grad_y, grad_residual, residual, mean, rstd, weight, bias, grad_x, grad_delta, y, parts, rows, per_program, width,
    HAS_PASSED: tl.constexpr, TABLES: tl.constexpr, NARROW: tl.constexpr, AGAIN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`per_program` consecutive rows, ROWS at a time; sums for weight, bias (TABLES = 2) and shift (3) stay in
    registers until the end. NARROW: grad_x in 16 bits too. AGAIN: the norm once more.

    With n the normalised row and w = grad_y * weight: grad_x = rstd * (w - mean(w) - n * mean(w * n)).
    """
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    w = tl.load(weight + col, mask=col < width, other=0.0)
    weight_total = tl.zeros([BLOCK], tl.float32)
    bias_total = tl.zeros([BLOCK], tl.float32)
    shift_total = tl.zeros([BLOCK], tl.float32)
    if AGAIN:
        b = tl.load(bias + col, mask=col < width, other=0.0)
    last = tl.minimum((program + 1) * per_program, rows)
    for start in range(program * per_program, last, ROWS):
        row = start + tl.arange(0, ROWS)
        here = row < last
        inside = here[:, None] & (col < width)[None, :]
        at = row[:, None] * width + col[None, :]
        g = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        average = tl.load(mean + row, mask=here, other=0.0)
        scale = tl.load(rstd + row, mask=here, other=0.0)
        n = tl.where(inside, (value - average[:, None]) * scale[:, None], 0.0)
        wg = g * w[None, :]
        mean_w = tl.sum(wg, axis=1) / width
        mean_wn = tl.sum(wg * n, axis=1) / width
        out = (wg - mean_w[:, None] - n * mean_wn[:, None]) * scale[:, None]
        if HAS_PASSED:
            out += tl.load(grad_residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + at, out.to(grad_x.dtype.element_ty), mask=inside)
        if NARROW:
            tl.store(grad_delta + at, out.to(grad_delta.dtype.element_ty), mask=inside)
        if AGAIN:
            tl.store(y + at, (n * w[None, :] + b[None, :]).to(y.dtype.element_ty), mask=inside)
        if TABLES > 0:
            weight_total += tl.sum(g * n, axis=0)
            bias_total += tl.sum(g, axis=0)
        if TABLES > 2:
            shift_total += tl.sum(tl.where(inside, out, 0.0), axis=0)
    if TABLES > 0:
        at = parts + program * TABLES * width + col
        tl.store(at, weight_total, mask=col < width)
        tl.store(at + width, bias_total, mask=col < width)
        if TABLES > 2:
            tl.store(at + 2 * width, shift_total, mask=col < width)


def _tile(width: int) -> tuple[int, int, dict]:
    """(rows, columns, options) of a program: whole rows, about 16 elements a thread."""
    block = power(width)
    rows = max(1, 2048 // block)
    return rows, block, {"num_warps": min(16, max(4, rows * block // 512)), **OPTIONS}


def add_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, delta [R, D] -> residual (empty without delta), y in `dtype`, mean and rstd [R] in float32. shift: [D] in
    float32, added to delta."""
    check_dtypes("add_norm", x, delta, weight, bias, shift)
    rows, width = x.shape
    residual = torch.empty_like(x) if delta is not None else x.new_empty((0,))
    y = torch.empty((rows, width), dtype=dtype, device=x.device)
    mean = torch.empty((rows,), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    check_dtypes("add_norm", y)
    if rows:
        tile, block, options = _tile(width)
        args = x, delta, weight, bias, shift, residual, y, mean, rstd, rows, width, eps
        flags = {"HAS_DELTA": delta is not None, "HAS_SHIFT": shift is not None}
        with guard(x):
            add_norm_fwd_kernel[(ceil_div(rows, tile),)](*args, **flags, ROWS=tile, BLOCK=block, **options)
    return residual, y, mean, rstd


def add_norm_backward(
    grad_y: Tensor,
    grad_residual: Tensor | None,
    residual: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    need_weight: bool,
    bias: Tensor | None = None,
    delta_dtype: torch.dtype | None = None,
    need_shift: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> grad_x [R, D] like residual; the gradients of weight, bias and shift, [0, 2 or 3, D] in float32; grad_x in
    `delta_dtype`, or [0, D]; with the bias y once more, or [0, D]."""
    check_dtypes("add_norm_backward", grad_y, grad_residual, residual, bias)
    rows, width = residual.shape
    grad_x = torch.empty_like(residual)
    count = 3 if need_shift else 2 if need_weight else 0
    tables = torch.empty((count, width), dtype=torch.float32, device=residual.device)
    narrow = delta_dtype is not None and delta_dtype is not residual.dtype
    grad_delta = residual.new_empty((rows if narrow else 0, width), dtype=delta_dtype if narrow else residual.dtype)
    y = grad_y.new_empty((0 if bias is None else rows, width))
    check_dtypes("add_norm_backward", grad_delta)
    if not rows:
        return grad_x, tables.zero_(), grad_delta, y
    tile, block, options = _tile(width)
    # At most 512 programs (about 4 an SM): each leaves one partial sum.
    each = ceil_div(ceil_div(rows, 512), tile) * tile
    programs = ceil_div(rows, each)
    parts = torch.empty((programs, count, width), dtype=torch.float32, device=residual.device)
    tensors = grad_y, grad_residual, residual, mean, rstd, weight, bias, grad_x, grad_delta, y, parts
    args = *tensors, rows, each, width
    flags = {"HAS_PASSED": grad_residual is not None, "TABLES": count, "NARROW": narrow, "AGAIN": bias is not None}
    with guard(residual):
        add_norm_bwd_kernel[(programs,)](*args, **flags, ROWS=tile, BLOCK=block, **options)
        if count:
            sum_parts(parts, tables)
    return grad_x, tables, grad_delta, y


OPS = {"add_norm": add_norm, "add_norm_backward": add_norm_backward}
