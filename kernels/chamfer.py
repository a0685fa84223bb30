"""Triton kernels of the chamfer family: all distances of a small group stand in the registers of a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS, check_dtypes, guard, power


@triton.jit
def chamfer_fwd_kernel(a, b, to_b, to_a, at_b, at_a, n, m, COORDINATES: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """A group a program; N, M: n and m rounded up to powers of two."""
    g = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    j = tl.arange(0, M)
    distance = tl.zeros([N, M], tl.float32)
    for d in tl.static_range(COORDINATES):
        x = tl.load(a + (g * n + i) * COORDINATES + d, mask=i < n, other=0.0)
        y = tl.load(b + (g * m + j) * COORDINATES + d, mask=j < m, other=0.0)
        step = x[:, None] - y[None, :]
        distance += step * step
    distance = tl.where((i < n)[:, None] & (j < m)[None, :], distance, float("inf"))
    tl.store(to_b + g * n + i, tl.min(distance, 1), mask=i < n)
    tl.store(to_a + g * m + j, tl.min(distance, 0), mask=j < m)
    tl.store(at_b + g * n + i, tl.argmin(distance, 1).to(tl.int32), mask=i < n)  # the first of equal ones
    tl.store(at_a + g * m + j, tl.argmin(distance, 0).to(tl.int32), mask=j < m)


@triton.jit
def chamfer_bwd_kernel(
    grad_to_b, grad_to_a, a, b, at_b, at_a, grad_a, grad_b, n, m,
    COORDINATES: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Slopes of the pairs in which one is the nearest of the other; sums over rows and columns, no atomics."""
    g = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    j = tl.arange(0, M)
    near_b = tl.load(at_b + g * n + i, mask=i < n, other=-1)
    near_a = tl.load(at_a + g * m + j, mask=j < m, other=-1)
    slope_b = tl.load(grad_to_b + g * n + i, mask=i < n, other=0.0)
    slope_a = tl.load(grad_to_a + g * m + j, mask=j < m, other=0.0)
    slope = tl.where(near_b[:, None] == j[None, :], slope_b[:, None], 0.0)
    slope += tl.where(near_a[None, :] == i[:, None], slope_a[None, :], 0.0)
    for d in tl.static_range(COORDINATES):
        x = tl.load(a + (g * n + i) * COORDINATES + d, mask=i < n, other=0.0)
        y = tl.load(b + (g * m + j) * COORDINATES + d, mask=j < m, other=0.0)
        step = 2.0 * slope * (x[:, None] - y[None, :])
        tl.store(grad_a + (g * n + i) * COORDINATES + d, tl.sum(step, 1), mask=i < n)
        tl.store(grad_b + (g * m + j) * COORDINATES + d, -tl.sum(step, 0), mask=j < m)


def _options(a: Tensor, b: Tensor) -> dict:
    rows, columns = power(a.shape[1]), power(b.shape[1])
    warps = min(16, max(1, rows * columns // 1024))
    return {"COORDINATES": a.shape[2], "N": rows, "M": columns, "num_warps": warps, **OPTIONS}


def chamfer(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a [G, n, D], b [G, m, D] -> squared distances [G, n], [G, m] and the nearest points, int32."""
    check_dtypes("chamfer", a, b)
    (groups, n, _), m = a.shape, b.shape[1]
    new = lambda count, dtype: torch.empty((groups, count), dtype=dtype, device=a.device)  # noqa: E731
    out = new(n, torch.float32), new(m, torch.float32), new(n, torch.int32), new(m, torch.int32)
    with guard(a):
        chamfer_fwd_kernel[(groups,)](a, b, *out, n, m, **_options(a, b))
    return out


def chamfer_backward(
    grad_to_b: Tensor, grad_to_a: Tensor, a: Tensor, b: Tensor, at_b: Tensor, at_a: Tensor
) -> tuple[Tensor, Tensor]:
    """-> grad_a like a, grad_b like b."""
    check_dtypes("chamfer_backward", grad_to_b, grad_to_a, a, b)
    grad_a, grad_b = torch.empty_like(a), torch.empty_like(b)
    with guard(a):
        chamfer_bwd_kernel[(a.shape[0],)](
            grad_to_b, grad_to_a, a, b, at_b, at_a, grad_a, grad_b, a.shape[1], b.shape[1], **_options(a, b)
        )
    return grad_a, grad_b


OPS = {"chamfer": chamfer, "chamfer_backward": chamfer_backward}
