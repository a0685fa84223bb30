"""Measures a step: without the profiler how long it takes, with it where that goes."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from maefast import integrations
from maefast.integrations import transformer

from . import attribution, calls, device, machine, places
from .advice import Facts, advise
from .attribution import Account, Kernels
from .feed import Feed
from .report import Memory, Report, Stage
from .state import unchanged

_REPORT = "_maefast_report"  # what `maefast.accelerate` leaves on a model


@dataclass(frozen=True)
class Options:
    """Of the run that a step belongs to, which advice depends on. command: options of the command line can be named.
    workers: processes that load its data. narrow: AdamW keeps bfloat16. graphed: the run takes CUDA graphs itself."""

    command: bool = False
    workers: int | None = None
    narrow: bool = False
    graphed: bool = False


def profile(
    step: Callable[..., Any],
    model: nn.Module,
    *,
    steps: int = 5,
    warmup: int = 2,
    data: Iterable[Any] | None = None,
    optimizer: Optimizer | None = None,
    trace: str | Path | None = None,
) -> Report:
    """Where a training step's time and memory go.

    The step is run ``warmup`` times, then ``steps`` times with a clock alone and as often under torch's profiler (on a
    GPU once more, to count what waits for the device). Parameters, gradients and buffers of the model, the state of
    `optimizer` and the random generators of torch, numpy and Python are put back at the end; not put back are batches
    that were taken, other objects that `step` changes, and an optimizer that it uses and that is not given. The model
    has no hooks meanwhile and runs what it always runs. CUDA graphs and code compiled by torch.compile are one op each.

    Args:
        step: forward, backward and, if it likes, the optimizer's step. Takes a batch of `data`, or nothing.
        model: any module that `step` uses; stages are told by the paths and classes of its parts.
        data: batches, such as a DataLoader; begun again when it ends. The time to get one is the stage "data". None:
            `step` gets none.
        optimizer: what `step` uses, to be put back.
        trace: a file for the last step as a Chrome trace (chrome://tracing, Perfetto).

    Raises:
        TypeError, ValueError: no module, function or iterable, numbers out of range, data without a batch, no folder
            for `trace`.
    """
    if not callable(step):
        raise TypeError(f"step must be a function, got {type(step).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if optimizer is not None and not (hasattr(optimizer, "state") and hasattr(optimizer, "param_groups")):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if data is not None and not hasattr(data, "__iter__"):
        raise TypeError(f"data must be iterable, got {type(data).__name__}")
    workers = getattr(data, "num_workers", None)
    return measure(step, model, Feed(data), steps, warmup, optimizer, trace, Options(workers=workers))


def measure(
    step: Callable[..., Any],
    model: nn.Module,
    feed: Feed,
    steps: int,
    warmup: int,
    optimizer: Optimizer | None,
    trace: str | Path | None,
    options: Options,
) -> Report:
    """`profile`, for callers that know more of their data and options."""
    _check(steps, warmup, trace)
    tensors = (*model.parameters(), *model.buffers())
    kind = "cuda" if any(tensor.is_cuda for tensor in tensors) else "cpu"
    with unchanged(model, optimizer):
        for _ in range(warmup):
            step(*feed.take())
        times = _clocked(step, feed, steps, kind)
        account, slow = _traced(step, model, feed, steps, kind, trace)
        waits = device.waits(lambda: step(*feed.take())) if kind == "cuda" else None
        held = _held(model, optimizer)
    return _report(model, kind, steps, times, account, slow, waits, held, options)


def _check(steps: int, warmup: int, trace: str | Path | None) -> None:
    for name, value, least in (("steps", steps, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    if trace is not None and not Path(trace).absolute().parent.is_dir():
        raise ValueError(f"there is no folder {Path(trace).absolute().parent} for the trace")


# --- the clock ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """Seconds of a step: waiting for its batch (mean) and the rest (median); least and most of both."""

    data: float
    step: float
    spread: tuple[float, float]

    @property
    def whole(self) -> float:
        return self.data + self.step


def _clocked(step: Callable[..., Any], feed: Feed, steps: int, kind: str) -> Clock:
    feed.drain()
    if kind == "cuda":
        return _clocked_together(step, feed, steps)
    waited, taken = [], []
    for _ in range(steps):
        began = time.perf_counter()
        batch = feed.take()
        got = time.perf_counter()
        step(*batch)
        taken.append(time.perf_counter() - got)
        waited.append(got - began)
    both = [sum(pair) for pair in zip(waited, taken)]
    return Clock(statistics.fmean(waited), statistics.median(taken), (min(both), max(both)))


def _clocked_together(step: Callable[..., Any], feed: Feed, steps: int, rounds: int = 3) -> Clock:
    """Steps that follow each other without waiting for the device, as in a run; `rounds` times."""
    waited, taken = [], []
    for _ in range(rounds):
        waits = 0.0
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            before = time.perf_counter()
            batch = feed.take()
            waits += time.perf_counter() - before
            step(*batch)
        torch.cuda.synchronize()
        whole = (time.perf_counter() - began) / steps
        waited.append(waits / steps)
        taken.append(whole - waits / steps)
    both = [sum(pair) for pair in zip(waited, taken)]
    return Clock(statistics.fmean(waited), statistics.median(taken), (min(both), max(both)))


# --- the profiler -------------------------------------------------------------------------------------------


def _marked(step: Callable[..., Any], batch: tuple) -> None:
    """What is looked for in a recording."""
    step(*batch)


def _traced(
    step: Callable[..., Any], model: nn.Module, feed: Feed, steps: int, kind: str, trace: str | Path | None
) -> tuple[Account, float]:
    """The mean of `steps` recorded steps, and the seconds of one under the profiler."""
    cost = calls.costs()
    rules, found, slow = places.Places(model), [], []
    for _ in range(steps):
        batch = feed.take()

        def run(batch: tuple = batch) -> None:
            _marked(step, batch)
            if kind == "cuda":
                torch.cuda.synchronize()

        recording = calls.recorded(run, kind)
        roots = calls.read(recording)
        marked = calls.of(roots, _marked)
        kernels: Kernels | None = None
        if kind == "cuda":
            kernels = device.kernels(recording)
            # autograd walks back in a thread of its own
            nodes = [root for root in roots if marked.start <= root.start <= marked.end and root is not marked]
            found.append(attribution.account([marked, *nodes], rules, cost, kernels))
        else:
            found.append(attribution.account([marked], rules, cost))
        slow.append((marked.end - marked.start) / 1e9)
    if trace is not None:
        recording.export_chrome_trace(str(trace))
    return attribution.merged(found), statistics.median(slow)


# --- what is said -------------------------------------------------------------------------------------------


def _report(
    model: nn.Module,
    kind: str,
    steps: int,
    clock: Clock,
    account: Account,
    slow: float,
    waits: dict[str, int] | None,
    held: tuple[int, int, int],
    options: Options,
) -> Report:
    total = account.total / 1e9
    scale, idle = clock.step / total if total else 1.0, 0.0
    if kind == "cuda":  # the device's times are its own; what is left of a step it waits
        scale = min(1.0, scale)
        idle = clock.step - scale * total
    peak = attribution.memory(account, kind)
    python, factor = scale * account.python / 1e9 + idle, scale / 1e9
    stages = _stages(clock, account, factor, idle, peak.kept)
    seconds = {
        "data": clock.data,
        "launch": idle if kind == "cuda" else python + factor * account.tiny,
        "products": factor * account.products,
        "memory": factor * sum(account.moving.values()),
        "elsewhere": factor * sum(account.elsewhere.values()),
    }
    shares = {name: spent / clock.whole for name, spent in seconds.items()}
    facts = Facts(
        device=kind,
        **shares,
        ops=account.ops,
        dtype=_most(account.dtypes, "float32"),
        largest=_most(account.moving, places.OTHER),
        culprit=_most(account.elsewhere, ""),
        workers=options.workers,
        cpus=machine.cpus(),
        bfloat16=machine.has_bfloat16(kind),
        replaceable=_replaceable(model),
        narrow=options.narrow,
        graphed=options.graphed,
        command=options.command,
        idle_cpus=machine.idle_cpus(),
        waits=sum(waits.values()) if waits else 0,
    )
    return Report(
        machine=machine.describe(kind),
        device=kind,
        steps=steps,
        seconds=clock.whole,
        spread=clock.spread,
        stages=stages,
        python=python,
        ops=account.ops,
        shares=shares,
        memory=Memory(peak.peak, peak.stage, sum(peak.kept.values()), *held),
        waits=waits,
        slowdown=slow / clock.step,
        scale=scale,
        advice=advise(facts),
    )


def _most(found: Counter[str], without: str) -> str:
    return max(found, key=found.__getitem__, default=without)


def _stages(clock: Clock, account: Account, factor: float, idle: float, kept: dict[str, int]) -> tuple[Stage, ...]:
    def stage(name: str, forward: float, backward: float = 0.0, python: float = 0.0, calls: int = 0) -> Stage:
        seconds = forward + backward + python
        return Stage(name, seconds, seconds / clock.whole, forward, backward, python, calls, kept.get(name, 0))

    found = [
        stage(name, factor * times.forward, factor * times.backward, factor * times.python, times.calls)
        for name, times in account.stages.items()
    ]
    if clock.data > 1e-4 * clock.whole:
        found.append(stage(places.DATA, clock.data, calls=1))
    if idle:
        found.append(stage(places.IDLE, 0.0, python=idle))
    rank = {name: at for at, name in enumerate(places.order())}
    found.sort(key=lambda stage: rank[stage.name])
    return tuple(stage for stage in found if stage.seconds or stage.bytes)


def _replaceable(model: nn.Module) -> bool:
    """Whether `maefast.accelerate` knows the model, or blocks in it, and was not asked yet."""
    modules = list(model.modules())
    if any(_REPORT in vars(module) for module in modules):
        return False
    if any(family.recognise(module) for module in modules for family in integrations.FAMILIES):
        return True
    return any(not type(block).__module__.startswith("maefast.") for _, block, _ in transformer.find(model))


def _held(model: nn.Module, optimizer: Optimizer | None) -> tuple[int, int, int]:
    """Bytes of weights and buffers, of gradients that lie there behind a step, of the optimizer's state."""
    weights = sum(map(_size, (*model.parameters(), *model.buffers())))
    gradients = sum(_size(p.grad) for p in model.parameters() if p.grad is not None)
    states = optimizer.state.values() if optimizer is not None else ()
    return weights, gradients, sum(_size(v) for state in states for v in state.values() if isinstance(v, Tensor))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
