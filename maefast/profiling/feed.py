"""The batches of a step that is measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader


class Feed:
    """Batches one after the other, from the start again when they end.

    Args:
        data: None: there are none, and a step takes no argument.
        ahead: how many lie ready; None: as many as a DataLoader loads ahead.
    """

    def __init__(self, data: Iterable[Any] | None, ahead: int | None = None) -> None:
        self.data = data
        if ahead is None and isinstance(data, DataLoader):
            ahead = data.num_workers * (data.prefetch_factor or 0)
        self.ahead = ahead or 0
        self._batches: Iterator[Any] | None = None

    def take(self) -> tuple[Any, ...]:
        """Arguments of a step. ValueError: there is no batch."""
        if self.data is None:
            return ()
        for _ in range(2):
            if self._batches is None:
                self._batches = iter(self.data)
            try:
                return (next(self._batches),)
            except StopIteration:
                self._batches = None
        raise ValueError("data has no batch (or is an iterator that ended: give one that can start again)")

    def drain(self) -> None:
        """Take what lies ready, so that from now on a step waits as long as it would in the middle of a run."""
        for _ in range(self.ahead):
            self.take()
