"""Whether two variants of an op computed the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maefast.bench.micro.op import BOTH, Case

# ||out - eager|| / ||eager||; bfloat16 rounds at 2^-9 and the two sides may round in a different order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def problem(case: Case, result: Any, eager: Any, exact: Callable[[], Any] | None = None) -> str | None:
    """What differs between a result and the eager peer's, or None.

    exact: gives the eager peer's in float64, asked where the two differ by more than the tolerance. A result that is
    within the tolerance of that, or no farther than twice the eager one, is right: it may be the peer that rounds (some
    of torch's float32 sums over a million values are off by 1e-4 on one thread).
    """
    truth = None
    for i, (what, a, b) in enumerate(_pairs(case, result, eager)):
        if a.shape != b.shape:
            return f"{what}: shape {tuple(a.shape)} instead of {tuple(b.shape)}"
        if not a.is_floating_point():
            if not torch.equal(a.long(), b.long()):
                return f"{what}: indices differ"
            continue
        error = _error(a, b)
        if error < TOLERANCE[case.dtype]:
            continue
        if exact is not None:
            truth = truth or _pairs(case, exact(), eager)
            right = truth[i][1]
            if _error(a, right) <= max(TOLERANCE[case.dtype], 2 * _error(b, right)):
                continue
        return f"{what}: relative error {error:.1e}"
    return None


def _pairs(case: Case, one: Any, other: Any) -> list[tuple[str, Tensor, Tensor]]:
    if case.direction == BOTH:
        (one, grads), (other, other_grads) = one, other
        names = (f"grad {i} of {', '.join(case.op.leaves)}" for i in range(len(other_grads)))
        return [("output", one, other), *zip(names, grads, other_grads, strict=True)]
    return [("output", a, b) for a, b in zip(case.op.view(one), case.op.view(other), strict=True)]


def _error(a: Tensor, b: Tensor) -> float:
    """Not a number where either holds one, which is below nothing."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in float64."""

    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    return {name: wide(value) for name, value in inputs.items()}
