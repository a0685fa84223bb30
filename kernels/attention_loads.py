"""What the attention kernels read: rows of sequences, rotated where asked, and what is added to their scores."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def sequence(cu, b, longest):
    """First row (int64) and length of sequence b; equal lengths are not looked up."""
    if cu is None:
        return b.to(tl.int64) * longest, longest
    else:
        first = tl.load(cu + b)
        return first.to(tl.int64), tl.load(cu + b + 1) - first


@triton.jit
def load_rows(base, first, n, count, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first + n, n < count, of D elements `stride` apart -> [N, BLOCK_D], zero elsewhere."""
    d = tl.arange(0, BLOCK_D)
    inside = (n < count)[:, None]
    if D < BLOCK_D:
        inside = inside & (d < D)[None, :]
    return tl.load(base + first * stride + n[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, value, first, n, count, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    inside = (n < count)[:, None]
    if D < BLOCK_D:
        inside = inside & (d < D)[None, :]
    at = base + first * stride + n[:, None] * stride + d[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_offset(key_bias, first, n, count, heads):
    """What is added to the base-2 scores of each key: its bias, or -inf where there is no key."""
    if key_bias is None:
        return tl.where(n < count, 0.0, float("-inf"))
    else:
        bias = tl.load(key_bias + first * heads + n * heads, mask=n < count, other=float("-inf"))
        return bias * LOG2_E


@triton.jit
def load_marked(marked, first, n, count):
    return (tl.load(marked + first + n, mask=n < count, other=0) != 0).to(tl.float32)


@triton.jit
def load_bias(bias, m, n, rows, count, longest):
    """What is added to the base-2 scores of each pair, from a matrix whose rows are `longest` apart; m and n are rows
    and columns that broadcast to the tile."""
    value = tl.load(bias + m.to(tl.int64) * longest + n, mask=(m < rows) & (n < count), other=0.0)
    return value * LOG2_E


@triton.jit
def matrix(bias, b, h, groups, heads, max_q, max_k):
    """Start of the bias of sequence b and head h."""
    return bias + ((b % groups) * heads + h).to(tl.int64) * max_q * max_k


@triton.jit
def partners(D: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The other element of each one's pair, and its sign in turn(x)."""
    d = tl.arange(0, BLOCK_D)
    if INTERLEAVED:
        return d ^ 1, tl.where(d % 2 == 0, -1.0, 1.0)
    else:
        return tl.where(d < D // 2, d + D // 2, d - D // 2), tl.where(d < D // 2, -1.0, 1.0)


@triton.jit
def load_turned(
    base, first, n, count, stride, cos, sin, turn, D: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """`load_rows`, rotated by rows turn + n of cos and sin where they are given; rounded to the dtype of `base`."""
    x = load_rows(base, first, n, count, stride, D, BLOCK_D)
    if cos is not None:
        other, sign = partners(D, BLOCK_D, INTERLEAVED)
        inside = (n < count)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
        y = tl.load(base + first * stride + n[:, None] * stride + other[None, :], mask=inside, other=0.0)
        c = load_rows(cos, turn, n, count, D, D, BLOCK_D)
        s = load_rows(sin, turn, n, count, D, D, BLOCK_D)
        x = (x.to(tl.float32) * c + y.to(tl.float32) * sign[None, :] * s).to(x.dtype)
    return x


@triton.jit
def turned_back(dx, n, count, cos, sin, turn, D: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The gradient of rows from that of what `load_turned` made of them: the transpose of the rotation."""
    if cos is not None:
        other, sign = partners(D, BLOCK_D, INTERLEAVED)
        c = load_rows(cos, turn, n, count, D, D, BLOCK_D)
        s = load_rows(sin, turn, n, count, D, D, BLOCK_D)
        y = tl.gather(dx * s, tl.broadcast_to(other[None, :], dx.shape), 1)
        dx = dx * c - y * sign[None, :]
    return dx
