"""Time of one recorded step by stage. Every nanosecond belongs to one call and every call to one stage, so that stages
add up to the step."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .calls import OP, C, Call, Memory, is_product, self_times
from .places import AUTOGRAD, DECODER, HOST_TO_DEVICE, LOSS, OTHER, Place, Places, is_backward, parts_of_block

TINY = 10_000  # nanoseconds: an op below is mostly its own call
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


class Piece(NamedTuple):
    """An op's own nanoseconds, its stage, whether it is a product, and of which dtype."""

    spent: float
    stage: str
    product: bool
    dtype: str | None


@dataclass
class Account:
    """What one step came to; nanoseconds.

    Attributes:
        stages: by name. pieces: of ops (on a GPU, of kernels). elsewhere: in C functions that are no ops, by their
            names.
        ops: how many are called from Python or autograd, not counting those that they call; on a GPU, kernels.
        memory: (stage, allocation or release), in order of time. turned: when the backward began.
    """

    stages: dict[str, Times] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    elsewhere: Counter[str] = field(default_factory=Counter)
    ops: int = 0
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


@dataclass
class Groups:
    """Nanoseconds of ops: `tiny`, in ops below `TINY`; `products`, in larger matrix products, convolutions and
    attention, by dtype; `moving`, in all others, by stage."""

    tiny: float = 0.0
    products: Counter[str] = field(default_factory=Counter)
    moving: Counter[str] = field(default_factory=Counter)


def grouped(account: Account, scale: float, small: bool) -> Groups:
    """The ops of an account whose times are to be multiplied by `scale`; small: whether there are tiny ones."""
    found = Groups()
    for spent, stage, product, dtype in account.pieces:
        spent *= scale
        if small and spent < TINY:
            found.tiny += spent
        elif product:
            found.products[dtype or ""] += spent
        else:
            found.moving[stage] += spent
    return found


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
    todo = [(root, Place(AUTOGRAD) if alone else Place(), None, alone, False)]
    decoded = False
    while todo:
        call, around, before, backward, inside = todo.pop()
        if is_backward(call):
            found.turned = call.start if found.turned is None else found.turned
            place, backward, decoded = Place(AUTOGRAD), True, False
        elif backward and _is_node(call):
            found.turned = call.start if found.turned is None else found.turned
            place = made.get(_sequence(call), around)
        else:
            place = places.inside(around, call)
            if not backward:
                decoded = decoded or place.area == DECODER
                if decoded and not place.area:
                    place = Place(LOSS)
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
        found.ops += kernels is None and not inside and _is_op(call)
        inner = parts_of_block(call, place)
        inner = [place] * len(call.calls) if inner is None else inner
        within = inside or _is_op(call)
        todo += [(each, at, name, backward, within) for each, at in zip(reversed(call.calls), reversed(inner))]


def _host(call: Call, spent: float, stage: str, found: Account, backward: bool) -> None:
    if _is_op(call):
        _piece(call, spent, stage, found, backward)
    elif call.kind == C and spent >= LONG and "run_backward" not in call.name:
        found.elsewhere[call.name] += spent
        _add(found.of(stage), spent, backward)
    else:
        found.of(stage).python += spent


def _device(call: Call, kernel: str, spent: float, stage: str, found: Account, backward: bool) -> None:
    found.ops += 1
    _piece(call, spent, HOST_TO_DEVICE if "HtoD" in kernel else stage, found, backward)


def _piece(call: Call, spent: float, stage: str, found: Account, backward: bool) -> None:
    dtype = None if call.dtype is None else str(call.dtype).removeprefix("torch.")
    found.pieces.append(Piece(spent, stage, is_product(call.name), dtype))
    _add(found.of(stage), spent, backward)


def _add(times: Times, spent: float, backward: bool) -> None:
    if backward:
        times.backward += spent
    else:
        times.forward += spent


def _is_op(call: Call) -> bool:
    """Not autograd's own code, nor the call of an `autograd.Function`, which is named without a namespace."""
    return call.kind == OP and "::" in call.name and not call.name.startswith(("autograd::", "torch::autograd"))


def _is_node(call: Call) -> bool:
    return call.name.startswith("autograd::engine::evaluate_function")


def _sequence(call: Call) -> int:
    if call.sequence >= 0:
        return call.sequence
    return next((inner.sequence for inner in call.calls if inner.backward), -1)


# --- several steps, memory ----------------------------------------------------------------------------------


def middle(accounts: Sequence[Account]) -> tuple[dict[str, Times], Account]:
    """The median of the times of each stage, so that what interrupts one step is no part of a stage; and the step that
    was interrupted least, the shortest."""
    stages = {}
    typical = min(accounts, key=lambda each: each.total)
    for name in dict.fromkeys(name for each in accounts for name in each.stages):
        parts = [[getattr(each.stages.get(name, Times()), part) for each in accounts] for part in _PARTS]
        calls = typical.stages.get(name, Times()).calls
        stages[name] = Times(*map(statistics.median, parts), calls)
    return stages, typical


_PARTS = ("forward", "backward", "python")


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
