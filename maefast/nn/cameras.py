"""Rays of pinhole cameras."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def first_at_rest(poses: Tensor) -> Tensor:
    """Poses [B, V, 3, 4], camera to world, in the frame in which the first camera of each scene looks along the third
    axis, as far from the origin as it was: at (0, 0, -distance)."""
    turn, place = poses[..., :3], poses[..., 3:]
    back = turn[:, :1].transpose(2, 3)
    moved = back @ (place - place[:, :1])
    moved[:, :, 2] -= place[:, :1, :, 0].norm(dim=2, keepdim=True)
    return torch.cat([back @ turn, moved], 3)


def rays_of(poses: Tensor, focals: Tensor, which: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rays through the middles of pixels.

    Args:
        poses: [B, V, 3, 4], camera to world, x right, y down, z ahead. focals: [B], in pixels.
        which: int64 [B, N], pixels, row by row, view by view. size: (height, width) of a view.

    Returns:
        Origins and directions of unit length, [B, N, 3] each.
    """
    height, width = size
    view, pixel = which // (height * width), which % (height * width)
    x, y = (pixel % width + 0.5 - width / 2), (pixel // width + 0.5 - height / 2)
    ahead = torch.stack([x / focals[:, None], y / focals[:, None], torch.ones_like(x, dtype=focals.dtype)], -1)
    chosen = poses[torch.arange(len(poses), device=poses.device)[:, None], view]  # [B, N, 3, 4]
    turned = (chosen[..., :3] @ ahead.to(poses.dtype)[..., None]).squeeze(-1)
    return chosen[..., 3], F.normalize(turned, dim=-1)
