"""What torch's profiler recorded of a step, as a plain tree of calls.

The profiler sees each Python frame, so nothing has to be hooked into a model: hooks would make fused blocks run module
by module, and a profile should be of what runs without it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch._C._profiler import RecordScope, _EventType, _TensorMetadata
from torch.profiler import ProfilerActivity

_MOST = 5.0
LEVEL = "KINETO_LOG_LEVEL"
PYTHON, C, OP = "Python", "C", "op"
FREE = {PYTHON: 0.0, C: 0.0, OP: 0.0}
# Work that runs at the rate of the arithmetic units where it is large. Parts of names of ops.
PRODUCTS = (
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm", "_convolution", "convolution_",
    "conv2d", "linear_pointwise", "mkldnn_linear", "scaled_dot_product", "flash_attention", "efficient_attention",
    "maefast::attention", "maefast_triton::attention", "::implicit_conv", "::depthwise", "::knn", "::farthest_points",
    "::chamfer",
)  # fmt: skip


@dataclass(slots=True, eq=False)
class Call:
    """One call: of a Python function, of a C function or of an op, and the calls inside.

    Attributes:
        kind: PYTHON, C or OP. start, end: nanoseconds. file, function: of a Python function. module: id of the
            nn.Module whose `__call__` it is, and `name` its class. sequence: number that ties a backward node to the op
            that made it, or -1. backward: whether it is such a node. correlation: ties it to its kernels. dtype: of a
            product.
    """

    kind: str
    name: str
    start: int
    end: int
    file: str = ""
    function: str = ""
    module: int | None = None
    sequence: int = -1
    backward: bool = False
    correlation: int = 0
    dtype: torch.dtype | None = None
    calls: list[Call] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Memory:
    """`bytes` were allocated at `pointer`, or freed where negative, at `time` (nanoseconds)."""

    time: int
    pointer: int
    bytes: int
    device: str


def recorded(run: Callable[[], object], device: str = "cpu") -> torch.profiler.profile:
    """The profiler behind a call of `run`."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with (
        _quiet(),
        torch.profiler.profile(
            activities=activities, record_shapes=True, profile_memory=True, with_stack=True
        ) as profiler,
    ):
        run()
    return profiler


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that torch's profiler prints whenever it starts and stops, unless somebody asks for them. It
    reads the variable when it is first used."""
    if LEVEL in os.environ:
        yield
        return
    os.environ[LEVEL] = "6"
    try:
        yield
    finally:
        del os.environ[LEVEL]


def read(profiler: torch.profiler.profile) -> list[Call]:
    """The outermost calls, of all threads, in order."""
    roots: list[Call] = []
    events = profiler.profiler.kineto_results.experimental_event_tree()
    todo = [(event, roots, []) for event in reversed(events)]
    while todo:
        event, siblings, memory = todo.pop()
        call = _call(event)
        if call is not None:
            siblings.append(call)
            siblings, memory = call.calls, call.memory
        elif event.tag == _EventType.Allocation:
            found = event.extra_fields
            memory.append(Memory(event.start_time_ns, found.ptr, found.alloc_size, found.device.type))
        todo += [(child, siblings, memory) for child in reversed(event.children)]
    return roots


def _call(event) -> Call | None:
    """None: it is no call, but what stands inside may be."""
    tag, fields = event.tag, event.extra_fields
    span = event.start_time_ns, event.end_time_ns
    if tag == _EventType.PyCall:
        module, site = fields.module, fields.callsite
        name = _text(event, "name") if module is None else _text(module, "cls_name")
        mine = None if module is None else module.self_ptr
        return Call(
            PYTHON, name, *span, file=_text(site, "file_name"), function=_text(site, "function_name"), module=mine
        )
    if tag == _EventType.PyCCall:
        return Call(C, _text(event, "name"), *span)
    # A range of `record_function` begins inside one Python call and ends inside another: it holds no calls.
    if tag != _EventType.TorchOp or fields.scope == RecordScope.USER_SCOPE:
        return None
    node = fields.scope == RecordScope.BACKWARD_FUNCTION
    dtype = _dtype(fields.inputs) if is_product(event.name) else None
    return Call(
        OP, event.name, *span, sequence=fields.sequence_number, backward=node, correlation=event.correlation_id,
        dtype=dtype,
    )  # fmt: skip


def _text(event: Any, name: str) -> str:
    """An attribute that is text. Torch reads those of functions after the step, when a function that was made within it
    may be gone, and its name with it: such a one has none."""
    try:
        return getattr(event, name)
    except UnicodeDecodeError:
        return ""


def is_product(name: str) -> bool:
    return any(part in name for part in PRODUCTS)


def _dtype(inputs: list) -> torch.dtype | None:
    return next((value.dtype for value in inputs if isinstance(value, _TensorMetadata)), None)


def of(roots: list[Call], function: FunctionType) -> list[Call]:
    """The calls of a Python function, by its name and file, in order; those inside of them left out."""
    code, todo, found = function.__code__, list(reversed(roots)), []
    while todo:
        call = todo.pop()
        if call.function == code.co_name and call.file and code.co_filename.endswith(call.file):
            found.append(call)
        else:
            todo += reversed(call.calls)
    return found


# --- what recording itself takes ----------------------------------------------------------------------------


def costs(count: int = 1000) -> dict[str, float]:
    """Nanoseconds that recording adds to a call of each kind, on this machine now: loops of calls that do nothing, with
    the profiler and without it."""
    tensor, number = torch.zeros(1), 1.0

    def nothing() -> None:
        pass

    def python() -> None:
        for _ in range(count):
            nothing()

    def c() -> None:
        for _ in range(count):
            math.floor(number)

    def op() -> None:
        for _ in range(count):
            tensor.detach()

    def seconds(loop: Callable[[], None]) -> float:
        began = time.perf_counter_ns()
        loop()
        return time.perf_counter_ns() - began

    loops, times = (python, c, op), 3
    plain = [min(seconds(loop) for _ in range(times)) for loop in loops]
    traced: list[float] = []
    recording = recorded(lambda: traced.extend(min(seconds(loop) for _ in range(times)) for loop in loops))
    added = [max(0.0, (after - before) / count) for before, after in zip(plain, traced)]
    ops = max(1, round(_count(read(recording), OP) / (count * times)))  # of one `detach`, in one C function
    return {PYTHON: added[0], C: added[1], OP: max(0.0, (added[2] - added[1]) / ops)}


def _count(roots: list[Call], kind: str) -> int:
    found, todo = 0, list(roots)
    while todo:
        call = todo.pop()
        found += call.kind == kind
        todo += call.calls
    return found


def self_times(call: Call, cost: dict[str, float]) -> float:
    """Nanoseconds in the call itself, not in calls inside, without what recording takes: half of it falls into the
    call, half into the one around it."""
    return max(0.0, _alone(call) - _share(call, cost))


def _alone(call: Call) -> int:
    return call.end - call.start - sum(inner.end - inner.start for inner in call.calls)


def _share(call: Call, cost: dict[str, float]) -> float:
    return (cost[call.kind] + sum(cost[inner.kind] for inner in call.calls)) / 2


def fitted(call: Call, cost: dict[str, float], wanted: float) -> dict[str, float]:
    """`cost` as it was in this recording, of calls that take `wanted` nanoseconds without one: in the middle of a step
    recording takes longer than in a loop of nothing. Up to `_MOST` times `cost`; where the two runs differ by more, it
    was for another reason, and `cost` stays."""
    alone, shares, todo = [], [], [call]
    while todo:
        at = todo.pop()
        alone.append(_alone(at))
        shares.append(_share(at, cost))
        todo += at.calls
    alone, shares = np.array(alone, dtype=float), np.array(shares)

    def too_much(factor: float) -> bool:
        return np.maximum(0.0, alone - factor * shares).sum() > wanted

    low, high = 1.0, _MOST
    if not too_much(low) or too_much(high):
        return cost
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if too_much(middle) else (low, middle)
    return {kind: high * value for kind, value in cost.items()}
