"""Time of one recorded step by stage. Every nanosecond belongs to one call and every call to one stage, so that stages
add up to the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .calls import OP, C, Call, Memory, is_product, self_times
from .places import AUTOGRAD, HOST_TO_DEVICE, OTHER, Place, Places, is_backward, parts_of_block

TINY = 5_000  # nanoseconds: an op below is mostly its own call
LONG = 50_000  # nanoseconds: a C function above does something (sleeps, decodes, numpy), it is no overhead


@dataclass
class Times:
    """Nanoseconds of a stage. `python`: between ops, in Python and autograd's own code. `calls`: how often it began."""

    forward: float = 0.0
    backward: float = 0.0
    python: float = 0.0
    calls: int = 0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.python


@dataclass
class Account:
    """What one step, or several together, came to; nanoseconds.

    Attributes:
        stages: by name. tiny: in ops too small to be anything but their call. products: in larger matrix products,
            convolutions and attention. moving: in all other ops, by stage. elsewhere: in C functions that are no ops,
            by their names. ops: how many were called; on a GPU, kernels.
        dtypes: of the products, by time. memory: (stage, allocation or release), in order of time. turned: when the
            backward began.
    """

    stages: dict[str, Times] = field(default_factory=dict)
    products: float = 0.0
    tiny: float = 0.0
    moving: Counter[str] = field(default_factory=Counter)
    elsewhere: Counter[str] = field(default_factory=Counter)
    ops: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[str, Memory]] = field(default_factory=list)
    turned: int | None = None

    @property
    def total(self) -> float:
        return sum(times.total for times in self.stages.values())

    @property
    def python(self) -> float:
        return sum(times.python for times in self.stages.values())

    def of(self, stage: str) -> Times:
        return self.stages.setdefault(stage, Times())


Kernels = Mapping[int, Sequence[tuple[str, int]]]  # of an op's correlation: names and nanoseconds on the device


def account(
    roots: Sequence[Call], places: Places, cost: Mapping[str, float], kernels: Kernels | None = None
) -> Account:
    """Of calls in order of time. With `kernels`, the time is that of the device, where `python` is nothing."""
    found, made = Account(), {}  # made: the place of the op that made the backward node with this sequence number
    for root in roots:
        _walk(root, places, cost, kernels, found, made)
    found.memory.sort(key=lambda entry: entry[1].time)
    return found


def _walk(root: Call, places: Places, cost, kernels: Kernels | None, found: Account, made: dict[int, Place]) -> None:
    alone = _is_node(root)  # a thread of autograd's own
    todo = [(root, Place(AUTOGRAD) if alone else Place(), None, alone)]
    while todo:
        call, around, before, backward = todo.pop()
        if is_backward(call):
            found.turned = call.start if found.turned is None else found.turned
            place, backward = Place(AUTOGRAD), True
        elif backward and _is_node(call):
            found.turned = call.start if found.turned is None else found.turned
            place = made.get(_sequence(call), around)
        else:
            place = places.inside(around, call)
        if call.kind == OP and call.sequence >= 0 and not backward:
            made[call.sequence] = place  # the last op before the number rises is the one that made the node
        name = place.stage
        times = found.of(name)
        times.calls += name != before and not backward
        found.memory += [(name, memory) for memory in call.memory]
        if kernels is None:
            _host(call, self_times(call, cost), name, found, backward)
        elif call.kind == OP:
            for kernel, nanoseconds in kernels.get(call.correlation, ()):
                _device(call, kernel, nanoseconds, name, found, backward)
        inner = parts_of_block(call, place)
        inner = [place] * len(call.calls) if inner is None else inner
        todo += [(each, at, name, backward) for each, at in zip(reversed(call.calls), reversed(inner))]


def _host(call: Call, spent: float, stage: str, found: Account, backward: bool) -> None:
    if call.kind == OP and _is_op(call):
        found.ops += 1
        if spent < TINY:
            found.tiny += spent
        else:
            _large(call, spent, stage, found)
    elif call.kind == C and spent >= LONG and "run_backward" not in call.name:
        found.elsewhere[call.name] += spent
    else:
        found.of(stage).python += spent
        return
    _add(found.of(stage), spent, backward)


def _device(call: Call, kernel: str, spent: float, stage: str, found: Account, backward: bool) -> None:
    stage = HOST_TO_DEVICE if "HtoD" in kernel else stage
    found.ops += 1
    _large(call, spent, stage, found)
    _add(found.of(stage), spent, backward)


def _add(times: Times, spent: float, backward: bool) -> None:
    if backward:
        times.backward += spent
    else:
        times.forward += spent


def _large(call: Call, spent: float, stage: str, found: Account) -> None:
    if not is_product(call.name):
        found.moving[stage] += spent
        return
    found.products += spent
    if call.dtype is not None:
        found.dtypes[str(call.dtype).removeprefix("torch.")] += spent


def _is_op(call: Call) -> bool:
    """Not autograd's own code, nor the call of an `autograd.Function`, which is named without a namespace."""
    return "::" in call.name and not call.name.startswith(("autograd::", "torch::autograd"))


def _is_node(call: Call) -> bool:
    return call.name.startswith("autograd::engine::evaluate_function")


def _sequence(call: Call) -> int:
    if call.sequence >= 0:
        return call.sequence
    return next((inner.sequence for inner in call.calls if inner.backward), -1)


# --- several steps, memory ----------------------------------------------------------------------------------


def merged(accounts: Sequence[Account]) -> Account:
    """The mean of the times of several steps, stages without any left out; calls, memory and its times of the last
    one."""
    count, last, mean = len(accounts), accounts[-1], Account()
    for each in accounts:
        for name, times in each.stages.items():
            into = mean.of(name)
            into.forward += times.forward / count
            into.backward += times.backward / count
            into.python += times.python / count
        mean.products += each.products / count
        mean.tiny += each.tiny / count
        for into, counted in ((mean.moving, each.moving), (mean.elsewhere, each.elsewhere)):
            for name, spent in counted.items():
                into[name] += spent / count
        mean.dtypes.update(each.dtypes)
    for name, times in last.stages.items():
        mean.of(name).calls = times.calls
    mean.ops, mean.memory, mean.turned = last.ops, last.memory, last.turned
    return mean


@dataclass(frozen=True)
class Peak:
    """Bytes. `peak`: the most above what there was when the step began, and `stage`, in which that was. `kept`: what
    each stage had allocated that was still there when the backward began (or at the end, without one)."""

    peak: int
    stage: str
    kept: dict[str, int]


def memory(found: Account, device: str) -> Peak:
    held = peak = 0
    live: dict[int, tuple[str, int]] = {}
    stage, kept = OTHER, None
    for name, event in found.memory:
        if event.device != device:
            continue
        if kept is None and found.turned is not None and event.time >= found.turned:
            kept = _by_stage(live)
        held += event.bytes
        if event.bytes > 0:
            live[event.pointer] = name, event.bytes
        else:
            live.pop(event.pointer, None)
        if held > peak:
            peak, stage = held, name
    return Peak(peak, stage, _by_stage(live) if kept is None else kept)


def _by_stage(live: dict[int, tuple[str, int]]) -> dict[str, int]:
    kept: Counter[str] = Counter()
    for name, size in live.values():
        kept[name] += size
    return dict(kept)
