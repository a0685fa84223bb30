"""Patches of images and clips as rows, back again, and pictures of what is predicted of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maefast.ops import TokenMask
from maefast.ops.embed import as_volume, patch_grid
from maefast.ops.loss import EPS, NORMS


class Reconstruction(NamedTuple):
    """Pictures in the shape and scale of the images or clips that were given; `mask` is bool, True where removed.
    `pasted` is the original with the removed parts of the `reconstruction`."""

    original: Tensor
    masked: Tensor
    reconstruction: Tensor
    pasted: Tensor
    mask: Tensor


def patchify(images: Tensor, patch: tuple[int, ...]) -> Tensor:
    """[B, C, (T,) H, W] -> [B, N, K], patches row-major, values of a patch in (pt, ph, pw, C) order."""
    (pt, ph, pw), (gt, gh, gw) = patch_grid(images, patch)
    batch, channels = images.shape[:2]
    blocks = as_volume(images).reshape(batch, channels, gt, pt, gh, ph, gw, pw)
    return blocks.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(batch, gt * gh * gw, pt * ph * pw * channels)


def unpatchify(rows: Tensor, patch: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """The inverse of `patchify` for images of `size` (H, W) or (T, H, W): [B, N, K] -> [B, C, (T,) H, W]."""
    (pt, ph, pw), (t, h, w) = ((*(1,) * (3 - len(given)), *given) for given in (patch, size))
    blocks = rows.reshape(-1, t // pt, h // ph, w // pw, pt, ph, pw, rows.shape[-1] // (pt * ph * pw))
    return blocks.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(rows), -1, *size)


def statistics(rows: Tensor, norm: str, channels: int) -> tuple[Tensor, Tensor]:
    """(shift, scale) of patches [..., K], in (pt, ph, pw, C) order, with which `norm` of `ops.patch_loss` normalises
    them: target = (row - shift) / scale."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if norm == "none":
        return torch.zeros_like(rows), torch.ones_like(rows)
    if norm == "videomae":
        values = rows.unflatten(-1, (-1, channels))
        scale = values.var(-2, keepdim=True).sqrt() + EPS
        return tuple(t.expand_as(values).flatten(-2) for t in (values.mean(-2, keepdim=True), scale))
    scale = (rows.var(-1, keepdim=True, correction=0 if norm == "layernorm" else 1) + EPS).sqrt()
    return rows.mean(-1, keepdim=True), scale


def frame_differences(rows: Tensor, patch: tuple[int, int, int], frames: int, group: int, back: bool = False) -> Tensor:
    """Of each group of frames of a clip, all but the first become what they differ by from it (HiCMAE, Sun et al.,
    2024): [B, T' * S, K] -> the same shape, with K in (pt, ph, pw, C) order and S positions of each of T' tubelets in
    time, the same ones in each. `back`: the way back, from differences to frames.

    Args:
        patch: (pt, ph, pw). frames: T = T' * pt. group: frames of a group, divides T.
    """
    pt = patch[0]
    if frames % pt or rows.shape[1] % (frames // pt) or group < 1 or frames % group:
        raise ValueError(f"{frames} frames of tubelets of {pt} do not make {rows.shape[1]} rows and groups of {group}")
    each = rows.unflatten(1, (frames // pt, -1)).unflatten(3, (pt, -1)).transpose(2, 3)  # [B, T', pt, S, K / pt]
    each = each.flatten(1, 2).unflatten(1, (-1, group))
    first, others = each[:, :, :1], each[:, :, 1:]
    each = torch.cat([first, others + first if back else others - first], 2)
    return each.flatten(1, 2).unflatten(1, (-1, pt)).transpose(2, 3).flatten(3).flatten(1, 2)


def reconstruct(
    pred: Tensor,
    images: Tensor,
    plan: TokenMask,
    patch: tuple[int, ...],
    norm: str = "none",
    fill: float = 0.0,
) -> Reconstruction:
    """Pictures of predictions of the masked patches.

    Args:
        pred: in plan order, [B, masked, K] or packed [M, K]. images: [B, C, (T,) H, W], what was to be predicted.
        norm: of the targets. Normalised predictions are put back with the mean and standard deviation of the true
            patch, so such pictures show texture, not how well brightness is guessed.
        fill: of removed pixels in `masked`, in the scale of the images. Absent patches count as removed there, and are
            not predicted.
    """
    true = patchify(images, patch)
    flat, index = true.reshape(-1, true.shape[-1]), plan.masked.long()
    shift, scale = (part.expand_as(true).reshape(flat.shape)[index] for part in statistics(true, norm, images.shape[1]))
    rows = flat.clone()
    rows[index] = (pred.reshape(-1, pred.shape[-1]) * scale + shift).to(rows.dtype)
    size, removed = tuple(images.shape[2:]), (plan.slot < 0).view(*true.shape[:2], 1).expand_as(true)
    shown = plan.mask[..., None].expand_as(true)
    picture, removed, shown = (unpatchify(t, patch, size) for t in (rows.view_as(true), removed, shown))
    return Reconstruction(
        original=images,
        masked=images.masked_fill(removed, fill),
        reconstruction=picture.masked_fill(~shown, fill),
        pasted=torch.where(shown, picture, images.masked_fill(removed & ~shown, fill)),
        mask=removed,
    )
