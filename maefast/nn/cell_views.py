"""Values that several `Cells` share, as views of a tensor do: what one changes in place, the others see.

Without memory that is written to: the ops of maefast keep what they gave away for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Part = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]  # how to take it, how to put it back


class Shared:
    """The values of the cells that views were first taken of."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.version = rows, 0

    def take(self, parts: tuple[Part, ...]) -> Tensor:
        rows = self.rows
        for take, _ in parts:
            rows = take(rows)
        return rows

    def put(self, parts: tuple[Part, ...], new: Tensor) -> None:
        self.rows, self.version = _put(self.rows, parts, new), self.version + 1


def _put(rows: Tensor, parts: tuple[Part, ...], new: Tensor) -> Tensor:
    if not parts:
        return new
    (take, put), *rest = parts
    return put(rows, _put(take(rows), tuple(rest), new))


def channels(part: slice) -> Part:
    """Some of the channels."""
    return (
        lambda rows: rows[..., part],
        lambda rows, new: torch.slice_scatter(rows, new, -1, part.start, part.stop, part.step or 1),
    )
