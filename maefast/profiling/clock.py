"""How long a step takes as it runs without a profiler."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .feed import Feed


@dataclass(frozen=True)
class Clock:
    """Seconds of a step: waiting for its batch (mean) and the rest (median); least and most of both; of how many."""

    steps: int
    data: float
    step: float
    spread: tuple[float, float]

    @property
    def whole(self) -> float:
        return self.data + self.step


def clocked(step: Callable[..., Any], feed: Feed, steps: int, kind: str) -> Clock:
    feed.drain()
    if kind == "cuda":
        return _together(step, feed, steps)
    waited, taken = [], []
    for _ in range(steps):
        began = time.perf_counter()
        batch = feed.take()
        got = time.perf_counter()
        step(*batch)
        taken.append(time.perf_counter() - got)
        waited.append(got - began if batch else 0.0)
    both = [sum(pair) for pair in zip(waited, taken)]
    return Clock(steps, statistics.fmean(waited), statistics.median(taken), (min(both), max(both)))


def _together(step: Callable[..., Any], feed: Feed, steps: int, rounds: int = 3) -> Clock:
    """Steps that follow each other without waiting for the device, as in a run; `rounds` times."""
    waited, taken = [], []
    for _ in range(rounds):
        waits = 0.0
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            before = time.perf_counter()
            batch = feed.take()
            waits += time.perf_counter() - before if batch else 0.0
            step(*batch)
        torch.cuda.synchronize()
        whole = (time.perf_counter() - began) / steps
        waited.append(waits / steps)
        taken.append(whole - waits / steps)
    both = [sum(pair) for pair in zip(waited, taken)]
    return Clock(steps, statistics.fmean(waited), statistics.median(taken), (min(both), max(both)))
