"""From times of calls to a report."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from maefast import integrations
from maefast.integrations import transformer

from . import attribution, machine, places
from .advice import Facts, advise
from .attribution import Account, Groups, Times
from .clock import Clock
from .report import Memory, Report, Stage

_REPORT = "_maefast_report"  # what `maefast.accelerate` leaves on a model


@dataclass(frozen=True)
class Options:
    """Of the run that a step belongs to, which advice depends on. command: options of the command line can be named.
    workers: processes that load its data. narrow: AdamW keeps bfloat16. graphed: the run takes CUDA graphs itself."""

    command: bool = False
    workers: int | None = None
    narrow: bool = False
    graphed: bool = False


@dataclass(frozen=True)
class Recorded:
    """The steps under the profiler, and the seconds that each took there."""

    accounts: Sequence[Account]
    seconds: Sequence[float]


def summary(
    model: nn.Module,
    kind: str,
    clock: Clock,
    recorded: Recorded,
    waits: Mapping[str, int] | None,
    sizes: tuple[int, int, int],
    options: Options,
) -> Report:
    times, typical = attribution.middle(recorded.accounts)
    total = sum(stage.total for stage in times.values()) / 1e9
    scale, idle = clock.step / total if total else 1.0, 0.0
    if kind == "cuda":  # the device's times are its own; what is left of a step it waits
        scale = min(1.0, scale)
        idle = clock.step - scale * total
    # An op that is small in the shortest step is small, whatever interrupted the steps that the clock saw.
    fraction = min(1.0, scale)
    groups = attribution.grouped(typical, fraction, small=kind == "cpu")
    shares = _shares(clock, typical, groups, fraction, idle)
    peak = attribution.memory(typical, kind)
    facts = Facts(
        device=kind,
        **shares,
        ops=typical.ops,
        dtype=_most(groups.products, "float32"),
        largest=_most(groups.moving, places.OTHER),
        culprit=_most(typical.elsewhere, ""),
        workers=options.workers,
        cpus=machine.cpus(),
        bfloat16=machine.has_bfloat16(kind),
        replaceable=replaceable(model),
        narrow=options.narrow,
        graphed=options.graphed,
        command=options.command,
        idle_cpus=machine.idle_cpus(),
        waits=sum(waits.values()) if waits else 0,
    )
    return Report(
        machine=machine.describe(kind),
        device=kind,
        steps=clock.steps,
        seconds=clock.whole,
        spread=clock.spread,
        stages=_stages(clock, times, scale / 1e9, idle, peak.kept),
        python=scale * sum(stage.python for stage in times.values()) / 1e9 + idle,
        ops=typical.ops,
        shares=shares,
        memory=Memory(peak.peak, peak.stage, sum(peak.kept.values()), *sizes),
        waits=waits,
        load=machine.load(),
        cpus=machine.cpus(),
        slowdown=statistics.median(recorded.seconds) / clock.step,
        scale=scale,
        advice=advise(facts),
    )


def _shares(clock: Clock, account: Account, groups: Groups, scale: float, idle: float) -> dict[str, float]:
    """See `Report.shares`."""
    spent = {
        "launch": scale * account.python + groups.tiny,
        "products": sum(groups.products.values()),
        "memory": sum(groups.moving.values()),
        "elsewhere": scale * sum(account.elsewhere.values()),
    }
    busy = (clock.step - idle) / clock.whole / (sum(spent.values()) or 1.0)
    shares = {name: busy * value for name, value in spent.items()}
    shares["launch"] += idle / clock.whole
    return {"data": clock.data / clock.whole, **shares}


def _most(found: Counter[str], without: str) -> str:
    return max(found, key=found.__getitem__, default=without) or without


def _stages(
    clock: Clock, times: Mapping[str, Times], factor: float, idle: float, kept: Mapping[str, int]
) -> tuple[Stage, ...]:
    def stage(name: str, forward: float, backward: float = 0.0, python: float = 0.0, calls: int = 0) -> Stage:
        seconds = forward + backward + python
        return Stage(name, seconds, seconds / clock.whole, forward, backward, python, calls, kept.get(name, 0))

    found = [
        stage(name, factor * part.forward, factor * part.backward, factor * part.python, part.calls)
        for name, part in times.items()
    ]
    if clock.data:
        found.append(stage(places.DATA, clock.data, calls=1))
    if idle:
        found.append(stage(places.IDLE, 0.0, python=idle))
    rank = {name: at for at, name in enumerate(places.order())}
    found.sort(key=lambda stage: rank[stage.name])
    return tuple(stage for stage in found if stage.seconds or stage.bytes)


def replaceable(model: nn.Module) -> bool:
    """Whether `maefast.accelerate` knows the model, or blocks in it, and was not asked yet."""
    modules = list(model.modules())
    if any(_REPORT in vars(module) for module in modules):
        return False
    if any(family.recognise(module) for module in modules for family in integrations.FAMILIES):
        return True
    return any(not type(block).__module__.startswith("maefast.") for _, block, _ in transformer.find(model))


def held(model: nn.Module, optimizer: Optimizer | None) -> tuple[int, int, int]:
    """Bytes of weights and buffers, of gradients that lie there behind a step, of the optimizer's state."""
    weights = sum(map(_size, (*model.parameters(), *model.buffers())))
    gradients = sum(_size(p.grad) for p in model.parameters() if p.grad is not None)
    states = optimizer.state.values() if optimizer is not None else ()
    return weights, gradients, sum(_size(v) for state in states for v in state.values() if isinstance(v, Tensor))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
