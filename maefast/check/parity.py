"""Whether a model computes the same before and after `accelerate`: outputs, gradients and random draws of one call.

In float32 the two are held against each other. In 16 bits both round, so each is held against the model's own code in
float32: right is what is no farther from that than twice the model's own code is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maefast.errors import ConfigError
from maefast.graphs.step import scalar
from maefast.integrations._verify import TOLERANCE, _drawn, _full_float32, _relative
from maefast.profiling.state import unchanged

SEED = 1
# In 16 bits: what twice the distance of the model's own code from float32 may not be held to be less than.
NARROW = 1e-2
# A gradient whose norm is a smaller share of the largest one's is measured by this share of it: some are zero but for
# rounding (the bias of keys), and have no relative error. In 32 bits, in 16 bits.
SMALL = 1e-3, 1e-1

Run = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Difference:
    """The largest relative difference between the two in one respect.

    Attributes:
        what: "outputs", "gradients" or "random numbers", and of what. value: infinite where shapes, dtypes or numbers
            do not go together. where: in which output or parameter, or why. allowed: what rounding explains.
    """

    what: str
    value: float
    where: str
    allowed: float

    @property
    def equal(self) -> bool:
        return self.value <= self.allowed


def seed() -> None:
    """Every generator that a model may draw from, as they are before each call."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  the models in question draw from numpy's global generator


def cast(device: str, narrow: bool) -> AbstractContextManager:
    return torch.autocast(device, torch.bfloat16) if narrow else nullcontext()


def tensors(output: Any) -> list[Tensor]:
    """Those in what a model returns, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        parts: Any = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif is_dataclass(output) and not isinstance(output, type):
        parts = vars(output).values()
    else:
        return []
    return [tensor for part in parts for tensor in tensors(part)]


def loss(output: Any) -> Tensor | None:
    """What a model says is its loss: alone, first or as .loss."""
    try:
        return scalar(output)
    except TypeError:
        return None


def weights(output: Any) -> list[Tensor]:
    """A fixed random number for each value in the floating tensors of an output.

    Raises:
        ConfigError: there are no such tensors.
    """
    generator = torch.Generator().manual_seed(SEED)
    found = [torch.randn(t.shape, generator=generator).to(t.device) for t in _floating(output)]
    if not found:
        raise ConfigError(f"the model returns a {type(output).__name__} without a floating tensor")
    return found


def weighted(output: Any, by: list[Tensor] | None = None) -> Tensor:
    """A scalar that depends on all floating tensors in an output: their sum, weighted by fixed random numbers."""
    by = weights(output) if by is None else by
    parts = ((t.to(torch.promote_types(t.dtype, torch.float32)) * w).sum() for t, w in zip(_floating(output), by))
    return torch.stack([part.double() for part in parts]).sum()


def _floating(output: Any) -> list[Tensor]:
    return [t for t in tensors(output) if t.is_floating_point()]


@dataclass
class Result:
    """Of one call: outputs, gradients by name ({}: none were asked for), and the state of the generators."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    drawn: tuple


def compare(own: nn.Module, fast: nn.Module, run: Run, device: str, narrow: bool, training: bool) -> list[Difference]:
    """Both from the same random state.

    Args:
        run: calls a model. narrow: under autocast to bfloat16. training: with gradients: those of its loss where it
            returns one, and those of all that it returns.

    Raises:
        ConfigError: the model's own results are not finite. NaN equals anything that is NaN too, so they show nothing.
    """
    found: list[Difference] = []
    for what, score in _scores(own, run, device, narrow, training):
        with _full_float32():
            want = _result(own, run, score, device, narrow)
            got = _result(fast, run, score, device, narrow)
            exact = _result(own, run, score, device, False) if narrow else None
        _must_be_finite(want, what)
        if exact is not None:
            _must_be_finite(exact, what)
        if not found:
            found.append(_outputs(want, got, exact))
            found.append(_draws(want, got))
        if score is not None:
            found.append(_gradients(f"gradients of {what}", want, got, exact))
    return found


Score = Callable[[Any], Tensor]


def _scores(own: nn.Module, run: Run, device: str, narrow: bool, training: bool) -> list[tuple[str, Score | None]]:
    """What is differentiated: nothing, the loss, all outputs."""
    with unchanged(own, None), torch.set_grad_enabled(training), cast(device, narrow):
        seed()
        output = run(own)
        total, alone = weighted(output), loss(output)
    if not total.requires_grad:
        return [("", None)]
    if alone is None or not alone.requires_grad:
        return [("all outputs", weighted)]
    others = sum(t.requires_grad for t in tensors(output)) > 1
    return [("the loss", scalar), ("all outputs", weighted)][: 1 + others]


