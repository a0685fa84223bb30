"""Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019): each sample of a batch with its partner from the other end
of it, all by one draw, as timm does it by default."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def soft_targets(labels: Tensor, classes: int, smoothing: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B] -> [B, classes]: 1 - smoothing at the class, and smoothing shared by all classes, it included."""
    off = smoothing / classes
    made = torch.full((len(labels), classes), off, dtype=dtype, device=labels.device)
    return made.scatter_(1, labels[:, None], 1.0 - smoothing + off)


def mix(
    images: Tensor, targets: Tensor, rng: np.random.Generator, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """images [B, C, H, W] and targets [B, K], mixed with themselves in reverse order.

    Args:
        mixup, cutmix: parameters alpha of Beta(alpha, alpha), which the share of a sample in its mixture is drawn from;
            0 leaves that kind out. With both, each has half of the batches.
    """
    if not (mixup or cutmix):
        return images, targets
    cut = bool(cutmix) and (not mixup or rng.random() < 0.5)
    share = float(rng.beta(cutmix, cutmix) if cut else rng.beta(mixup, mixup))
    if cut:
        top, bottom, left, right = box(images.shape[2], images.shape[3], share, rng)
        share = 1.0 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    else:
        mixed = images * share + images.flip(0) * (1.0 - share)
    return mixed, targets * share + targets.flip(0) * (1.0 - share)


def box(height: int, width: int, share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a box of 1 - share of the area, its centre anywhere, cut off at the edges."""
    side = math.sqrt(1.0 - share)
    found = []
    for size in (height, width):
        cut, centre = int(size * side), int(rng.integers(size))
        found += [min(max(centre - cut // 2, 0), size), min(max(centre + cut // 2, 0), size)]
    return tuple(found)
