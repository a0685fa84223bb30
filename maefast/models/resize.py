"""Weights for another image: position tables of another grid, patches of another size, another number of channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.nn.positions import sincos_2d

Grid = tuple[int, int]
_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)


def sincos_grid(table: Tensor, prefix: int = 1) -> Grid | None:
    """The grid (rows, columns) whose sine-cosine table this is, up to the rounding of any dtype; None if of none.

    Args:
        table: [1, prefix + N, D], the prefix's rows zero.
    """
    if table.ndim != 3 or table.shape[0] != 1 or table.is_meta or not table.is_floating_point():
        return None
    rows = table[0].float()
    count, width = rows.shape[0] - prefix, rows.shape[1]
    if width < 4 or width % 4 or count < 1:
        return None
    for height in (n for n in range(1, count + 1) if count % n == 0):
        grid = height, count // height
        ours = sincos_2d(width, grid, prefix).to(rows)
        # Also where the file went through 16 bits once, whatever its dtype is now.
        if any((rows - ours.to(dtype).float()).abs().max() <= 1e-5 for dtype in _ROUNDED):
            return grid
    return None


def resize_positions(table: Tensor, old: Grid, new: Grid, prefix: int = 1) -> Tensor:
    """A learned table [1, prefix + N, D] of the grid `old` for the grid `new`: bicubic; rows of the prefix stay.

    Shrinking filters first (antialiasing), as timm and FlexiViT do.
    """
    if tuple(old) == tuple(new):
        return table
    cells = table[:, prefix:].to(torch.promote_types(table.dtype, torch.float32))
    cells = cells.reshape(1, *old, -1).permute(0, 3, 1, 2)
    cells = F.interpolate(cells, size=new, mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([table[:, :prefix], cells.permute(0, 2, 3, 1).flatten(1, 2).to(table)], 1)


def resize_patches(weight: Tensor, size: Grid, mode: str = "bilinear") -> Tensor:
    """A patch embedding [D, C, ph, pw] for patches of `size`, by the pseudo-inverse of resizing; `mode` "bilinear" or,
    as timm does, "bicubic".

    Enlarged patches, embedded with the result, give what the original ones gave (FlexiViT, Beyer et al., 2023, eq. 3);
    for smaller ones it is the least-squares fit.
    """
    old = tuple(weight.shape[2:])
    if old == tuple(size):
        return weight
    pixels = torch.eye(old[0] * old[1], dtype=torch.float64).reshape(-1, 1, *old)
    # Bicubic always with the filter, whose cubic is another one than that without, as in timm.
    filtered = mode == "bicubic" or size[0] < old[0] or size[1] < old[1]
    resized = F.interpolate(pixels, size=size, mode=mode, align_corners=False, antialias=filtered)
    back = torch.linalg.pinv(resized.flatten(1))  # [new, old]: of B^T, where B resizes a patch
    flat = weight.flatten(2).double() @ back.T.to(weight.device)
    return flat.to(weight.dtype).reshape(*weight.shape[:2], *size)


def change_channels(weight: Tensor, channels: int) -> Tensor:
    """The first layer of a network, [D, C, ...], for images of another number of channels.

    Fewer: summed in turn (to one: all of them). More: repeated in turn, each divided by how often it is there. So an
    image whose channels are alike gives the same response as before.
    """
    old = weight.shape[1]
    if old == channels:
        return weight
    out = weight.new_zeros(weight.shape[0], channels, *weight.shape[2:])
    for channel in range(max(old, channels)):
        times = len(range(channel % old, channels, old)) if channels > old else 1
        out[:, channel % channels] += weight[:, channel % old] / times
    return out
