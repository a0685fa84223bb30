"""Whether accelerated code computes what the model's own code does: both run on the same small input.

A name and a structure do not prove what a fork of a fork computes. So `accelerate` compares outputs, gradients, the
numbers drawn and what is written to buffers and attributes before it trusts its own code with a part of a model: while
training and evaluating, with fresh random weights (neither zeros, NaN nor layer scales of 1e-5 hide a difference
then), with the model's own choice of frozen parameters and with none frozen. The model is left as it was, and its hooks
are set aside meanwhile.
"""

# ruff: noqa: NPY002  the models in question draw from numpy's global generator

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves

from maefast.integrations import _explain, _worth
from maefast.integrations._guards import HOOKS, same
from maefast.integrations._steps import inputs
from maefast.integrations._swap import around, methods, own, plain

# Relative error (Frobenius) of outputs and gradients that rounding explains.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
SMALL = 2**17  # parameters of up to this many values have their gradients compared whole, larger ones by projections
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)
_OWN_STATE = ("_parameters", "_buffers", "_modules", "training", "_maefast_settings", "_maefast_report", *HOOKS)


class Mismatch(Exception):
    """The accelerated code computes something else, or could not be compared. `detail` is the traceback of an error."""

    detail = ""


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


def agreement(
    module: nn.Module, call: Callable[[], Any], fresh: dict[int, nn.Parameter] | None = None
) -> tuple[float, bool | None]:
    """Compare the original and the accelerated code of `module`, training and evaluating, with random weights.

    Args:
        call: runs the module on a small input, and returns what is compared. fresh: random parameters made before, for
            the same model; more are kept there.

    Returns:
        The largest relative difference found, and the only mode that may run accelerated (training or not; None: both).

    Raises:
        Mismatch: what differs, by more than rounding, in both modes or as soon as other parameters are frozen.
    """
    fresh = {} if fresh is None else fresh

    def run(training: bool, thawed: bool) -> float | Mismatch:
        try:
            with mode(module, training):
                return compare(module, call, fresh, thawed)
        except Mismatch as mismatch:
            return mismatch

    trained, evaluated = run(True, True), run(False, False)
    if isinstance(trained, float) and isinstance(evaluated, float):
        return max(trained, evaluated), None
    if isinstance(trained, float) and isinstance(run(True, False), float):
        return trained, True
    if isinstance(evaluated, float) and isinstance(run(False, True), float):
        return evaluated, False
    raise trained if isinstance(trained, Mismatch) else evaluated


@contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Inside, all parts train, or all evaluate."""
    before = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in before:
            part.training = training
        yield
    finally:
        for part, was in before:
            part.training = was


def compare(
    module: nn.Module, call: Callable[[], Any], fresh: dict[int, nn.Parameter] | None = None, thawed: bool = False
) -> float:
    """Run `call` on the original and on the accelerated code of `module`, as it is or with `fresh` random parameters,
    which are kept there for the next comparison; `thawed`: with gradients of all of them.

    Returns:
        The largest relative difference found.

    Raises:
        Mismatch: what differs by more than rounding.
    """
    with (
        whole(module, fresh, thawed),
        _no_global_hooks(),
        _nothing_around(module),
        _no_checkpoints(module),
        _worth.always(),
        _same_state(module) as state,
    ):
        with plain():
            want = _attempt(True, module, call, state, thawed or fresh is None)
        state.again()
        got = _attempt(False, module, call, state, thawed or fresh is None)
        return _difference(module, want, got)


def returned(module: nn.Module, call: Callable[[], Any]) -> Any:
    """What `call` gives with the module's own code, on random weights; None where that raises."""
    with (
        whole(module, {}),
        _no_global_hooks(),
        _no_checkpoints(module),
        _same_state(module),
        plain(),
        torch.no_grad(),
        inputs(),
    ):
        try:
            return call()
        except Exception:  # the comparison will say
            return None


