"""Triton kernels of the loss family: pixels of masked patches are read once, straight from the image.

A tile is [patches, channels, pixels of a patch], the last two rounded up to powers of two. The whole patch is in
registers, so mean, variance (two passes) and distance cost no further memory traffic; nothing is materialised.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import INT32, OPTIONS, ceil_div, check_dtypes, guard, power

NORM_NONE, NORM_MAE, NORM_VIDEOMAE, NORM_LAYERNORM = 0, 1, 2, 3
MAX_PATCH = 32768  # padded values of one patch: 32 a thread at 32 warps


@triton.jit
def pixel_offsets(
    flat, channels, frames, height, width, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C_PAD, PIX, WIDE
):
    """Offsets into the image of the patches `flat`, [R, C_PAD, PIX]: int64 start of each plus an offset inside."""
    gw = width // PW
    gh = height // PH
    tokens = frames // PT * gh * gw
    b = (flat // tokens).to(tl.int64)
    n = flat % tokens
    corner = (n // (gh * gw) * PT).to(tl.int64) * height + n // gw % gh * PH
    corner = b * channels * frames * height * width + corner * width + n % gw * PW
    pixel = tl.arange(0, PIX)
    c = tl.arange(0, C_PAD)
    if WIDE:
        pixel = pixel.to(tl.int64)
        c = c.to(tl.int64)
    inside = (pixel // (PH * PW) * height + pixel // PW % PH) * width + pixel % PW
    inside = (c * frames * height * width)[:, None] + inside[None, :]
    return corner[:, None, None] + inside[None, :, :]


@triton.jit
def sum_patch(value, NORM: tl.constexpr):
    """Sum over the values that share a mean: the pixels of a channel (VideoMAE) or the whole patch."""
    total = tl.sum(value, axis=2, keep_dims=True)
    if NORM != 2:
        total = tl.sum(total, axis=1, keep_dims=True)
    return total


@triton.jit
def patch_loss_fwd_kernel(
    pred, images, index, loss, stats, rows, channels, frames, height, width, beta, inverse_beta,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, PIX: tl.constexpr,
    NORM: tl.constexpr, SMOOTH_L1: tl.constexpr, PACKED: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS masked patches a program: reads each prediction and each pixel once, writes the loss and the stats."""
    PIXELS: tl.constexpr = PT * PH * PW
    COUNT: tl.constexpr = PIXELS if NORM == 2 else PIXELS * C  # values that share a mean
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    flat = tl.load(index + row, mask=inside, other=0)
    pixel = tl.arange(0, PIX)[None, None, :]
    c = tl.arange(0, C_PAD)[None, :, None]
    valid = (pixel < PIXELS) & (c < C)
    mask = inside[:, None, None] & valid

    source = pixel_offsets(flat, channels, frames, height, width, PT, PH, PW, C_PAD, PIX, WIDE)
    target = tl.load(images + source, mask=mask, other=0.0).to(tl.float32)
    at = (row if PACKED else flat.to(tl.int64)) * (PIXELS * C)
    at = at[:, None, None] + (c * PIXELS + pixel if CHANNELS_FIRST else pixel * C + c)
    value = tl.load(pred + at, mask=mask, other=0.0).to(tl.float32)

    if NORM == 0:
        mean = tl.zeros([ROWS, 1, 1], tl.float32)
        inverse = tl.full([ROWS, 1, 1], 1.0, tl.float32)
    else:
        mean = sum_patch(target, NORM) / COUNT
        target = tl.where(valid, target - mean, 0.0)
        square = sum_patch(target * target, NORM)
        if NORM == 3:
            inverse = 1.0 / tl.sqrt_rn(square / COUNT + 1e-6)
        elif NORM == 1:
            inverse = 1.0 / tl.sqrt_rn(square / (COUNT - 1) + 1e-6)
        else:
            inverse = 1.0 / (tl.sqrt_rn(square / (COUNT - 1)) + 1e-6)
        target *= inverse

    d = value - target
    each = d * d
    if SMOOTH_L1:
        each = tl.where(tl.abs(d) < beta, 0.5 * each * inverse_beta, tl.abs(d) - 0.5 * beta)
    total = tl.sum(tl.sum(tl.where(valid, each, 0.0), axis=2), axis=1)
    tl.store(loss + row, total / (PIXELS * C), mask=inside)
    if NORM == 2:
        at = (row[:, None, None] * C + c) * 2
        group = inside[:, None, None] & (c < C)
    else:
        at = row[:, None, None] * 2
        group = inside[:, None, None]
    tl.store(stats + at, mean, mask=group)
    tl.store(stats + at + 1, inverse, mask=group)


