"""Shares of right answers, and which samples they are counted on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from maefast import seeds

_Z = 1.959963984540054  # of 95 %


@dataclass(frozen=True)
class Accuracy:
    """`hits` of `count` answers were right. low, high: the 95 % interval for the share (Wilson, 1927)."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Unlike the normal approximation it stays within 0 and 1 and has a width where all answers are right."""
        n, share, square = self.count, self.value, _Z**2
        centre = (share + square / (2 * n)) / (1 + square / n)
        half = _Z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
        low, high = centre - half, centre + half  # exactly 0 and 1 at these shares, but for rounding
        return low if self.hits else 0.0, high if self.hits < n else 1.0

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:6.1%} ({low:.1%} to {high:.1%})"

    def to_dict(self) -> dict[str, float | int | list[float]]:
        return {"accuracy": self.value, "interval": list(self.interval), "hits": self.hits, "count": self.count}


def accuracy(found: np.ndarray, true: np.ndarray) -> Accuracy:
    """Of answers, ints [n], held against the truth."""
    return Accuracy(int((found == true).sum()), len(true))


def majority(train: np.ndarray, test: np.ndarray) -> Accuracy:
    """What always answering the most frequent class of the training part would get."""
    return accuracy(np.full_like(test, np.bincount(train).argmax()), test)


def split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training part, held back) as sorted indices: of each class `share`, rounded, is held back, at least one sample
    and never all. A class of one sample is in the training part alone. A function of (labels, share, seed)."""
    rng, held = seeds.generator(seed, seeds.PROBE), []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) > 1:
            held.append(members[: min(len(members) - 1, max(1, round(share * len(members))))])
    test = np.sort(np.concatenate(held)) if held else np.zeros(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), test), test
