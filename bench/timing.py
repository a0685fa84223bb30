"""Fair clocks: every variant is timed in every round, over inputs that do not fit the cache.

On a CPU a sample is a few calls between two readings of the host clock. On a GPU it is the replay of a CUDA graph
that holds one call for each input set, between two events, so that neither launch gaps nor a warm L2 count.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[int], object]  # runs the variant on input set number i


class HostSampler:
    """Seconds a call, by the host clock; `inner` calls a sample."""

    note: str | None = None

    def __init__(self, call: Call, sets: int, target: float = 2e-3, warmup: float = 0.05):
        self.call, self.sets, self.next = call, sets, 0
        seconds = []
        start = time.perf_counter()
        while len(seconds) < max(3, sets) or (time.perf_counter() - start < warmup and len(seconds) < 1000):
            seconds.append(self._run(1))
        self.inner = max(1, round(target / statistics.median(seconds[1:])))

    def _run(self, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self.call(self.next)
            self.next = (self.next + 1) % self.sets
        return time.perf_counter() - start

    def __call__(self) -> float:
        return self._run(self.inner) / self.inner


class GraphSampler:
    """Seconds a call on the GPU: a graph of one call for each input set, replayed `inner` times between events.

    Where a variant cannot be captured (it reads back from the device, say), plain launches are timed instead and
    `note` says so: such a figure contains the gaps between launches.
    """

    def __init__(self, call: Call, sets: int, target: float = 2e-3):
        self.sets, self.note = sets, None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in [*range(sets), *range(sets)]:
                call(i)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        try:
            self.graph = torch.cuda.CUDAGraph()
            # All outputs live until the capture ends: one buffer written over and over would stay in L2.
            outputs = []
            with torch.cuda.graph(self.graph):
                for i in range(sets):
                    outputs.append(call(i))
            del outputs
            self.replay = self.graph.replay
        except Exception as error:
            self.note = f"not captured as a graph ({type(error).__name__}): launch gaps included"
            torch.cuda.synchronize()
            self.replay = lambda: [call(i) for i in range(sets)] and None
        self.inner = 1
        for _ in range(3):
            once = self._run(1)
        self.inner = max(1, round(target / once))

    def _run(self, count: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            self.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def __call__(self) -> float:
        return self._run(self.inner) / (self.inner * self.sets)


def sampler(call: Call, sets: int, device: str, warmup: float = 0.05) -> HostSampler | GraphSampler:
    return GraphSampler(call, sets) if device == "cuda" else HostSampler(call, sets, warmup=warmup)


def interleave(samplers: dict[str, Callable[[], float]], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """One sample of each in every round, in shuffled order, so that drift of the machine hits all alike."""
    order = list(samplers)
    shuffle = random.Random(seed).shuffle
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                samples[name].append(samplers[name]())
    finally:
        if enabled:
            gc.enable()
    return samples


def ratio(peer: list[float], ours: list[float]) -> float:
    """How many times longer the peer takes: the median over rounds of the two times of one round."""
    return statistics.median(a / b for a, b in zip(peer, ours, strict=True))


def quartiles(samples: list[float]) -> tuple[float, float]:
    if len(samples) < 2:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def copy_bandwidth(device: str, rounds: int = 9) -> float:
    """Bytes a second of a large copy on the device, read plus written: the ceiling of a memory-bound op."""
    size = (1 if device == "cuda" else 0.25) * 2**30
    source = torch.empty(int(size) // 4, device=device).normal_()
    target = torch.empty_like(source)
    clock = sampler(lambda i: target.copy_(source), 1, device)
    return 2 * size / statistics.median(clock() for _ in range(rounds))
