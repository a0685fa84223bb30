"""Whether accelerated code computes what the model's own code does: both run on the same small input.

A name and a structure do not prove what a fork of a fork computes. So `accelerate` compares outputs, gradients and the
numbers drawn before it trusts its own code with a part of a model.
"""

# ruff: noqa: NPY002  the models in question draw from numpy's global generator

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from maefast.integrations._swap import plain

# Relative error (Frobenius) of outputs and gradients that rounding explains.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
SMALL = 2**17  # parameters of up to this many values have their gradients compared: every layer has some


class Mismatch(Exception):
    """The accelerated code computes something else, or the model could not be run on the probe."""


def example(module: nn.Module) -> Tensor | None:
    """A floating parameter that says device and dtype."""
    return next((p for p in module.parameters() if p.is_floating_point()), None)


def unsuitable(module: nn.Module) -> str | None:
    """Why `module` cannot be run here and now, or None."""
    if example(module) is None:
        return "it has no parameters"
    if any(_flattened(p) for p in module.parameters()):
        return "FSDP1 has flattened its parameters"
    return None


def _flattened(parameter: Tensor) -> bool:
    """By FSDP1, or the part of an original parameter that it leaves in its place."""
    empty = parameter.numel() == 0 and not _lacking(parameter)
    return empty or type(parameter).__name__ == "FlatParameter" or hasattr(parameter, "_fsdp_flattened")


def compare(module: nn.Module, call: Callable[[], Any], fresh: bool = False) -> float:
    """Run `call` on the original and on the accelerated code of `module`; `fresh` gives it random parameters meanwhile.

    Returns:
        The largest relative difference found.

    Raises:
        Mismatch: what differs by more than rounding: outputs, gradients of small parameters, or the numbers drawn.
    """
    with whole(module, fresh), _same_state(module) as again:
        with plain():
            want = _attempt("the model's own code", module, call)
        again()
        got = _attempt("the accelerated code", module, call)
    return _difference(module, want, got)


def _attempt(whose: str, module: nn.Module, call: Callable[[], Any]) -> tuple:
    device = example(module).device
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False), _full_float32():
            leaves = tree_leaves(call())
            return leaves, _gradients(module, leaves), _drawn(device)
    except Exception as error:
        raise Mismatch(f"{whose} raised {type(error).__name__} on a small random input: {error}") from error