def _attempt(own: bool, module: nn.Module, call: Callable[[], Any], state: _State, every: bool) -> tuple:
    """(outputs, gradients, random state, what was written); gradients of `every` parameter, or of small ones."""
    device = example(module).device
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False), _full_float32(), inputs() as given:
            leaves = tree_leaves(call())
            return leaves, _gradients(module, given, leaves, every), _drawn(device), state.written()
    except Exception as error:
        mismatch = Mismatch(_explain.raised(own, error))
        mismatch.detail = traceback.format_exc()
        raise mismatch from error


@contextmanager
def _no_checkpoints(module: nn.Module) -> Iterator[None]:
    """Inside, no layer of transformers is checkpointed: the reentrant kind refuses the gradients that are compared."""
    kept = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False) is True]
    try:
        for part in kept:
            part.gradient_checkpointing = False
        yield
    finally:
        for part in kept:
            part.gradient_checkpointing = True


@contextmanager
def _no_global_hooks() -> Iterator[None]:
    kept = [(name, getattr(torch_module, name).copy()) for name in _GLOBAL_HOOKS]
    try:
        for name, _ in kept:
            getattr(torch_module, name).clear()
        yield
    finally:
        for name, hooks in kept:
            getattr(torch_module, name).update(hooks)


@contextmanager
def _nothing_around(module: nn.Module) -> Iterator[None]:
    """Without what calls replaced methods from the object, as Accelerate's autocast, which rounds what is compared."""
    kept = [(part, name) for part in module.modules() for name in methods(part)]
    kept = [(part, name, vars(part)[name]) for part, name in kept if around(part, name) and not own(part, name)]
    try:
        for part, name, _ in kept:
            del vars(part)[name]
        yield
    finally:
        for part, name, value in kept:
            vars(part)[name] = value


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


def _gradients(module: nn.Module, given: list[Tensor], leaves: list, every: bool) -> dict[str, Tensor | None]:
    scored = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    wanted = {n: p for n, p in module.named_parameters() if p.requires_grad and (every or p.numel() <= SMALL)}
    if not scored or not (wanted or given):
        return {}
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for t in scored:
        weight = torch.randn(t.shape, generator=generator).to(t.device)
        total = total + (t.to(torch.promote_types(t.dtype, torch.float32)) * weight).sum()
    wanted |= {f"input {i}": t for i, t in enumerate(given) if t.requires_grad}
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {name: None if g is None else _projected(g) for name, g in zip(wanted, found)}


def _projected(grad: Tensor) -> Tensor:
    """A gradient, or random projections of the rows of a large one."""
    if grad.numel() <= SMALL or grad.ndim < 2:
        return grad
    rows = grad.flatten(1) if len(grad) > 1 else grad.flatten(0, -2)
    return rows @ torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(2)).to(rows)


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
    for name in {**want[3], **got[3]}:
        if not _written_alike(want[3].get(name), got[3].get(name), tolerance):
            raise Mismatch(f"it writes {name}, which the accelerated code does not, or not as it does")
    return max(worst, _gradient_difference(want[1], got[1], tolerance))


def _written_alike(a: object, b: object, tolerance: float) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype is b.dtype and _relative(a, b) <= tolerance
    return same(a, b)


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
def whole(module: nn.Module, fresh: dict[int, nn.Parameter] | None = None, thawed: bool = False) -> Iterator[None]:
    """Inside, parameters that are not here are random ones of the full size, and no hooks would gather them.

    With `fresh` all of them are random, none of 16 bits, and no hook is called; it keeps them, by the id of the model's
    own. `thawed` has all of them require gradients.
    """
    if fresh is None and not any(map(_lacking, (*module.parameters(), *module.buffers()))):
        yield
        return
    made = {} if fresh is None else fresh
    names = ("_parameters", "_buffers", *HOOKS)
    kept = [(part, {name: vars(part)[name] for name in names}) for part in module.modules()]
    try:
        for part, old in kept:
            vars(part).update({name: {} for name in names})
            for key, p in old["_parameters"].items():
                if p is not None and (
                    _lacking(p) or (fresh is not None and type(p) is nn.Parameter and p.is_floating_point())
                ):
                    if id(p) not in made:
                        made[id(p)] = nn.Parameter(_random_like(p, key, fresh is not None))
                    p = made[id(p)].requires_grad_(thawed or p.requires_grad)
                part._parameters[key] = p
            for key, b in old["_buffers"].items():
                if _lacking(b):
                    b = _random_like(b, key, fresh is not None)
                elif fresh is not None and b is not None and b.is_floating_point():
                    b = b.to(torch.promote_types(b.dtype, torch.float32))
                part._buffers[key] = b
        yield
    finally:
        for part, old in kept:
            vars(part).update(old)


