"""Point clouds as pictures along the three axes, and what pictures say back at the points (I2P-MAE, Zhang et al., CVPR
2023, arXiv:2212.06785)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

VIEWS = ((0, 1, 2), (2, 0, 1), (1, 2, 0))  # axes that are rows, columns and depth of each picture
_UNIT = 2.0**40  # of fixed-point sums: any order of adding gives the same
_MARGIN = 3  # pixels that a cloud leaves free along its longer side


class Frame(NamedTuple):
    """Where the pixels of V = 3 pictures of each cloud lie.

    low: [B, V, 1, 2], the least row and column coordinates. cell: [B, V, 1, 1], how wide a pixel is. shift: int64
    [B, V, 1, 2], what moves the cloud to the middle. size: pixels of a side.
    """

    low: Tensor
    cell: Tensor
    shift: Tensor
    size: int


def view_frame(points: Tensor, size: int) -> Frame:
    """The frame of clouds [B, N, 3]: the longer side of what is seen takes size - 3 pixels, and the cloud stands in the
    middle.

    Raises:
        ValueError: points are no clouds, or pictures below 8 pixels a side.
    """
    if points.ndim != 3 or points.shape[2] != 3 or not points.is_floating_point() or not points.shape[1]:
        raise ValueError(f"points must be floating and [B, N, 3], got {points.dtype} {list(points.shape)}")
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    plane = _viewed(points)[..., :2]
    low, high = plane.amin(2, keepdim=True), plane.amax(2, keepdim=True)
    # Clouds without extent are one pixel.
    cell = ((high - low).amax(3, keepdim=True) / (size - _MARGIN)).clamp_min(torch.finfo(points.dtype).tiny)
    last = ((high - low) / cell).floor().long()
    return Frame(low, cell, size // 2 - 1 - torch.div(last + 2, 2, rounding_mode="floor"), size)


def view_pixels(points: Tensor, frame: Frame) -> Tensor:
    """Row and column of points [B, P, 3] in each picture: int64 [B, V, P, 2], within it."""
    place = ((_viewed(points)[..., :2] - frame.low) / frame.cell).floor().long()
    return (place + 1 + frame.shift).clamp(0, frame.size - 1)


def splat(points: Tensor, frame: Frame, radius: int = 2) -> Tensor:
    """Pictures [B, V, size, size]: each point adds its depth coordinate to the (2 radius + 1)^2 pixels around it, in
    64-bit fixed point, so that runs agree bit for bit on every device. Pixels beyond the border count at the border."""
    batch, size = len(points), frame.size
    depth = (_viewed(points)[..., 2].double() * _UNIT).round().long()
    around = torch.arange(-radius, radius + 1, device=points.device)
    offsets = torch.cartesian_prod(around, around)
    place = ((_viewed(points)[..., :2] - frame.low) / frame.cell).floor().long() + 1 + frame.shift
    place = (place[..., None, :] + offsets).clamp(0, size - 1)
    flat = (place[..., 0] * size + place[..., 1]).flatten(2)
    sums = torch.zeros(batch, len(VIEWS), size * size, dtype=torch.long, device=points.device)
    sums.scatter_add_(2, flat, depth[..., None].expand(-1, -1, -1, len(offsets)).flatten(2))
    return (sums.double() / _UNIT).to(points.dtype).view(batch, len(VIEWS), size, size)


def looked_at(teacher: Callable, points: Tensor, frame: Frame, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """What a frozen `maefast.nn.teachers.FeatureTeacher` says of the three pictures of each cloud, which are
    sigmoid(`splat`) in all colours, less `mean` and over `std` [3, 1, 1]: features [B, V, h, w, D] and
    attention [B, V, h, w, 1].

    Raises:
        ValueError: its patches are no square.
    """
    pictures = splat(points, frame).sigmoid()
    mean, std = mean.to(pictures), std.to(pictures)
    features, looks = teacher((pictures.flatten(0, 1)[:, None].expand(-1, 3, -1, -1) - mean) / std)
    side = math.isqrt(looks.shape[1])
    if side * side != looks.shape[1]:
        raise ValueError(f"teacher must have a square grid of patches, got {looks.shape[1]}")
    return tuple(t.reshape(*pictures.shape[:2], side, side, -1) for t in (features, looks))


def sample_maps(maps: Tensor, pixels: Tensor, size: int) -> Tensor:
    """What maps [B, V, h, w, C] say at pixels [B, V, P, 2] of pictures `size` wide: as if they were enlarged to that
    size (bicubic, as `torch.nn.functional.interpolate`) and read there, without the enlarged ones. -> [B, V, P, C], in
    float32 at least."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    rows, columns = (_enlarging(count, size, maps)[pixels[..., i]] for i, count in enumerate(maps.shape[2:4]))
    weights = rows[..., :, None] * columns[..., None, :]
    return weights.flatten(3) @ maps.flatten(2, 3)


def _enlarging(count: int, size: int, like: Tensor) -> Tensor:
    """[size, count]: what each of `size` pixels takes of each of `count` cells in a row."""
    eye = torch.eye(count, dtype=like.dtype, device=like.device)[None, :, :, None]
    return F.interpolate(eye, size=(size, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T


def _viewed(points: Tensor) -> Tensor:
    """[B, P, 3] -> [B, V, P, 3]: rows, columns and depth in each view."""
    axes = points.unbind(-1)
    return torch.stack([torch.stack([axes[i] for i in view], -1) for view in VIEWS], 1)
