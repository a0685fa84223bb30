"""A kernel against the reference in float64: the error of the output and of every gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.ops.common import TOLERANCE, relative_error


def poison() -> None:
    """From here on every output that a kernel allocates starts as NaN, so that what it does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def as_list(out: object) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for t in out if t is not None]


def results(call: Callable, backend: str, device: str, inputs: dict[str, Tensor], weights) -> list[Tensor | None]:
    """Outputs, then the gradient of each input (None: the outputs do not depend on it)."""
    outs = as_list(call(backend, device, **inputs))
    differentiable = [t for t in outs if t.requires_grad]
    if not differentiable:
        return outs
    grads = [w.to(t) for w, t in zip(weights(outs), outs) if t.requires_grad]
    return outs + list(torch.autograd.grad(differentiable, list(inputs.values()), grads, allow_unused=True))


def errors(
    call: Callable, inputs: dict[str, Tensor], backend: str, device: str, dtype: torch.dtype, emulate: bool = False
) -> dict[str, float]:
    """Relative error of each output and gradient of `call(backend, device, **inputs)`.

    Args:
        inputs: float32 tensors on the CPU; both sides start from them as rounded to `dtype`.
        emulate: compute in float32 and round the results to `dtype`, for a machine that cannot run a kernel in it: the
            error is that of a kernel whose sums are float32 and whose results are rounded once.

    Raises:
        AssertionError: a result has another shape or dtype, or differs between two runs on a GPU.
    """
    rounded = {name: value.to(dtype) for name, value in inputs.items()}
    held = torch.float32 if emulate else dtype
    low = {name: value.to(device, held).requires_grad_() for name, value in rounded.items()}
    high = {name: value.double().requires_grad_() for name, value in rounded.items()}

    def weights(outs: list[Tensor]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)  # not that of the inputs: x against x would cancel
        return [torch.randn(t.shape, generator=generator).to(dtype) for t in outs]

    got = results(call, backend, device, low, weights)
    want = results(call, "reference", "cpu", high, weights)
    if device == "cuda":
        for a, b in zip(got, results(call, backend, device, low, weights)):
            same = a is b is None or torch.equal(
                a.nan_to_num(7) if a.is_floating_point() else a, b.nan_to_num(7) if b.is_floating_point() else b
            )
            assert same, "two runs differ"
    names = [f"output {i}" for i in range(len(want))]
    if len(want) > len(inputs) and any(t.requires_grad for t in want if t is not None):
        names = [*(f"output {i}" for i in range(len(want) - len(inputs))), *(f"gradient of {n}" for n in inputs)]
    found = {}
    for name, a, b in zip(names, got, want, strict=True):
        if a is None and b is None:
            continue
        if b is None:
            b = torch.zeros(a.shape, dtype=torch.float64)
        assert a is not None, f"{name} is missing"
        if not a.is_floating_point():
            found[name] = 0.0 if torch.equal(a.cpu().long(), b.long()) else float("inf")
            continue
        found[name] = relative_error(a.to(dtype) if emulate else a, b)
    return found


def too_large(found: dict[str, float], dtype: torch.dtype) -> str:
    """What is beyond the tolerance of docs/numerics.md, or ''."""
    bound = TOLERANCE[dtype]
    return "; ".join(
        f"{name}: relative error {e:.3g}, allowed {bound:g}" for name, e in found.items() if not e <= bound
    )
