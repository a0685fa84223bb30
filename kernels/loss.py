"""Triton kernels of the loss family: pixels of masked patches are read once, straight from the image.

A tile is [patches, channels, pixels of a patch], the last two rounded up to powers of two. The whole patch is in
registers, so mean, variance (two passes) and distance cost no further memory traffic; nothing is materialised. The
backward that needs no sums over a patch goes by elements of the predictions instead, where that widens its accesses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import ABSENT, INT32, OPTIONS, ceil_div, check_dtypes, guard, power

NORM_NONE, NORM_MAE, NORM_VIDEOMAE, NORM_LAYERNORM = 0, 1, 2, 3
MAX_PATCH = 32768  # padded values of one patch: 32 a thread at 32 warps
FLAT = {"BLOCK": 1024, "num_warps": 4}  # by elements: 8 a thread, one 16-byte access in 16 bits


@triton.jit
def patch_corner(flat, channels, frames, height, width, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """Offset of the first pixel of each of the patches `flat` in the images, int64."""
    gw = width // PW
    gh = height // PH
    tokens = frames // PT * gh * gw
    b = (flat // tokens).to(tl.int64)
    n = flat % tokens
    corner = (n // (gh * gw) * PT).to(tl.int64) * height + n // gw % gh * PH
    return b * channels * frames * height * width + corner * width + n % gw * PW


@triton.jit
def pixel_inside(pixel, c, frames, height, width, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr):
    """Offset of a pixel in channel c from the first of its patch."""
    if WIDE:
        pixel = pixel.to(tl.int64)
        c = c.to(tl.int64)
    line = (pixel // (PH * PW) * height + pixel // PW % PH) * width + pixel % PW
    return c * frames * height * width + line


@triton.jit
def pixel_offsets(
    flat, channels, frames, height, width, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C_PAD, PIX, WIDE
):
    """Offsets into the images of the patches `flat`, [R, C_PAD, PIX]."""
    corner = patch_corner(flat, channels, frames, height, width, PT, PH, PW)
    pixel = tl.arange(0, PIX)[None, :]
    c = tl.arange(0, C_PAD)[:, None]
    inside = pixel_inside(pixel, c, frames, height, width, PH, PW, WIDE)
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
def distance_slope(d, beta, inverse_beta, SMOOTH_L1: tl.constexpr):
    if SMOOTH_L1:
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
        return tl.where(tl.abs(d) < beta, d * inverse_beta, tl.where(d != d, d, sign))
    else:
        return 2.0 * d


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
        s = tl.load(slot + item, mask=inside, other=0)
        m = -s.to(tl.int64) - 1
        scored = inside & (m >= 0) & (s != ABSENT)
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
    d = distance_slope(d, beta, inverse_beta, SMOOTH_L1)
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


@triton.jit
def patch_loss_bwd_flat_kernel(
    grad, pred, images, index, slot, stats, grad_pred, elements, channels, frames, height, width, beta, inverse_beta,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr,
    SMOOTH_L1: tl.constexpr, EVERY_TOKEN: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of predictions in (pixel, channel) order alone, element by element in the order of memory: 16-byte
    accesses of the predictions and their gradient, where a tile of channel planes has 2-byte ones. Pixels are gathered
    a value at a time, from lines that the neighbouring threads read too."""
    K: tl.constexpr = PT * PH * PW * C
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    item = element // K
    k = (element % K).to(tl.int32)
    pixel = k // C
    c = k % C
    if EVERY_TOKEN:
        flat = item.to(tl.int32)
        s = tl.load(slot + item, mask=inside, other=0)
        m = -s.to(tl.int64) - 1
        scored = inside & (m >= 0) & (s != ABSENT)
    else:
        flat = tl.load(index + item, mask=inside, other=0)
        m = item
        scored = inside

    source = patch_corner(flat, channels, frames, height, width, PT, PH, PW)
    source += pixel_inside(pixel, c, frames, height, width, PH, PW, WIDE)
    target = tl.load(images + source, mask=scored, other=0.0).to(tl.float32)
    value = tl.load(pred + element, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(grad + m, mask=scored, other=0.0).to(tl.float32) / K
    if NORM != 0:
        group = (m * C + c) * 2 if NORM == 2 else m * 2
        mean = tl.load(stats + group, mask=scored, other=0.0)
        target = (target - mean) * tl.load(stats + group + 1, mask=scored, other=1.0)
    d = distance_slope(value - target, beta, inverse_beta, SMOOTH_L1) * slope
    tl.store(grad_pred + element, tl.where(scored, d, 0.0).to(grad_pred.dtype.element_ty), mask=inside)


def _constants(images: Tensor, patch: list[int], norm: int, kind: int, beta: float) -> tuple[tuple, dict]:
    """Scalars and compile-time constants that all kernels share."""
    pt, ph, pw = patch
    wide = images.numel() // max(1, images.shape[0]) > INT32
    scalars = (*images.shape[1:], float(beta), 1.0 / beta if beta else 0.0)
    return scalars, dict(PT=pt, PH=ph, PW=pw, C=images.shape[1], NORM=norm, SMOOTH_L1=kind == 1, WIDE=wide, **OPTIONS)


def _tile(images: Tensor, patch: list[int]) -> dict:
    """Options of the kernels that take whole patches.

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
    return {"C_PAD": c_pad, "PIX": pix, "ROWS": rows, "num_warps": max(1, min(32, rows * c_pad * pix // 512))}


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
    scalars, constants = _constants(images, patch, norm, kind, beta)
    tile = _tile(images, patch)
    order = {"PACKED": bool(packed), "CHANNELS_FIRST": bool(channels_first)}
    if count:
        with guard(pred):
            patch_loss_fwd_kernel[(ceil_div(count, tile["ROWS"]),)](
                pred, images, index, loss, stats, count, *scalars, **constants, **order, **tile
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
    scalars, constants = _constants(images, patch, norm, kind, beta)
    given = (grad, pred, images, index, slot, stats, grad_pred)
    if count == 0:
        return grad_pred, grad_images
    with guard(pred):
        if need_images or channels_first:
            tile = _tile(images, patch)
            order = {"PACKED": bool(packed), "CHANNELS_FIRST": bool(channels_first), "NEED_IMAGES": bool(need_images)}
            patch_loss_bwd_kernel[(ceil_div(count, tile["ROWS"]),)](
                *given, grad_images, count, *scalars, EVERY_TOKEN=every, **constants, **order, **tile
            )
        else:
            elements = count * pred.shape[-1]
            patch_loss_bwd_flat_kernel[(ceil_div(elements, FLAT["BLOCK"]),)](
                *given, elements, *scalars, EVERY_TOKEN=every, **constants, **FLAT
            )
    return grad_pred, grad_images


OPS = {"patch_loss": patch_loss, "patch_loss_backward": patch_loss_backward}