def _result(model: nn.Module, run: Run, score: Score | None, device: str, narrow: bool) -> Result:
    """The model is left as it was, whatever its forward counts or averages in buffers."""
    with unchanged(model, None), torch.set_grad_enabled(score is not None):
        seed()
        with cast(device, narrow):
            output = run(model)
            total = None if score is None else score(output)
        state, gradients = _drawn(torch.device(device)), {}
        if total is not None:
            total.backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return Result([t.detach() for t in tensors(output)], gradients, state)


def _must_be_finite(result: Result, what: str) -> None:
    """Of outputs a part may be infinite, as scores of what is masked are."""
    wrong = [
        f"outputs (output {number})"
        for number, tensor in enumerate(result.outputs)
        if tensor.numel() and (tensor.isnan().any() or not tensor.isfinite().any())
    ]
    gradients = ((name, g) for name, g in result.gradients.items() if g is not None)
    wrong += [f"gradients of {what} ({name})" for name, gradient in gradients if not gradient.isfinite().all()]
    if wrong:
        raise ConfigError(
            f"as it is, the model's {wrong[0]} are NaN or infinite, so nothing can be compared: give it another input "
            "(--input, --batch)"
        )


def _draws(want: Result, got: Result) -> Difference:
    if want.drawn == got.drawn:
        return Difference("random numbers", 0.0, "", 0.0)
    return Difference("random numbers", float("inf"), "other ones are drawn", 0.0)


def _outputs(want: Result, got: Result, exact: Result | None) -> Difference:
    if len(want.outputs) != len(got.outputs):
        text = f"{len(got.outputs)} tensors instead of {len(want.outputs)}"
        return Difference("outputs", float("inf"), text, 0.0)
    for number, (a, b) in enumerate(zip(want.outputs, got.outputs)):
        if a.shape != b.shape or a.dtype is not b.dtype:
            text = f"output {number} is {b.dtype} {list(b.shape)} instead of {a.dtype} {list(a.shape)}"
            return Difference("outputs", float("inf"), text, 0.0)
    off = {}
    for number, (a, b) in enumerate(zip(want.outputs, got.outputs)):
        allowed, right = TOLERANCE.get(a.dtype, TOLERANCE[torch.float32]), a
        if exact is not None:
            right = exact.outputs[number]
            allowed = max(NARROW, 2 * _relative(right, a))
        off[f"output {number}"] = _relative(right, b), allowed
    return _worst("outputs", off)


def _gradients(what: str, want: Result, got: Result, exact: Result | None) -> Difference:
    for name, a in want.gradients.items():
        if (a is None) != (got.gradients.get(name) is None):
            return Difference(what, float("inf"), f"{name} has one in only one of the two", 0.0)
    right = want if exact is None else exact
    largest = max((g.double().norm().item() for g in right.gradients.values() if g is not None), default=0.0)
    least = SMALL[exact is not None] * largest
    off = _distances(right, got, least)
    dtype = next((g.dtype for g in want.gradients.values() if g is not None), torch.float32)
    allowed = 10 * TOLERANCE.get(dtype, TOLERANCE[torch.float32])
    if exact is not None:
        allowed = max(NARROW, 2 * max(_distances(right, want, least).values(), default=0.0))
    return _worst(what, {name: (value, allowed) for name, value in off.items()})


def _distances(right: Result, other: Result, least: float) -> dict[str, float]:
    """Of each gradient, over its norm or `least`, whichever is larger."""
    pairs = ((name, t, other.gradients[name]) for name, t in right.gradients.items() if t is not None)
    return {name: _distance(t, g, least) for name, t, g in pairs if g is not None}


def _distance(right: Tensor, other: Tensor, least: float) -> float:
    if not other.isfinite().all():
        return float("inf")
    right, other = right.double(), other.double()
    return (right - other).norm().item() / max(right.norm().item(), least, 1e-30)


def _worst(what: str, off: dict[str, tuple[float, float]]) -> Difference:
    """Of (value, what is allowed) by place, the one that is farthest from what is allowed."""
    if not off:
        return Difference(what, 0.0, "", 0.0)
    where = max(off, key=lambda name: -1.0 if off[name][1] == math.inf else off[name][0] / off[name][1])
    return Difference(what, off[where][0], where, off[where][1])
