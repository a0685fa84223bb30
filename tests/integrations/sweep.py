"""Changes to everything that a model might read: each method, on the object and on its class, each plain attribute,
each part, exchanged for one of another class.

Found without asking maefast's guards what they watch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from maefast.integrations import _sites, _swap
from maefast.nn.cells import Cells

HIDDEN = {"training", _swap.SETTINGS, "_maefast_report", "call_super_init", "dump_patches", "T_destination"}


class Change(NamedTuple):
    """What is done to the object at `path` (an attribute of it, after a colon): `apply(model)` is a context."""

    name: str
    apply: Callable


def find(model: nn.Module, path: str) -> object:
    path, _, attribute = path.partition(":")
    module = model.get_submodule(path)
    return getattr(module, attribute) if attribute else module


def changes(model: nn.Module) -> Iterator[Change]:
    """One object of each kind under each child of the model."""
    seen = set()
    for path, module in model.named_modules():
        key = (path.partition(".")[0] if path else "", _sites.base_of(module))
        if key in seen:
            continue
        seen.add(key)
        if path:
            yield Change(f"{path} exchanged", _exchanged(path))
        yield from methods(path, module)
        yield from values(path, module)
        config = vars(module).get("config")
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            yield from values(f"{path}:config", config)


def methods(path: str, module: nn.Module) -> Iterator[Change]:
    """Every method of the model's own classes gives other numbers."""
    for kind in _sites.base_of(module).__mro__:
        if kind.__module__.startswith(("torch.", "transformers.modeling_utils", "transformers.integrations")):
            continue
        for name, function in vars(kind).items():
            if isinstance(function, FunctionType) and not name.startswith("__") and name not in ("get_submodule",):
                yield Change(f"{path}.{name} on the object", _on_object(path, name, function))
                yield Change(f"{kind.__name__}.{name}", _on_class(kind, name, function))


def _exchanged(path: str) -> Callable:
    """For a copy whose class has another forward, with the same parameters and parts."""

    @contextmanager
    def apply(model):
        parent, _, name = path.rpartition(".")
        parts = model.get_submodule(parent)._modules
        before, kind = parts[name], _sites.base_of(parts[name])
        new = copy.copy(before)
        vars(new).pop(_swap.SETTINGS, None)
        new.__class__ = type(kind.__name__, (kind,), {"forward": other(kind.forward)})
        parts[name] = new
        try:
            yield
        finally:
            parts[name] = before

    return apply


def other(function: FunctionType) -> FunctionType:
    def changed(self, *args, **kwargs):
        return tree_map_only((Tensor, Cells), _other_numbers, function(self, *args, **kwargs))

    return changed


def _other_numbers(t: Tensor | Cells) -> Tensor | Cells:
    return t * 1.5 if isinstance(t, Cells) or t.is_floating_point() else t


def _on_object(path: str, name: str, function: FunctionType) -> Callable:
    @contextmanager
    def apply(model):
        module = model.get_submodule(path)
        before = vars(module).get(name)
        vars(module)[name] = MethodType(other(function), module)
        try:
            yield
        finally:
            del vars(module)[name]
            if before is not None:
                vars(module)[name] = before

    return apply


def _on_class(kind: type, name: str, function: FunctionType) -> Callable:
    @contextmanager
    def apply(model):
        setattr(kind, name, other(function))
        try:
            yield
        finally:
            setattr(kind, name, function)

    return apply


def values(path: str, thing: object) -> Iterator[Change]:
    for name, value in vars(thing).items():
        if name in HIDDEN or name.startswith("_"):
            continue
        if isinstance(value, bool):
            new = not value
        elif isinstance(value, int):
            new = value + 1
        elif isinstance(value, float):
            new = value * 1.5 + 0.1
        else:
            continue
        yield Change(f"{path}.{name} = {new}", _value(path, name, new))


def _value(path: str, name: str, new: object) -> Callable:
    @contextmanager
    def apply(model):
        own = vars(find(model, path))
        before, own[name] = own[name], new
        try:
            yield
        finally:
            own[name] = before

    return apply


def outcome(run: Callable[[], tuple], model: nn.Module) -> tuple | Exception:
    """What a training step gives: outputs and gradients, or the exception."""
    model.zero_grad()
    try:
        return run()
    except Exception as error:
        return error


def alike(got: object, want: object, tolerance: float) -> bool:
    """Equal outputs and gradients, up to rounding, or both refused."""
    if isinstance(want, Exception) or isinstance(got, Exception):
        return isinstance(want, Exception) and isinstance(got, Exception)
    if len(got) != len(want):
        return False
    scale = max((b.detach().to_dense().double().norm().item() for b in want if b is not None), default=1.0)
    for a, b in zip(got, want):
        if (a is None) != (b is None):
            return False
        if a is not None and not _close(a, b, tolerance, scale):
            return False
    return True


def _close(a: Tensor, b: Tensor, tolerance: float, scale: float) -> bool:
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    a, b = (t.detach().to_dense().double() for t in (a, b))  # an embedding may be told to give sparse gradients
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    return (a - b).norm().item() <= tolerance * max(b.norm().item(), 1e-3 * scale)