@contextmanager
def _full_float32() -> Iterator[None]:
    """Without TF32, whose rounding differs from one library to the next by more than the tolerance."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = False
        yield
    finally:
        for flag, value in zip(flags, before):
            flag.allow_tf32 = value


def _gradients(module: nn.Module, leaves: list) -> dict[str, Tensor | None]:
    scored = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    small = {n: p for n, p in module.named_parameters() if p.requires_grad and p.numel() <= SMALL}
    if not scored or not small:
        return {}
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for t in scored:
        weight = torch.randn(t.shape, generator=generator).to(t.device)
        total = total + (t.to(torch.promote_types(t.dtype, torch.float32)) * weight).sum()
    return dict(zip(small, torch.autograd.grad(total, list(small.values()), allow_unused=True)))


def _drawn(device: torch.device) -> tuple:
    state = [torch.get_rng_state()]
    if device.type == "cuda":
        state.append(torch.cuda.get_rng_state(device))
    _, keys, position, *_ = np.random.get_state()
    return tuple(bytes(s.numpy()) for s in state), random.getstate(), keys.tobytes(), position


def _difference(module: nn.Module, want: tuple, got: tuple) -> float:
    tolerance = TOLERANCE.get(example(module).dtype, 1e-4)
    if len(want[0]) != len(got[0]):
        raise Mismatch(f"the model's own code returns {len(want[0])} values, the accelerated {len(got[0])}")
    worst = 0.0
    for i, (a, b) in enumerate(zip(want[0], got[0])):
        if not isinstance(a, Tensor):
            if a is not b and a != b:
                raise Mismatch(f"output {i} is {a!r}, and {b!r} accelerated")
            continue
        if a.is_meta or b.is_meta:
            raise Mismatch(f"output {i} is on the meta device, where nothing can be compared")
        if a.shape != b.shape or a.dtype is not b.dtype:
            raise Mismatch(f"output {i} is {a.dtype} {tuple(a.shape)}, and {b.dtype} {tuple(b.shape)} accelerated")
        error = _relative(a, b)
        if not error <= tolerance:
            raise Mismatch(f"output {i} differs by {error:.1e} (relative)")
        worst = max(worst, error)
    if want[2] != got[2]:
        raise Mismatch("the accelerated code draws other random numbers")
    return max(worst, _gradient_difference(want[1], got[1], tolerance))


def _relative(a: Tensor, b: Tensor) -> float:
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    a, b = a.detach().double(), b.detach().double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = torch.nan_to_num(a, 0, 0, 0), torch.nan_to_num(b, 0, 0, 0)
    return ((a - b).norm() / a.norm().clamp(min=1e-30)).item()


def _gradient_difference(want: dict, got: dict, tolerance: float) -> float:
    if want.keys() != got.keys():
        raise Mismatch("gradients reach the outputs of only one of the two")
    worst, largest = 0.0, max((g.norm().item() for g in want.values() if g is not None), default=0.0)
    for name, a in want.items():
        b = got[name]
        if (a is None) != (b is None):
            raise Mismatch(f"the gradient of {name} exists in only one of the two")
        # Some gradients are zero but for rounding (the bias of keys): they have no relative error.
        if a is None or a.norm().item() < 1e-4 * largest:
            continue
        error = _relative(a, b)
        if not error <= 10 * tolerance:
            raise Mismatch(f"the gradient of {name} differs by {error:.1e} (relative)")
        worst = max(worst, error)
    return worst


def _lacking(tensor: Tensor | None) -> bool:
    """Whether a parameter or buffer has no values of its own here: on the meta device, or sharded by FSDP2."""
    return tensor is not None and (tensor.is_meta or type(tensor.data).__name__ == "DTensor")


@contextmanager
def whole(module: nn.Module, fresh: bool = False) -> Iterator[None]:
    """Inside, parameters that are not here are random ones of the full size, and no hooks would gather them.

    `fresh` makes all of them random and none of 16 bits: neither layer scales of 1e-5, nor projections that start at
    zero, nor coarse rounding can hide a difference then.
    """
    if not fresh and not any(map(_lacking, (*module.parameters(), *module.buffers()))):
        yield
        return
    names = (
        "_parameters",
        "_buffers",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    )
    kept = [(part, {name: vars(part)[name] for name in names}) for part in module.modules()]
    tied: dict[int, nn.Parameter] = {}
    try:
        for part, old in kept:
            vars(part).update({name: {} for name in names})
            for key, p in old["_parameters"].items():
                if p is not None and (_lacking(p) or (fresh and type(p) is nn.Parameter and p.is_floating_point())):
                    p = tied.setdefault(id(p), nn.Parameter(_random_like(p, key, fresh), fresh or p.requires_grad))
                part._parameters[key] = p
            for key, b in old["_buffers"].items():
                if _lacking(b):
                    b = _random_like(b, key, fresh)
                elif fresh and b is not None and b.is_floating_point():
                    b = b.to(torch.promote_types(b.dtype, torch.float32))
                part._buffers[key] = b
        yield
    finally:
        for part, old in kept:
            vars(part).update(old)


def _random_like(tensor: Tensor, name: str, wide: bool) -> Tensor:
    """Weights of matrices that keep a unit variance, scales around one, biases around zero."""
    device = "cpu" if tensor.is_meta else tensor.device
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    value = torch.randn(tensor.shape, device=device)
    if tensor.ndim > 1:
        value *= max(1, tensor[0].numel()) ** -0.5
    else:
        value = 0.3 * value + (0 if "bias" in name else 1)
    return value.to(torch.promote_types(tensor.dtype, torch.float32) if wide else tensor.dtype)


@contextmanager
def same_random_state(module: nn.Module) -> Iterator[None]:
    """Afterwards torch's generators are where they were."""
    cuda = any(p.is_cuda for p in module.parameters())
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):  # manual_seed seeds them all
        yield


@contextmanager
def _same_state(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Fixed random states inside, restored afterwards with the module's buffers; the value starts over again."""
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    python, legacy = random.getstate(), np.random.get_state()

    def again() -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # the public FCMAE draws its stochastic depth there
        _restore(module, buffers)

    with same_random_state(module):
        again()
        try:
            yield again
        finally:
            _restore(module, buffers)
            random.setstate(python)
            np.random.set_state(legacy)


@torch.no_grad()
def _restore(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in module.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
