"""Runs one op at one shape in all its variants, side by side. The ops stand in bench_<family>.py, what they are in
op.py."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from maefast.bench import environment, machine, timing
from maefast.bench.micro import agree
from maefast.bench.micro.op import BOTH, FORWARD, Case, Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import _dispatch

FAMILIES = (
    "mask",
    "embed",
    "restore",
    "attention",
    "linear",
    "norm",
    "gelu",
    "adamw",
    "loss",
    "points",
    "chamfer",
    "feature_loss",
    "resize",
    "cells",
    "pool",
    "cell_norm",
    "depthwise",
    "sparse_conv",
    "conv_transpose",
)
BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# The peers. `eager` is what published code does; `tuned` the best eager PyTorch we could write for the same result.
# The last two stand for all further peers of an op (`Op.more`), without and with torch.compile.
PEERS = ("eager", "tuned", "compile", "compile_tuned", "library", "compile_library")
QUICK = ("eager", "tuned", "compile", "library")
SLOW = 0.25  # seconds of a call, from which on two input sets are enough: so long a call does not live off a cache


def ops(family: str) -> list[Op]:
    return importlib.import_module(f"maefast.bench.micro.bench_{family}").OPS


def takes(op: Op, shape: Shape) -> bool:
    return shape.cells == op.cells and (op.name in shape.only if op.named or shape.only else True)


def cases(families, shapes: list[Shape], dtypes: list[torch.dtype], device: str) -> Iterator[Case]:
    for family in families:
        for op in (op for op in ops(family) if device in op.devices):
            for shape in (s for s in shapes if takes(op, s)):
                for dtype in (d for d in dtypes if d in op.dtypes):
                    for direction in op.directions:
                        yield Case(op, shape, dtype, direction, device)


def variants(case: Case, peers: tuple[str, ...]) -> dict[str, str | None]:
    """Variant -> why it cannot run, or None."""
    names: dict[str, str | None] = dict.fromkeys(peer for peer in peers if not peer.endswith("library"))
    names |= {name: peer.unable(case) for name, peer in case.op.more.items() if peer.group in peers}
    if _automatic(case):
        names["maefast"] = None
    for backend in BACKENDS[case.device] if case.op.raw else ():
        reasons = (_dispatch.unavailable(raw, backend, case.device, case.dtype) for raw in case.op.raw)
        reason = next((r for r in reasons if r is not None), None)
        names[f"maefast-{backend}"] = reason
    return names


def default_variant(case: Case) -> str:
    """The maefast variant that a user gets without asking for a backend."""
    if _automatic(case):
        return "maefast"
    return "maefast-" + _dispatch.choose(case.op.raw[0], case.device, case.dtype)


def waits(op: Op, variant: str) -> bool:
    """Whether a variant is known to wait for the device."""
    plain = {"compile": "eager", "compile_tuned": "tuned"}.get(variant, variant)
    return plain in op.waits or (variant in op.more and op.more[variant].waits)


def _automatic(case: Case) -> bool:
    return not case.op.raw or case.device in case.op.automatic


# --- one variant as a call ---------------------------------------------------------------------------------


def _function(op: Op, variant: str) -> Callable[[Inputs], Any]:
    if variant in op.more:
        return op.more[variant].run
    if variant.startswith("maefast"):
        backend = variant.removeprefix("maefast").removeprefix("-") or None
        return lambda inputs: op.ours(inputs, backend)
    plain = op.tuned if variant.endswith("tuned") else op.eager
    return torch.compile(plain, fullgraph=True, dynamic=False) if variant.startswith("compile") else plain


def leaves(op: Op, inputs: Inputs, peer: bool = False) -> list[Tensor]:
    """The inputs that need gradients; one that a shape lacks (a class token, say) is None and has none."""
    names = [op.maps.get(name, name) for name in op.leaves] if peer else op.leaves
    return [inputs[name] for name in names if inputs[name] is not None]


def _packed(op: Op, inputs: Inputs, result: Any, direction: str) -> Any:
    """A peer's result in the layout of ours."""
    if op.pack is None:
        return result
    if direction == FORWARD:
        return op.pack(inputs, result)
    out, grads = result
    named = zip(op.leaves, grads, strict=True)
    return op.pack(inputs, out), [op.pack(inputs, grad) if name in op.maps else grad for name, grad in named]


