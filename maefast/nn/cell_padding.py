"""Padding of `Cells` by itself (``F.pad``, nn.ZeroPad2d, the one-sided "same" padding of TensorFlow's networks).

A padded map has no cells, so the padding waits for the convolution or pooling that it is meant for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.nn.cell_elementwise import handles
from maefast.nn.cells import Cells, UnknownSparseArgument, UnknownSparseOp, where

Sides = tuple[int, ...]  # left, right, top, bottom, of volumes front and back, too: as in F.pad


class PaddedCells(Cells):
    """A map with a border around it. Only convolutions and pooling take it: it has no `rows`."""

    def __init__(self, cells: Cells, sides: Sides, value: float) -> None:
        self.__dict__.update(cells.__dict__)
        self.cells, self.sides, self.value, self._norm = cells, sides, value, None

    @property
    def rows(self) -> Tensor:
        raise UnknownSparseOp(f"{where()}of a map that was padded first: only a convolution or pooling may come next")

    @property
    def shape(self) -> torch.Size:
        batch, channels, *sites = self.cells.shape
        more = (before + after for before, after in reversed(pairs(self.sides)))
        return torch.Size((batch, channels, *(size + n for size, n in zip(sites, more))))

    def padded_map(self) -> Tensor:
        return F.pad(self.cells.dense(), self.sides, value=self.value)


@handles(F.pad)
def pad(input: Cells, pad, mode="constant", value=None) -> Cells:
    """Zeros (or -inf, for a maximum) around the map; zeros behind or before its channels."""
    sides = 2 * len(input.site_dims)
    outwards = mode == "constant" and min(pad) >= 0 and len(pad) <= sides + 2
    if input.channels_last or isinstance(input, PaddedCells) or not outwards:
        raise UnknownSparseArgument(f"{where()}cells {input.layouts[0]} are padded once, outwards, by a constant")
    value, pad = value or 0.0, tuple(pad) + (0,) * (sides + 2 - len(pad))
    # A copy, as torch's is: what the padding waits for may come after a change in place.
    out = input.like(F.pad(input.rows, pad[sides:], value=value) if any(pad[sides:]) else input.rows)
    return PaddedCells(out, pad[:sides], value) if any(pad[:sides]) else out


def pairs(sides: Sides) -> list[tuple[int, int]]:
    """(before, after) of every side, the last one of the map first."""
    return list(zip(sides[::2], sides[1::2]))


def merged(x: Cells, weight: Tensor, padding, dilation) -> tuple[Cells, Tensor, object]:
    """The cells, weight and padding of a convolution that takes the border of `x` into its own.

    Where the two sides differ, taps of zeros are put before or behind the kernel until they are the same.
    """
    if not isinstance(x, PaddedCells):
        return x, weight, padding
    if padding == "valid":
        padding = 0
    if x.value != 0.0 or isinstance(padding, str):
        raise UnknownSparseArgument(
            f"{where()}a convolution of padded cells takes a border of zeros, padding in numbers"
        )
    count = len(x.site_dims)
    padding, dilation = (v if isinstance(v, (tuple, list)) else (v,) * count for v in (padding, dilation))
    taps, sides = [], []
    for (first, last), own, step in zip(reversed(pairs(x.sides)), padding, dilation):
        if (first - last) % step:
            raise UnknownSparseArgument(f"{where()}a border of {first} and {last} sites at a dilation of {step}")
        sides.append(max(first, last) + own)
        taps.append((max(0, last - first) // step, max(0, first - last) // step))
    return x.cells, F.pad(weight, tuple(n for both in reversed(taps) for n in both)), tuple(sides)
