"""How long a step takes before and after, in turn, and how much memory it wants."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from maefast.profiling import attribution, calls, places

ROUNDS = 3, 200  # at least, at most
SAMPLE = 0.02  # seconds that a sample should take

Step = Callable[[], object]


@dataclass(frozen=True)
class Speed:
    """As it is and accelerated, in this order.

    Attributes:
        seconds: of a step, the medians. ratio: how many times longer the step as it is takes, the median over rounds of
            the two times of one round. spread: the quartiles of that. rounds: how many.
        memory: bytes that a step takes at most above what was held before it, gradients included.
    """

    seconds: tuple[float, float]
    ratio: float
    spread: tuple[float, float]
    rounds: int
    memory: tuple[int, int]


def measure(steps: tuple[Step, Step], models: tuple[nn.Module, nn.Module], seconds: float, device: str) -> Speed:
    """seconds: after which no further round starts, once there are three. Each step is called on its own model."""
    first, second = _in_turn(steps, seconds, device)
    ratios = [a / b for a, b in zip(first, second)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    medians = statistics.median(first), statistics.median(second)
    memory = tuple(peak(step, model, device) for step, model in zip(steps, models))
    return Speed(medians, statistics.median(ratios), (low, high), len(ratios), memory)


def _in_turn(steps: tuple[Step, Step], seconds: float, device: str) -> tuple[list[float], list[float]]:
    """Seconds of a call of each in each round; the order changes from round to round."""
    once = [[seconds_of(step, 1, device) for step in steps] for _ in range(2)][-1]  # the first calls fill caches
    inner = max(1, round(SAMPLE / min(once)))
    samples: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.perf_counter() - began > seconds:
            break
        for at in (0, 1) if done % 2 == 0 else (1, 0):
            samples[at].append(seconds_of(steps[at], inner, device))
    return samples


def seconds_of(step: Step, count: int = 1, device: str = "cpu") -> float:
    """Seconds of one of `count` calls; on a GPU from when it was idle until it is idle again."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def peak(step: Step, model: nn.Module, device: str) -> int:
    """Bytes, by what torch's profiler sees of its allocator."""
    recorded = calls.read(calls.recorded(step, device))
    account = attribution.account(recorded, places.Places(model), calls.FREE)
    return attribution.memory(account, device).peak