def _call(case: Case, variant: str, sets: list[Inputs], grads: list[Any]) -> timing.Call:
    function = _function(case.op, variant)
    peer = not variant.startswith("maefast")
    if not peer and case.op.pack is not None and case.direction == BOTH:
        grads = [case.op.pack(inputs, grad) for inputs, grad in zip(sets, grads, strict=True)]

    if case.direction == FORWARD:

        def forward(i: int):
            with torch.no_grad():
                return function(sets[i])

        return forward

    def both(i: int):
        inputs = sets[i]
        out = function(inputs)
        return out, [_written(grad) for grad in torch.autograd.grad(out, leaves(case.op, inputs, peer), grads[i])]

    return both


def _written(grad: Tensor) -> Tensor:
    """A sum's gradient may be a view of one value, which costs nothing until somebody reads it. It is written out here,
    as a leaf's gradient is."""
    return grad if all(grad.stride()) or not grad.numel() else grad.clone(memory_format=torch.contiguous_format)


# --- running -----------------------------------------------------------------------------------------------


def _tensors(inputs: Inputs) -> Iterator[Tensor]:
    for value in inputs.values():
        for item in vars(value).values() if hasattr(value, "__dataclass_fields__") else (value,):
            if isinstance(item, Tensor):
                yield item


def _input_sets(case: Case, most: int = 16) -> list[Inputs]:
    """As many random input sets as it takes to fill the last cache twice (2 to `most`, or 1)."""
    generator = torch.Generator(case.device).manual_seed(0)
    sets = [case.op.make(case.shape, case.dtype, generator)]
    if most > 2 and _slow(case, sets[0]):
        most = 2
    size = sum(t.numel() * t.element_size() for t in _tensors(sets[0]))
    count = min(most, max(2, -(-2 * environment.cache_bytes(case.device) // max(size, 1))))
    sets += [case.op.make(case.shape, case.dtype, generator) for _ in range(count - 1)]
    for inputs in sets:
        for name in (*case.op.leaves, *case.op.maps.values()):
            if inputs[name] is not None:
                inputs[name].requires_grad_(True)
    return sets


def _slow(case: Case, inputs: Inputs) -> bool:
    """Whether the eager peer's forward takes long enough for `SLOW`."""
    start = time.perf_counter()
    with torch.no_grad():
        case.op.eager(inputs)
    return time.perf_counter() - start > SLOW


def _gradients(case: Case, sets: list[Inputs]) -> list[Any]:
    """Of the outputs, where the backward is run. From a generator of their own: the default one belongs to the graphs
    that are captured."""
    if case.direction == FORWARD:
        return [None] * len(sets)
    generator = torch.Generator(case.device).manual_seed(1)
    outputs = (case.op.eager(inputs).detach() for inputs in sets)
    return [torch.empty_like(out).normal_(generator=generator) for out in outputs]


def _eager(case: Case, sets: list[Inputs], grads: list[Any]) -> Any:
    """What the eager peer makes of the first set, in our layout."""
    return _packed(case.op, sets[0], _call(case, "eager", sets, grads)(0), case.direction)


def _wrong(case: Case, variant: str, call: timing.Call, sets: list[Inputs], grads: list[Any], expected) -> str | None:
    """What a variant computes otherwise than the eager one, or why it fails; None where they agree."""

    def exact() -> Any:
        return _eager(case, [agree.widened(sets[0])], [grads[0] if grads[0] is None else grads[0].double()])

    try:
        result = call(0) if variant.startswith("maefast") else _packed(case.op, sets[0], call(0), case.direction)
        problem = agree.problem(case, result, expected, exact)
    except Exception as error:
        return _failure(error)
    return problem and f"WRONG RESULT, not timed: {problem}"


def _failure(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]


def check(case: Case, peers: tuple[str, ...]) -> list[dict]:
    """Records of the variants that fail or compute something else, on one set of inputs; nothing is timed."""
    sets = _input_sets(case, 1)
    grads = _gradients(case, sets)
    expected = _eager(case, sets, grads)
    chosen = [name for name, reason in variants(case, peers).items() if reason is None]
    found = {name: _wrong(case, name, _call(case, name, sets, grads), sets, grads, expected) for name in chosen}
    return [{**describe(case), "variant": name, "error": error} for name, error in found.items() if error]


def run(
    case: Case,
    peers: tuple[str, ...],
    rounds: int,
    limits: dict | None = None,
    warmup: float = 0.05,
    seconds: float | None = None,
    least: int = timing.LEAST,
) -> tuple[list[dict], dict[str, list[float]]]:
    """Time every variant that runs here. Returns (records, samples of each variant).

    A variant whose result differs from the eager one gets no time, only an error. limits: what `machine.measure` found
    on this device, for the share of it that each variant reaches. warmup: seconds before the first sample, on a CPU.
    seconds, least: bound of the rounds, as in `timing.interleave`; what comes before them (compilation, comparison, a
    few calls of each variant) is not in it.
    """
    if any(peer.startswith("compile") for peer in peers):
        torch._dynamo.reset()  # shapes are static, and one function compiles for a limited number of them
    sets = _input_sets(case)
    grads = _gradients(case, sets)
    expected = _eager(case, sets, grads)

    errors: dict[str, str] = {}
    peaks: dict[str, int] = {}
    samplers: dict[str, timing.HostSampler | timing.GraphSampler] = {}
    for name, reason in variants(case, peers).items():
        if reason is not None:
            errors[name] = reason
            continue
        call = _call(case, name, sets, grads)
        if problem := _wrong(case, name, call, sets, grads, expected):
            errors[name] = problem
            continue
        try:
            peaks[name] = machine.peak_bytes(lambda call=call: call(0), case.device)
            samplers[name] = timing.sampler(call, len(sets), case.device, warmup, waits(case.op, name))
        except Exception as error:
            errors[name] = _failure(error)
    del expected
    samples = timing.interleave(samplers, rounds, seconds=seconds, least=least)
    return _records(case, samplers, samples, errors, peaks, limits), samples


def one_by_one(
    case: Case, peers: tuple[str, ...], rounds: int, limits: dict | None = None, warmup: float = 0.05
) -> Iterator[dict]:
    """The records of `run`, each as soon as it is measured, the eager peer's first. Only one variant's outputs are in
    memory at a time, so large shapes fit; drift of the machine does not cancel."""
    sets = _input_sets(case)
    grads = _gradients(case, sets)
    expected = _eager(case, sets, grads)
    medians: dict[str, float] = {}
    for name, reason in sorted(variants(case, peers).items(), key=lambda item: item[0] != "eager"):
        if reason is None:
            call = _call(case, name, sets, grads)
            reason = _wrong(case, name, call, sets, grads, expected)
        if reason is None:
            try:
                clock = timing.sampler(call, len(sets), case.device, warmup)
                samples = [clock() for _ in range(rounds)]
                (record,) = _records(case, {name: clock}, {name: samples}, {}, {}, limits)
                medians[name] = record["median_s"]
                if name.startswith("maefast"):
                    ours = record["median_s"]
                    others = {peer: time for peer, time in medians.items() if not peer.startswith("maefast")}
                    record["ratios"] = {peer: time / ours for peer, time in others.items()}
                del clock
                yield record
            except Exception as error:
                reason = _failure(error)
        if reason is not None:
            yield {**describe(case), "variant": name, "error": reason}
        if case.device == "cuda":
            torch.cuda.empty_cache()


def describe(case: Case) -> dict:
    """The fields of a record that say what was run."""
    return {
        "op": case.op.name,
        "shape": case.shape.json(),
        "dtype": str(case.dtype)[6:],
        "direction": case.direction,
    }


def _records(case: Case, samplers, samples, errors, peaks, limits) -> list[dict]:
    base = describe(case)
    backward = case.direction == BOTH
    moved = _needed(case.op.traffic and case.op.traffic(case.shape, case.dtype.itemsize), backward)
    flops = _needed(case.op.flops and case.op.flops(case.shape), backward)
    least, by = machine.limit(limits, base["dtype"], moved, flops)
    records = [{**base, "variant": name, "error": reason} for name, reason in errors.items()]
    for name, seconds in samples.items():
        low, high = timing.quartiles(seconds)
        median = statistics.median(seconds)
        record = {
            **base,
            "variant": name,
            "median_s": median,
            "low_s": low,
            "high_s": high,
            "rounds": len(seconds),
            "samples_s": [float(f"{value:.4g}") for value in seconds],
            "calls_a_round": samplers[name].inner * (samplers[name].sets if case.device == "cuda" else 1),
            "input_sets": samplers[name].sets,
            "min_bytes": moved,
            "flops": flops,
        }
        if name in peaks:
            record["peak_bytes"] = peaks[name]
        if moved is not None:
            record["gb_s"] = moved / median / 1e9
        if least is not None:
            record |= {"limit": by, "limit_share": least / median}
        if samplers[name].note:
            record["note"] = samplers[name].note
        if name.startswith("maefast"):
            record["default"] = name == default_variant(case)
            peers = [peer for peer in samples if not peer.startswith("maefast")]
            record["ratios"] = {peer: timing.ratio(samples[peer], seconds) for peer in peers}
        records.append(record)
    return records


def _needed(each: tuple[int, int] | None, backward: bool) -> int | None:
    """Of a pass, from (forward, backward)."""
    return each and each[0] + (each[1] if backward else 0)
