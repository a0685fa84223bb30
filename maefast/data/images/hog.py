"""Histograms of oriented gradients of whole batches, as targets (Dalal and Triggs, CVPR 2005; MaskFeat, Wei et al.,
CVPR 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maefast.ops import _checks


def hog(images: Tensor, bins: int = 9, cell: int = 8) -> Tensor:
    """Histograms of each channel and cell: [B, C, H, W] -> [B, C, H / cell, W / cell, bins], not normalised.

    Gradients are central differences, zero at the border; each pixel gives its whole magnitude to one of `bins` equal
    parts of 180 degrees, by the angle atan2(down, across) without its sign, and a cell is the mean over its pixels.

    Args:
        images: integers, or floating point of integer values: noise in a gradient that should be zero turns its angle.
            Integers are computed in float32.

    Raises:
        ValueError: H or W is no multiple of `cell`.
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise TypeError(f"images must be a tensor [B, C, H, W], got {getattr(images, 'shape', type(images).__name__)}")
    _checks.integer("bins", bins, 1)
    _checks.integer("cell", cell, 1)
    height, width = images.shape[2:]
    if height % cell or width % cell:
        raise ValueError(f"images of {height} x {width} pixels are no multiple of a cell of {cell}")
    x = images if images.is_floating_point() else images.float()
    down, across = torch.zeros_like(x), torch.zeros_like(x)
    down[:, :, 1:-1] = x[:, :, 2:] - x[:, :, :-2]
    across[..., 1:-1] = x[..., 2:] - x[..., :-2]
    part = torch.floor((torch.atan2(down, across) % math.pi) * (bins / math.pi)).long() % bins
    votes = torch.hypot(down, across)
    # One pass for each bin: a one-hot map of all of them would be `bins` times as large as the images.
    shape = (*x.shape[:2], height // cell, cell, width // cell, cell)
    return torch.stack([torch.where(part == k, votes, 0).view(shape).mean((3, 5)) for k in range(bins)], -1)
