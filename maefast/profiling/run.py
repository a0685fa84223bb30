"""Measures a step: without the profiler how long it takes, with it where that goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from . import attribution, calls, device, places
from .attribution import Account
from .clock import Clock, clocked
from .feed import Feed
from .report import Report
from .state import unchanged
from .summary import Options, Recorded, held, summary


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
        TypeError, ValueError: no module, function or iterable, a model on the meta device, numbers out of range, data
            without a batch, no folder for `trace`, or a folder in its place.
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
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("the model lies on the meta device, without values: no step of it can be run")
    kind = "cuda" if any(tensor.is_cuda for tensor in tensors) else "cpu"
    with unchanged(model, optimizer):
        for _ in range(warmup):
            step(*feed.take())
        clock = clocked(step, feed, steps, kind)
        recorded = _recorded(step, model, feed, clock, steps, kind, trace)
        waits = device.waits(lambda: step(*feed.take())) if kind == "cuda" else None
        sizes = held(model, optimizer)
    return summary(model, kind, clock, recorded, waits, sizes, options)


def _check(steps: int, warmup: int, trace: str | Path | None) -> None:
    for name, value, least in (("steps", steps, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    if trace is not None and not Path(trace).absolute().parent.is_dir():
        raise ValueError(f"there is no folder {Path(trace).absolute().parent} for the trace")
    if trace is not None and Path(trace).is_dir():  # the profiler would put a file in its place
        raise ValueError(f"{trace} is a folder; give the name of a file for the trace")


def _marked(step: Callable[..., Any], batch: tuple, kind: str) -> None:
    """What is looked for in a recording."""
    step(*batch)
    if kind == "cuda":
        torch.cuda.synchronize()


def _recorded(
    step: Callable[..., Any],
    model: nn.Module,
    feed: Feed,
    clock: Clock,
    steps: int,
    kind: str,
    trace: str | Path | None,
) -> Recorded:
    batches = [feed.take() for _ in range(1 + steps)]
    recording = calls.recorded(lambda: [_marked(step, batch, kind) for batch in batches], kind)
    roots = calls.read(recording)
    marked = calls.of(roots, _marked)[1:]  # the first one pays for what the profiler looks up once
    if len(marked) != steps:
        raise RuntimeError(f"torch's profiler recorded {len(marked)} of {steps} steps")
    rules, accounts = places.Places(model), []
    if kind == "cuda":
        accounts = _on_device(roots, marked, rules, device.kernels(recording))
    else:
        cost = calls.costs()
        for each in marked:
            accounts.append(attribution.account([each], rules, calls.fitted(each, cost, 1e9 * clock.step)))
    if trace is not None:
        calls.recorded(lambda: _marked(step, feed.take(), kind), kind).export_chrome_trace(str(trace))
    return Recorded(accounts, [(each.end - each.start) / 1e9 for each in marked])


def _on_device(
    roots: list[calls.Call], marked: list[calls.Call], rules: places.Places, kernels: attribution.Kernels
) -> list[Account]:
    accounts = []
    for each in marked:
        # Autograd walks back in a thread of its own.
        nodes = [root for root in roots if each.start <= root.start <= each.end]
        accounts.append(attribution.account([each, *nodes], rules, calls.FREE, kernels))
    if not any(account.ops for account in accounts):
        raise RuntimeError(f"torch's profiler recorded no kernel; {calls.LEVEL}=0 in the environment lets it say why")
    return accounts