def _random_like(tensor: Tensor, name: str, wide: bool) -> Tensor:
    """Weights of matrices that keep a unit variance, scales around one, biases around zero, tables of half a unit."""
    device = "cpu" if tensor.is_meta else tensor.device
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    if tensor.ndim < 2:
        scale = 0.3
    elif tensor.ndim == 3 and len(tensor) == 1:  # tokens and positions
        scale = 0.5
    else:
        scale = max(1, tensor[0].numel()) ** -0.5
    value = torch.empty(tensor.shape, device=device).uniform_(-1, 1).mul_(3**0.5 * scale)
    if tensor.ndim < 2 and "bias" not in name:
        value += 1
    return value.to(torch.promote_types(tensor.dtype, torch.float32) if wide else tensor.dtype)


@contextmanager
def same_random_state(module: nn.Module) -> Iterator[None]:
    """Afterwards torch's generators are where they were."""
    cuda = any(p.is_cuda for p in module.parameters())
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):  # manual_seed seeds them all
        yield


class _State:
    """Buffers and plain attributes of a module and its parts, as they were, with fixed random states to start from."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.buffers = {name: b.clone() for name, b in module.named_buffers()}
        self.versions = {name: _version(p) for name, p in module.named_parameters()}
        self.attributes = [(path, part, _copied(part)) for path, part in module.named_modules()]

    def again(self) -> None:
        self.versions = {name: _version(p) for name, p in self.module.named_parameters()}
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # the public FCMAE draws its stochastic depth there
        self.restore()

    def written(self) -> dict[str, Any]:
        """What has changed: name -> value now."""
        found = {}
        for name, buffer in self.module.named_buffers():
            if not _equal(buffer, self.buffers.get(name)):
                found[name] = buffer.clone()
        for name, p in self.module.named_parameters():
            if _version(p) != self.versions.get(name):
                found[name] = "written in place"
        for path, part, before in self.attributes:
            now = _copied(part)
            for name in {**before, **now}:
                if name not in now or name not in before or not same(before[name][1], now[name][1]):
                    found[f"{path}.{name}" if path else name] = now.get(name, (None, None))[1]
        return found

    @torch.no_grad()
    def restore(self) -> None:
        for name, buffer in self.module.named_buffers():
            # One that nobody wrote may be of inference mode, or wait for a backward.
            if name in self.buffers and not _equal(buffer, self.buffers[name]):
                buffer.copy_(self.buffers[name])
        for _, part, before in self.attributes:
            own = vars(part)
            for name in [n for n in own if n not in before and n not in _OWN_STATE]:
                del own[name]
            for name, (value, copy) in before.items():
                if copy is not value:  # filled in place
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(copy)
                own[name] = value


def _version(tensor: Tensor) -> int:
    """How often it was written in place; tensors of inference mode do not count that."""
    return -1 if tensor.is_inference() else tensor._version


def _equal(buffer: Tensor, before: Tensor | None) -> bool:
    return before is not None and before.shape == buffer.shape and torch.equal(before, buffer)


def _copied(part: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Plain attributes: name -> (value, a copy of it where it may be changed in place)."""
    return {
        name: (value, value.copy() if isinstance(value, (list, dict, set)) else value)
        for name, value in vars(part).items()
        if name not in _OWN_STATE
    }


@contextmanager
def _same_state(module: nn.Module) -> Iterator[_State]:
    """Fixed random states inside, restored afterwards with buffers and attributes; `again` starts over."""
    python, legacy = random.getstate(), np.random.get_state()
    state = _State(module)
    with same_random_state(module):
        state.again()
        try:
            yield state
        finally:
            state.restore()
            random.setstate(python)
            np.random.set_state(legacy)
