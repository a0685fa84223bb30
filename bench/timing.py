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
ENOUGH = 0.5  # seconds after which no further input set is tried before timing
LEAST = 5  # rounds, however long they take


class HostSampler:
    """Seconds a call, by the host clock; `inner` calls a sample.

    Before the first sample every input set is tried once, and calls go on for `warmup` seconds; three calls are all
    that there are where they take longer than `ENOUGH`. The first of them does not count.
    """

    note: str | None = None

    def __init__(self, call: Call, sets: int, target: float = 2e-3, warmup: float = 0.05):
        self.call, self.sets, self.next = call, sets, 0
        seconds = []
        start = time.perf_counter()
        took = 0.0
        while len(seconds) < 3 or (took < warmup and len(seconds) < 1000) or (took < ENOUGH and len(seconds) < sets):
            seconds.append(self._run(1))
            took = time.perf_counter() - start
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

    What waits for the device cannot be captured, and an attempt would leave the process unable to work: such a variant
    (`waits`, or found out by a call under torch's sync guard) is timed by plain launches and `note` says so, for such
    a figure contains the gaps between launches.
    """

    def __init__(self, call: Call, sets: int, target: float = 2e-3, waits: bool = False):
        self.sets, self.note = sets, "waits for the device: launch gaps included" if waits else None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in [*range(sets), *range(sets)]:
                call(i)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.replay = lambda: [call(i) for i in range(sets)] and None
        if not waits:
            try:
                never_waits(call)
                self.replay = capture(call, sets).replay
            except Exception as error:
                self.note = f"not captured as a graph ({type(error).__name__}): launch gaps included"
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


def never_waits(call: Call) -> None:
    """Raise where a call makes the host wait for the device, in the ways that torch knows: no capture is harmed yet."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(0)
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()


def capture(call: Call, sets: int) -> torch.cuda.CUDAGraph:
    """A graph of one call for each input set; where it cannot be captured, this raises and the process stays usable.

    Not `torch.cuda.graph`, which leaves the capture's stream current where the end of the capture raises. The default
    generator believes then, too, that a capture goes on, and refuses to draw: it gets a state of its own again.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                # All outputs live until the capture ends: one buffer written over and over would stay in L2.
                outputs = [call(i) for i in range(sets)]
            finally:
                graph.capture_end()
        del outputs
    except Exception:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        torch.cuda.synchronize()
        raise
    return graph


def sampler(
    call: Call, sets: int, device: str, warmup: float = 0.05, waits: bool = False
) -> HostSampler | GraphSampler:
    """waits: the call is known to wait for the device, so that it is never captured."""
    return GraphSampler(call, sets, waits=waits) if device == "cuda" else HostSampler(call, sets, warmup=warmup)


def interleave(
    samplers: dict[str, Callable[[], float]],
    rounds: int,
    seed: int = 0,
    seconds: float | None = None,
    least: int = LEAST,
) -> dict[str, list[float]]:
    """One sample of each in every round, in shuffled order, so that drift of the machine hits all alike.

    seconds: after which no further round starts, once there are `least`; None: there is no such bound. All variants
    have equally many rounds, for ratios are of the times of one round.
    """
    order = list(samplers)
    shuffle = random.Random(seed).shuffle
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(rounds):
            if seconds is not None and done >= least and time.perf_counter() - start > seconds:
                break
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
