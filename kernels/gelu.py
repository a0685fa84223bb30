"""Triton kernels of the gelu family: bias + GELU in one pass, and back with the gradient of the bias."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS, ceil_div, check_dtypes, guard, power, sum_parts

TILE = {"num_warps": 4, **OPTIONS}


# The interpreter knows no assembly; these two instructions of the special-function unit are all there is of it.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def reciprocal(x):
    """1 / x to 1 unit in the last place, for normal x: one instruction, where a division takes five and a branch."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def power_of_two(x):
    """2 ** x, 0 where it is below the smallest normal float."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def gelu_parts(x, TANH: tl.constexpr):
    """(GELU(x), its derivative) in float32: the erf form, or the tanh form as x * sigmoid(2u). Without branches."""
    if TANH:
        # Beyond 10 the sigmoid is 0 or 1 to the last digit; the square must stay finite. NaN stays.
        z = tl.maximum(tl.minimum(x, 10.0, tl.PropagateNan.ALL), -10.0, tl.PropagateNan.ALL)
        square = z * z
        u2 = z * tl.fma(square, 0.07135481282989505, 1.5957691216057308)
        gate = reciprocal(1.0 + power_of_two(-1.4426950408889634 * u2))
        slope = tl.fma(z * gate * (1.0 - gate), tl.fma(square, 0.21406443848968514, 1.5957691216057308), gate)
    else:
        # Phi(-|x|) = exp(-x^2 / 2) * t * P(t), t = 1 / (1 + 0.4 |x| / sqrt 2), as in csrc/cpu/gelu_math.h.
        z = tl.minimum(tl.abs(x), 13.0, tl.PropagateNan.ALL)
        t = reciprocal(tl.fma(z, 0.282842712, 1.0))
        e = power_of_two(-0.7213475204444817 * (z * z))
        p = tl.fma(t, 0.0205325913, -0.0696987286)
        p = tl.fma(p, t, 0.0410319939)
        p = tl.fma(p, t, 0.045093637)
        p = tl.fma(p, t, 0.0391020775)
        p = tl.fma(p, t, 0.0970310047)
        p = tl.fma(p, t, 0.100857235)
        p = tl.fma(p, t, 0.113233835)
        p = tl.fma(p, t, 0.112816386)
        tail = e * t * p
        gate = tl.where(x > 0.0, 1.0 - tail, tail)
        slope = tl.fma(tl.where(x > 0.0, z, -z) * 0.3989422804014327, e, gate)
    # Below -13 the gate is next to 0, but not 0: it must not be multiplied with all of x.
    return tl.maximum(x, -13.0, tl.PropagateNan.ALL) * gate, slope


@triton.jit
def bias_gelu_fwd_kernel(
    x, bias, out, rows, width, HAS_BIAS: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    at = row[:, None] * width + col[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    result, _ = gelu_parts(value, TANH)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def bias_gelu_bwd_kernel(
    grad, x, bias, grad_x, again, parts, rows, per_program, width,
    HAS_BIAS: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_OUT: tl.constexpr, TANH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of columns over `per_program` rows; the column sums stay in registers until the end. NEED_OUT: the GELU
    once more, into `again`."""
    blocks = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0)
    program = (pid // blocks).to(tl.int64)
    col = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    shift = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + col, mask=col < width, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    last = tl.minimum((program + 1) * per_program, rows)
    for start in range(program * per_program, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (col < width)[None, :]
        at = row[:, None] * width + col[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
        result, slope = gelu_parts(value, TANH)
        if NEED_OUT:
            tl.store(again + at, result.to(again.dtype.element_ty), mask=inside)
        out = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * slope
        tl.store(grad_x + at, out.to(grad_x.dtype.element_ty), mask=inside)
        if NEED_BIAS:
            total += tl.sum(out, axis=0)
    if NEED_BIAS:
        tl.store(parts + program * width + col, total, mask=col < width)


def _tile(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile of 2048 elements, 16 a thread."""
    block = min(power(width), 512)
    return max(1, 2048 // block), block


def bias_gelu(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """x [R, D] -> GELU(x + bias), bias in float32. Reads and writes each element once."""
    check_dtypes("bias_gelu", x, bias)
    out = torch.empty_like(x)
    rows, width = x.shape
    if out.numel():
        tile, block = _tile(width)
        grid = (ceil_div(rows, tile) * ceil_div(width, block),)
        flags = {"HAS_BIAS": bias is not None, "TANH": bool(tanh)}
        with guard(x):
            bias_gelu_fwd_kernel[grid](x, bias, out, rows, width, **flags, ROWS=tile, BLOCK=block, **TILE)
    return out


def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_bias: bool, need_out: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """-> grad_x [R, D], the gradient of the bias [D] (or [0]) in float32, and the GELU once more (or [0, D])."""
    check_dtypes("bias_gelu_backward", grad, x, bias)
    grad_x = torch.empty_like(x)
    rows, width = x.shape
    grad_bias = x.new_empty((width if need_bias else 0,), dtype=torch.float32)
    out = x.new_empty((rows if need_out else 0, width))
    if not grad_x.numel():
        return grad_x, grad_bias.zero_(), out
    tile, block = _tile(width)
    blocks = ceil_div(width, block)
    # About 1024 programs in all; each leaves one partial sum of its columns.
    each = ceil_div(ceil_div(rows, max(1, 1024 // blocks)), tile) * tile
    programs = ceil_div(rows, each)
    parts = torch.empty((programs, width) if need_bias else (0,), dtype=torch.float32, device=x.device)
    flags = {"HAS_BIAS": bias is not None, "NEED_BIAS": bool(need_bias), "NEED_OUT": bool(need_out), "TANH": bool(tanh)}
    with guard(x):
        bias_gelu_bwd_kernel[(programs * blocks,)](
            grad, x, bias, grad_x, out, parts, rows, each, width, **flags, ROWS=tile, BLOCK=block, **TILE
        )
        if need_bias:
            sum_parts(parts, grad_bias)
    return grad_x, grad_bias, out


OPS = {"bias_gelu": bias_gelu, "bias_gelu_backward": bias_gelu_backward}
