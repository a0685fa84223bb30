"""Padding of `Cells` by itself (``F.pad``, nn.ZeroPad2d, the one-sided "same" padding of TensorFlow's networks).

A padded map has no cells, so the padding waits for the convolution or pooling that it is meant for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.nn.cell_elementwise import handles
from maefast.nn.cells import Cells, UnknownSparseArgument, UnknownSparseOp, where

Sides = tuple[int, int, int, int]  # left, right, top, bottom, as in F.pad


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
        batch, channels, height, width = self.cells.shape
        left, right, top, bottom = self.sides
        return torch.Size((batch, channels, height + top + bottom, width + left + right))

    def padded_map(self) -> Tensor:
        return F.pad(self.cells.dense(), self.sides, value=self.value)


@handles(F.pad)
def pad(input: Cells, pad, mode="constant", value=None) -> Cells:
    """Zeros (or -inf, for a maximum) around the map; zeros behind or before its channels."""
    if input.channels_last or isinstance(input, PaddedCells) or mode != "constant" or min(pad) < 0 or len(pad) > 6:
        raise UnknownSparseArgument(f"{where()}cells (B, C, H, W) are padded once, outwards, by a constant")
    value, pad = value or 0.0, tuple(pad) + (0,) * (6 - len(pad))
    out = input.like(F.pad(input.rows, pad[4:], value=value)) if any(pad[4:]) else input
    return PaddedCells(out, pad[:4], value) if any(pad[:4]) else out


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
    padding, dilation = (v if isinstance(v, (tuple, list)) else (v, v) for v in (padding, dilation))
    left, right, top, bottom = x.sides
    taps, sides = [], []
    for (first, last), own, step in zip(((top, bottom), (left, right)), padding, dilation):
        if (first - last) % step:
            raise UnknownSparseArgument(f"{where()}a border of {first} and {last} sites at a dilation of {step}")
        sides.append(max(first, last) + own)
        taps.append((max(0, last - first) // step, max(0, first - last) // step))
    return x.cells, F.pad(weight, (*taps[1], *taps[0])), tuple(sides)
