"""Another view of clips on their device: another crop, flipped or not, in other colours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _checks

NUMBERS = 8  # of the noise of a clip


def jitter_clips(
    clips: Tensor,
    noise: Tensor,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    colour: float = 0.4,
) -> Tensor:
    """The same crop, flip and change of colours for all frames of a clip; a function of the noise, without a wait.

    A box covers `scale` of the area (uniformly drawn), its aspect ratio, relative to that of the frames, lies in
    `ratio` (uniformly in the logarithm), cut down to the frame where it would be larger; it is resampled bilinearly.
    Brightness, contrast (to the clip's mean grey) and saturation are multiplied, in this order, by factors in
    [1 - colour, 1 + colour], as torchvision's ColorJitter does.

    Args:
        clips: [B, 3, T, H, W] in [0, 1]. noise: [B, 8] in [0, 1). flip: how often left and right are exchanged.

    Returns:
        [B, 3, T, H, W] in [0, 1].

    Raises:
        TypeError, ValueError: shapes, or numbers outside of what they may be.
    """
    _checks.tensor("clips", clips, ndim=5)
    _checks.tensor("noise", noise, ndim=2)
    if clips.shape[1] != 3 or tuple(noise.shape) != (len(clips), NUMBERS):
        raise ValueError(
            f"clips must be [B, 3, T, H, W] and noise [B, {NUMBERS}], got {tuple(clips.shape)}, {tuple(noise.shape)}"
        )
    for name, pair, most in (("scale", scale, 1.0), ("ratio", ratio, float("inf"))):
        if not 0 < pair[0] <= pair[1] <= most:
            raise ValueError(f"{name} must rise from above 0 to at most {most}, got {tuple(pair)}")
    if not (0 <= flip <= 1 and 0 <= colour <= 1):
        raise ValueError(f"flip and colour must lie in [0, 1], got {flip} and {colour}")
    noise = noise.to(clips.dtype)
    area, aspect, left, top, mirror, *colours = noise.unbind(1)
    area = scale[0] + (scale[1] - scale[0]) * area
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** aspect
    width, height = (area * aspect).sqrt().clamp(max=1.0), (area / aspect).sqrt().clamp(max=1.0)
    way = torch.where(mirror < flip, -1.0, 1.0).to(clips.dtype)
    zero = torch.zeros_like(way)
    x, y = (2 * left - 1) * (1 - width), (2 * top - 1) * (1 - height)  # centres; the frame reaches from -1 to 1
    theta = torch.stack([torch.stack([way * width, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    flat = clips.flatten(1, 2)
    grid = F.affine_grid(theta, list(flat.shape), align_corners=False)
    out = F.grid_sample(flat, grid, mode="bilinear", padding_mode="border", align_corners=False).view_as(clips)
    bright, contrast, tint = ((1 + colour * (2 * number - 1)).view(-1, 1, 1, 1, 1) for number in colours)
    out = (out * bright).clamp(0, 1)
    out = (_grey(out).mean((2, 3, 4), keepdim=True).lerp(out, contrast)).clamp(0, 1)
    return _grey(out).lerp(out, tint).clamp(0, 1)


def _grey(clips: Tensor) -> Tensor:
    """[B, 1, T, H, W]."""
    red, green, blue = clips.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue
