"""Fixed sine-cosine position tables."""

from __future__ import annotations

import torch
from torch import Tensor

TEMPERATURE = 10000.0


def sincos_1d(width: int, positions: Tensor) -> Tensor:
    """``[sin(p w_0) … sin(p w_{k-1}) | cos(p w_0) … cos(p w_{k-1})]`` with ``w_i = 10000^(-i / k)``, k = width / 2.

    Args:
        width: even. positions: float64 [M].

    Returns:
        float64 [M, width] (Vaswani et al., 2017, with sines and cosines in two halves as in MoCo v3 and MAE).
    """
    if width < 2 or width % 2:
        raise ValueError(f"a sine-cosine table needs an even width, got {width}")
    half = width // 2
    omega = TEMPERATURE ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = positions.double()[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], 1)


def sincos_2d(width: int, grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """MAE's position table of a grid (He et al., 2021): first half of the width encodes the column, second the row.

    Args:
        width: a multiple of 4. grid: (rows, columns), tokens row-major. prefix: zero rows put in front (class token).

    Returns:
        float32 [prefix + rows * columns, width], computed in float64.

    Raises:
        ValueError: width not a positive multiple of 4, empty grid, negative prefix.
    """
    rows, columns = grid
    if width < 4 or width % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width that is a multiple of 4, got {width}")
    if rows < 1 or columns < 1 or prefix < 0:
        raise ValueError(f"need a non-empty grid and prefix >= 0, got grid {grid} and prefix {prefix}")
    token = torch.arange(rows * columns)
    row = torch.div(token, columns, rounding_mode="floor")
    table = torch.cat([sincos_1d(width // 2, token % columns), sincos_1d(width // 2, row)], 1)
    return torch.cat([torch.zeros(prefix, width), table.float()])


def sincos_3d(width: int, grid: tuple[int, int, int], prefix: int = 0) -> Tensor:
    """The same of a grid in three dimensions: a third of the width for each axis, the first one first.

    Args:
        width: a multiple of 6. grid: (depth, rows, columns), tokens row-major. prefix: zero rows put in front.

    Returns:
        float32 [prefix + depth * rows * columns, width], computed in float64.

    Raises:
        ValueError: width not a positive multiple of 6, empty grid, negative prefix.
    """
    if width < 6 or width % 6:
        raise ValueError(f"a 3-D sine-cosine table needs a width that is a multiple of 6, got {width}")
    if min(grid) < 1 or prefix < 0:
        raise ValueError(f"need a non-empty grid and prefix >= 0, got grid {grid} and prefix {prefix}")
    places = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    table = torch.cat([sincos_1d(width // 3, place.flatten()) for place in places], 1)
    return torch.cat([torch.zeros(prefix, width), table.float()])


def sincos_interleaved(width: int, count: int, prefix: int = 0) -> Tensor:
    """``[sin(p w_0), cos(p w_0), sin(p w_1), …]``, the table of Vaswani et al. (2017) with sines and cosines in turn,
    as VideoMAE and CAE have it: float32 [prefix + count, width], computed in float64, with `prefix` zero rows in front;
    `width` is even."""
    halves = sincos_1d(width, torch.arange(count))
    return torch.cat([torch.zeros(prefix, width), torch.stack(halves.chunk(2, 1), 2).flatten(1).float()])
