"""Triton kernels of the feature_loss family: a row of pred and its row of target meet in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS, ceil_div, check_dtypes, guard, power

MAX_WIDTH = 16384  # 16 values of each row a thread at 32 warps


@triton.jit
def load_rows(pred, target, index, rows, width, HAS_INDEX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    at = row[:, None] * width + col[None, :]
    source = row
    if HAS_INDEX:
        source = tl.load(index + row, mask=row < rows, other=0).to(tl.int64)
    p = tl.load(pred + at, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(target + source[:, None] * width + col[None, :], mask=inside, other=0.0).to(tl.float32)
    return row, inside, at, p, t


@triton.jit
def feature_loss_fwd_kernel(
    pred, target, index, loss, stats, rows, width, beta, eps,
    HAS_INDEX: tl.constexpr, NORM: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, each element read once."""
    row, inside, _at, p, t = load_rows(pred, target, index, rows, width, HAS_INDEX, ROWS, BLOCK)
    first = tl.zeros([ROWS], tl.float32)
    scale_t = tl.full([ROWS], 1.0, tl.float32)
    scale_p = tl.full([ROWS], 1.0, tl.float32)
    active = tl.zeros([ROWS], tl.float32)
    short = tl.zeros([ROWS], tl.float32)  # what the normalised rows lack to unit length, below eps only
    if NORM == 1:
        first = tl.sum(t, axis=1) / width
        t = tl.where(inside, t - first[:, None], 0.0)
        scale_t = 1.0 / tl.sqrt_rn(tl.sum(t * t, axis=1) / width + eps)
    if NORM == 2 or KIND == 3:
        of_t = tl.sqrt_rn(tl.sum(t * t, axis=1))
        of_p = tl.sqrt_rn(tl.sum(p * p, axis=1))
        scale_t = 1.0 / tl.where(of_t < eps, eps, of_t)
        scale_p = 1.0 / tl.where(of_p < eps, eps, of_p)
        active = tl.where(of_p < eps, 0.0, 1.0)
        short = tl.where(of_t < eps, 1.0 - of_t * scale_t * of_t * scale_t, 0.0)
        short += tl.where(of_p < eps, 1.0 - of_p * scale_p * of_p * scale_p, 0.0)
    t *= scale_t[:, None]
    p *= scale_p[:, None]
    d = p - t
    each = d * d
    if KIND == 3:
        out = 0.5 * (tl.sum(each, axis=1) + short)
        first = out
    else:
        if KIND == 1:
            each = tl.abs(d)
        if KIND == 2:
            each = tl.where(tl.abs(d) < beta, 0.5 * each / beta, tl.abs(d) - 0.5 * beta)
        out = tl.sum(tl.where(inside, each, 0.0), axis=1) / width
    tl.store(loss + row, out, mask=row < rows)
    tl.store(stats + 4 * row, first, mask=row < rows)
    tl.store(stats + 4 * row + 1, scale_t, mask=row < rows)
    tl.store(stats + 4 * row + 2, scale_p, mask=row < rows)
    tl.store(stats + 4 * row + 3, active, mask=row < rows)


@triton.jit
def feature_loss_bwd_kernel(
    grad, pred, target, index, stats, grad_pred, rows, width, beta,
    HAS_INDEX: tl.constexpr, NORM: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, inside, at, p, t = load_rows(pred, target, index, rows, width, HAS_INDEX, ROWS, BLOCK)
    g = tl.load(grad + row, mask=row < rows, other=0.0)
    first = tl.load(stats + 4 * row, mask=row < rows, other=0.0)
    scale_t = tl.load(stats + 4 * row + 1, mask=row < rows, other=0.0)
    scale_p = tl.load(stats + 4 * row + 2, mask=row < rows, other=0.0)
    active = tl.load(stats + 4 * row + 3, mask=row < rows, other=0.0)
    if NORM == 1:
        t = t - first[:, None]
    t *= scale_t[:, None]
    p *= scale_p[:, None]
    if KIND == 3:
        # t - cos p, where t is close to p without loss of digits
        out = -(g * scale_p)[:, None] * (t - p * active[:, None] + p * (active * first)[:, None])
    else:
        d = p - t
        slope = 2.0 * d
        if KIND > 0:
            slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))  # NaN where d is
        if KIND == 2:
            slope = tl.where(tl.abs(d) < beta, d / beta, slope)
        if NORM == 2:  # what lies along pred, its normalisation takes out
            slope -= p * (active * tl.sum(tl.where(inside, slope * p, 0.0), axis=1))[:, None]
        out = (g / width * scale_p)[:, None] * slope
    tl.store(grad_pred + at, out.to(grad_pred.dtype.element_ty), mask=inside)


def _launch(pred: Tensor) -> tuple[tuple[int], dict]:
    rows, block = pred.shape[0], power(pred.shape[1])
    if block > MAX_WIDTH:
        raise ValueError(f"feature_loss: the Triton kernel takes rows of at most {MAX_WIDTH} values")
    # Rows of another width move one element at a time, so their tile is 8 elements a thread, to stay in registers.
    tile = 2048 if pred.shape[1] % 16 == 0 else 1024
    each = max(1, min(tile // block, power(rows)))
    warps = min(32, max(4, block // 512))
    return (ceil_div(rows, each),), {"ROWS": each, "BLOCK": block, "num_warps": warps, **OPTIONS}


def feature_loss(
    pred: Tensor, target: Tensor, index: Tensor | None, norm: int, kind: int, beta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """pred [R, D], target [N, D], index int32 [R] -> the loss of each row [R] and its numbers [R, 4], float32."""
    check_dtypes("feature_loss", pred, target)
    rows, width = pred.shape
    loss = torch.empty(rows, dtype=torch.float32, device=pred.device)
    stats = torch.empty((rows, 4), dtype=torch.float32, device=pred.device)
    grid, options = _launch(pred)
    if rows:
        with guard(pred):
            feature_loss_fwd_kernel[grid](
                pred, target, index, loss, stats, rows, width, beta, eps,
                HAS_INDEX=index is not None, NORM=norm, KIND=kind, **options,
            )  # fmt: skip
    return loss, stats


def feature_loss_backward(
    grad: Tensor, pred: Tensor, target: Tensor, index: Tensor | None, stats: Tensor, norm: int, kind: int, beta: float
) -> Tensor:
    """-> grad_pred like pred."""
    check_dtypes("feature_loss_backward", grad, pred, target)
    grad_pred = torch.empty_like(pred)
    grid, options = _launch(pred)
    if pred.shape[0]:
        with guard(pred):
            feature_loss_bwd_kernel[grid](
                grad, pred, target, index, stats, grad_pred, *pred.shape, beta,
                HAS_INDEX=index is not None, NORM=norm, KIND=kind, **options,
            )  # fmt: skip
    return grad_pred


OPS = {"feature_loss": feature_loss, "feature_loss_backward": feature_loss_backward}