@triton.jit
def patch_loss_bwd_kernel(
    grad, pred, images, index, slot, stats, grad_pred, grad_images, rows, channels, frames, height, width, beta,
    inverse_beta,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, PIX: tl.constexpr,
    NORM: tl.constexpr, SMOOTH_L1: tl.constexpr, PACKED: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
    NEED_IMAGES: tl.constexpr, EVERY_TOKEN: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS patches a program: the masked ones, or EVERY_TOKEN where the others' zeros must be written too."""
    PIXELS: tl.constexpr = PT * PH * PW
    COUNT: tl.constexpr = PIXELS if NORM == 2 else PIXELS * C
    item = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = item < rows
    if EVERY_TOKEN:
        flat = item
        m = -tl.load(slot + item, mask=inside, other=0).to(tl.int64) - 1
        scored = inside & (m >= 0)
    else:
        flat = tl.load(index + item, mask=inside, other=0).to(tl.int64)
        m = item
        scored = inside
    pixel = tl.arange(0, PIX)[None, None, :]
    c = tl.arange(0, C_PAD)[None, :, None]
    valid = (pixel < PIXELS) & (c < C)
    mask = scored[:, None, None] & valid

    source = pixel_offsets(flat.to(tl.int32), channels, frames, height, width, PT, PH, PW, C_PAD, PIX, WIDE)
    target = tl.load(images + source, mask=mask, other=0.0).to(tl.float32)
    row = m if PACKED else flat
    at = (row * (PIXELS * C))[:, None, None] + (c * PIXELS + pixel if CHANNELS_FIRST else pixel * C + c)
    value = tl.load(pred + at, mask=mask, other=0.0).to(tl.float32)
    slope = tl.load(grad + m, mask=scored, other=0.0).to(tl.float32)[:, None, None] / (PIXELS * C)
    if NORM != 0:
        if NORM == 2:
            group = (m[:, None, None] * C + c) * 2
            has_group = scored[:, None, None] & (c < C)
        else:
            group = m[:, None, None] * 2
            has_group = scored[:, None, None]
        mean = tl.load(stats + group, mask=has_group, other=0.0)
        inverse = tl.load(stats + group + 1, mask=has_group, other=1.0)
        target = tl.where(mask, (target - mean) * inverse, 0.0)

    d = value - target
    if SMOOTH_L1:
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
        d = tl.where(tl.abs(d) < beta, d * inverse_beta, tl.where(d != d, d, sign))
    else:
        d = 2.0 * d
    d = tl.where(mask, d * slope, 0.0)
    written = inside if EVERY_TOKEN and not PACKED else scored
    tl.store(grad_pred + at, d.to(grad_pred.dtype.element_ty), mask=written[:, None, None] & valid)

    if NEED_IMAGES:
        u = -d  # the gradient of the normalised target
        if NORM != 0:
            along = sum_patch(u * target, NORM) / (COUNT if NORM == 3 else COUNT - 1)
            if NORM == 2:
                # std = 1/inverse - 1e-6; the denominator's gradient has a further 1/(inverse * std).
                std = 1.0 / inverse - 1e-6
                along = along / tl.where(std > 0, inverse * std, 1.0)  # a constant channel: target is 0
            u = (u - sum_patch(u, NORM) / COUNT - target * along) * inverse
        tl.store(grad_images + source, u.to(grad_images.dtype.element_ty), mask=inside[:, None, None] & valid)


def _launch(pred: Tensor, images: Tensor, patch: list[int], norm: int, kind: int, beta: float, **flags: bool):
    """Options that both kernels share, and the patches a program takes.

    One warp up to 512 padded values, then 16 values a thread, so a patch of 16 x 16 x 3 keeps two warps busy with
    16 pixels and 16 predictions each, all loads in flight before the first reduction.
    """
    channels, (pt, ph, pw) = images.shape[1], patch
    c_pad, pix = power(channels), power(pt * ph * pw)
    if c_pad * pix > MAX_PATCH:
        raise ValueError(
            f"patch_loss: the Triton kernel takes patches of up to {MAX_PATCH} values (channels and pixels each"
            f" rounded up to a power of two), got {channels} x {pt * ph * pw}"
        )
    rows = max(1, 512 // (c_pad * pix))
    warps = max(1, min(32, rows * c_pad * pix // 512))
    options = dict(
        PT=pt,
        PH=ph,
        PW=pw,
        C=channels,
        C_PAD=c_pad,
        PIX=pix,
        NORM=norm,
        SMOOTH_L1=kind == 1,
        WIDE=images.numel() // max(1, images.shape[0]) > INT32,
        ROWS=rows,
        num_warps=warps,
        **flags,
        **OPTIONS,
    )
    scalars = (*images.shape[1:], float(beta), 1.0 / beta if beta else 0.0)
    return scalars, rows, options


def patch_loss(
    pred: Tensor,
    images: Tensor,
    index: Tensor,
    patch: list[int],
    packed: bool,
    channels_first: bool,
    norm: int,
    kind: int,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """pred [M, K] or [B*N, K], images [B, C, T, H, W] -> loss [M], stats [M, G, 2], both float32.

    Reads M*K predictions and M*K pixels once. Lines of `pw` pixels are whole 32-byte sectors where pw * itemsize
    is a multiple of 32; predictions in (pixel, channel) order are read by the same warps line after line.
    """
    check_dtypes("patch_loss", pred, images)
    count, device = index.shape[0], pred.device
    loss = torch.empty((count,), dtype=torch.float32, device=device)
    groups = images.shape[1] if norm == NORM_VIDEOMAE else 1
    stats = torch.empty((count, groups, 2), dtype=torch.float32, device=device)
    flags = {"PACKED": bool(packed), "CHANNELS_FIRST": bool(channels_first)}
    scalars, rows, options = _launch(pred, images, patch, norm, kind, beta, **flags)
    if count:
        with guard(pred):
            patch_loss_fwd_kernel[(ceil_div(count, rows),)](
                pred, images, index, loss, stats, count, *scalars, **options
            )
    return loss, stats


def patch_loss_backward(
    grad: Tensor,
    pred: Tensor,
    images: Tensor,
    index: Tensor,
    slot: Tensor,
    stats: Tensor,
    patch: list[int],
    packed: bool,
    channels_first: bool,
    norm: int,
    kind: int,
    beta: float,
    need_images: bool,
) -> tuple[Tensor, Tensor]:
    """grad [M] -> grad_pred like pred, grad_images like images or [0].

    Reads what the forward read, writes grad_pred (and grad_images) once; unscored rows and patches are zero.
    """
    check_dtypes("patch_loss_backward", grad, pred, images)
    grad_pred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    grad_images = torch.empty(images.shape if need_images else (0,), dtype=images.dtype, device=pred.device)
    every = bool(need_images or not packed)
    count = slot.shape[0] if every else index.shape[0]
    flags = {"PACKED": bool(packed), "CHANNELS_FIRST": bool(channels_first), "NEED_IMAGES": bool(need_images)}
    scalars, rows, options = _launch(pred, images, patch, norm, kind, beta, EVERY_TOKEN=every, **flags)
    if count:
        with guard(pred):
            patch_loss_bwd_kernel[(ceil_div(count, rows),)](
                grad, pred, images, index, slot, stats, grad_pred, grad_images, count, *scalars, **options
            )
    return grad_pred, grad_images


OPS = {"patch_loss": patch_loss, "patch_loss_backward": patch_loss_backward}
