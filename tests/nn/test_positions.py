"""Sine-cosine tables against an independent formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from maefast.nn import sincos_1d, sincos_2d, sincos_3d, sincos_interleaved


def formula(width, rows, columns, prefix):
    """Element by element from the definition."""
    table = np.zeros((prefix + rows * columns, width))
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                w = 1 / 10000 ** (i / quarter)
                n = prefix + row * columns + column
                table[n, i] = math.sin(column * w)
                table[n, quarter + i] = math.cos(column * w)
                table[n, 2 * quarter + i] = math.sin(row * w)
                table[n, 3 * quarter + i] = math.cos(row * w)
    return table


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (2, 5), (5, 2), (1, 7)])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_table(rows, columns, prefix):
    table = sincos_2d(16, (rows, columns), prefix)
    assert table.dtype is torch.float32
    np.testing.assert_allclose(table.numpy(), formula(16, rows, columns, prefix), atol=1e-7)


def test_three_dimensions():
    grid, third = (2, 3, 4), torch.arange(4) / 4
    table = sincos_3d(24, grid, 1)
    assert table.shape == (25, 24)
    assert not table[0].any()
    for place in np.ndindex(grid):
        angles = [index / 10000**third for index in place]
        want = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())])
        torch.testing.assert_close(table[1 + np.ravel_multi_index(place, grid)], want, rtol=0, atol=1e-6)
    for width, size in ((8, grid), (24, (2, 0, 2))):
        with pytest.raises(ValueError, match=r"multiple of 6|non-empty grid"):
            sincos_3d(width, size)


def test_one_dimension():
    table = sincos_1d(4, torch.tensor([0.0, 2.0]))
    want = [[0, 0, 1, 1], [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]]
    torch.testing.assert_close(table, torch.tensor(want, dtype=torch.float64))


def test_interleaved():
    table = sincos_interleaved(4, 3, prefix=2)
    want = [[0.0] * 4] * 2 + [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in range(3)]
    torch.testing.assert_close(table, torch.tensor(want), rtol=0, atol=1e-7)


def test_refusals():
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(6, (2, 2))
    with pytest.raises(ValueError, match="grid"):
        sincos_2d(8, (0, 2))
    with pytest.raises(ValueError, match="even width"):
        sincos_1d(3, torch.zeros(1))
