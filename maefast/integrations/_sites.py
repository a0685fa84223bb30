"""What the original of a replaced method reads: found by following the bytecode of methods from object to object.

The result is one `Site` for each object: what the guards (`_guards`) hold on to.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter, itemgetter
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from maefast.integrations import _code

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
MISSING = type("Missing", (), {})()
CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_HIDDEN = ("_parameters", "_buffers", "_modules", "training")
_INTERNAL = frozenset((*vars(nn.Module()), "_maefast_settings", "_maefast_report"))
# Where the classes around a model come from whose methods are no part of its arithmetic.
_AROUND = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.configuration_utils")
_AROUND += ("transformers.integrations", "transformers.utils", "huggingface_hub", "lightning", "pytorch_lightning")
# Tensors have these too, and code asks those; saving a model changes the one of its configuration.
_OF_CONFIGURATIONS = ("dtype", "torch_dtype")


class Unguarded(Exception):
    """What the original code reads or writes cannot be guarded; says why."""


class Site:
    """One object that the original code reads: a module, or something with attributes, such as a configuration.

    Attributes:
        path: its name in the module whose methods are guarded. object: itself; None for that module, since guards are
            kept there and would keep it alive. functions: methods and defaults that its class gives. values: its plain
            attributes, `MISSING` for those that may come. children: modules inside. parametrised: see there. All as
            the comparison saw them.
    """

    __slots__ = ("children", "functions", "items", "kind", "object", "parametrised", "path", "values")

    def __init__(self, path: str, thing: object) -> None:
        self.path, self.object, self.kind = path, thing if path else None, base_of(thing)
        self.items = len(thing._modules) if isinstance(thing, nn.Module) else 0
        self.parametrised = parametrised(thing)
        self.functions: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.children: dict[str, Any] = {}

    def name(self, attribute: str) -> str:
        return f"{self.path}.{attribute}" if self.path else attribute


def parametrised(thing: object) -> bool:
    """Whether parameters are computed when they are read (by `torch.nn.utils.parametrize`), maybe with random numbers:
    nothing may read them that would not have, and nothing more often."""
    return "parametrizations" in getattr(thing, "_modules", ())


def base_of(thing: object) -> type:
    """The class as the model's author knows it, without ours on top."""
    kind = type(thing)
    return getattr(kind, "_maefast_base", kind) if isinstance(thing, nn.Module) else kind


def defined(kind: type, name: str) -> object:
    """What a class gives its objects under this name, as it stands in the class. Left out are ours, and FSDP's on top,
    which hand on to what is under them."""
    for base in kind.__mro__:
        outer = "_maefast_methods" in vars(base) or base.__module__.startswith("torch.distributed.")
        if name in vars(base) and not outer:
            return vars(base)[name]
    return MISSING


def is_of_the_model(kind: type) -> bool:
    """Whether a class may hold code of the model."""
    return not (kind is object or kind.__module__.startswith(("torch.", *_AROUND)))


def bound(thing: object, value: object, function: object) -> bool:
    """A method of the class, its author's or ours on top, that stands, bound, in the object too: transformers 4 leaves
    such behind."""
    if not isinstance(value, MethodType) or value.__self__ is not thing:
        return False
    return value.__func__ is function or value.__func__ is getattr(type(thing), value.__func__.__name__, None)


def attribute(thing: object, name: str) -> object:
    """An attribute of the object itself, parts and parameters included; never one of its class."""
    own = vars(thing)
    if name in own:
        return own[name]
    if isinstance(thing, nn.Module):
        for kind in ("_parameters", "_buffers", "_modules"):
            if name in own[kind]:
                return own[kind][name]
    return MISSING


class Walk:
    """Collects sites: follows the bytecode of methods from object to object."""

    def __init__(self, live: frozenset[str]) -> None:
        self.live = live
        self.sites: dict[int, Site] = {}
        self.around: dict[tuple, tuple[Callable, Any, dict[str, Any]]] = {}

    def start(self, module: nn.Module, methods: Iterable[str], path: str = "") -> None:
        self._object(path, module, frozenset(), frozenset(), methods)

    def beside(self, module: nn.Module, path: str) -> None:
        """A part whose forward is passed over, and its place."""
        self.start(module.get_submodule(path), ("forward",), path)
        parent, _, name = path.rpartition(".")
        holder = module.get_submodule(parent)
        self.sites.setdefault(id(holder), Site(parent, holder)).children[name] = holder._modules[name]

    def _is_live(self, name: str) -> bool:
        return name in self.live or re.sub(r"\.\d+(?=\.|$)", ".*", name) in self.live

    def _object(self, path: str, thing: object, names: frozenset, called: frozenset, methods: Iterable[str]) -> None:
        """`names`: what code elsewhere looks up on it, `called`: and may call. `methods`: its own ones that are run."""
        site = self.sites.setdefault(id(thing), Site(path, thing))
        names, called = self._names(site, thing, names, called, methods)
        if None in names or site.kind.__module__.startswith("torch.nn."):
            names = names.union(n for n in vars(thing) if n not in _INTERNAL)
        for name in sorted(names - {None, "__class__", *_HIDDEN}):
            if not self._is_live(site.name(name)):
                self._attribute(site, thing, name, names, called)
        if isinstance(thing, CONTAINERS):
            for name, child in thing._modules.items():
                if not self._is_live(site.name(name)):
                    self._child(site, name, child, names, called | {name})

    def _names(
        self, site: Site, thing: object, names: frozenset, called: frozenset, methods: Iterable[str]
    ) -> tuple[frozenset, frozenset]:
        """`names` and `called` with those that its methods use. None stands for any name."""
        found, called, seen = set(names), set(called), set()
        methods = tuple(methods)
        todo = [*methods, *(n for n in names if _is_method(site.kind, n))]
        for name in todo:
            if name in seen or (self._is_live(site.name(name)) and name not in methods):
                continue
            seen.add(name)
            value = defined(site.kind, name)
            around = not site.path and name in methods  # what stands around a replaced method does not matter to it
            if name in vars(thing) and not around and not bound(thing, vars(thing)[name], value):
                raise Unguarded(f"{site.name(name)} is the object's own")
            if value is MISSING:
                continue
            site.functions[name] = value
            for look in self._looks(site, name, value):
                found |= look.names | ({None} if look.computed or look.handed else set())
                called |= look.called
                todo += [n for n in look.names if _is_method(site.kind, n)]
        return frozenset(found - seen), frozenset(called)

    def _looks(self, site: Site, name: str, value: object) -> list[_code.Look]:
        """Looks into a method or property, and helpers of the module around it."""
        where = f"{site.kind.__name__}.{name}"
        if isinstance(value, property):
            value = value.fget
        value = getattr(value, "__func__", value)
        if isinstance(value, type) or site.kind.__module__.startswith("torch.nn."):
            return []
        if not isinstance(value, FunctionType):
            if callable(value):
                raise Unguarded(f"{where} is no plain function: it cannot be told what it reads")
            return []
        found, todo, seen = [], list(_code.functions(value)), set()
        for function in todo:
            if function in seen:
                continue
            seen.add(function)
            look = _code.look(function.__code__)
            if unknown := {n for n in look.writes if not self._is_live(site.name(n))}:
                raise Unguarded(f"{where} writes {', '.join(sorted(unknown))}, which the accelerated code would not")
            found.append(look)
            todo += self._surroundings(function, look)
        return found

    def _surroundings(self, function: FunctionType, look: _code.Look) -> Iterator[FunctionType]:
        """Guards what code uses of the module around it; gives helpers of the model's own, to be looked into too."""
        space = function.__globals__
        for name in look.globals:
            value = space.get(name, MISSING)
            if name in self.live:
                continue
            if isinstance(value, (FunctionType, *PLAIN)) and not name.startswith("__"):
                self._around(itemgetter, space, name, value)
                if isinstance(value, FunctionType) and not _code.from_library(value.__module__):
                    yield from _code.functions(value)
            elif isinstance(value, (dict, list, set)) and _is_plain(value) and not name.startswith("__"):
                self._around(itemgetter, space, name, copy.deepcopy(value))
            elif isinstance(value, ModuleType) and not _code.from_library(value.__name__):
                for inner in (look.names & set(vars(value))) - self.live:
                    if isinstance(vars(value)[inner], (FunctionType, *PLAIN)):
                        self._around(itemgetter, vars(value), inner, vars(value)[inner])
                        if isinstance(vars(value)[inner], FunctionType):
                            yield from _code.functions(vars(value)[inner])
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            value = cell.cell_contents
            if isinstance(value, (FunctionType, type, *PLAIN)):
                self._around(attrgetter, cell, "cell_contents", value)
                if isinstance(value, FunctionType) and not _code.from_library(value.__module__):
                    yield from _code.functions(value)
            elif not callable(value) or hasattr(value, "__dict__"):
                raise Unguarded(f"{function.__qualname__} reads {name}, a variable of the function around it")

    def _around(self, get: Callable, space: Any, name: str, value: object) -> None:
        self.around.setdefault((get, id(space)), (get, space, {}))[2][name] = value

    def _attribute(self, site: Site, thing: object, name: str, names: frozenset, called: frozenset) -> None:
        if name in _OF_CONFIGURATIONS and site.kind.__module__.startswith("transformers."):
            return
        value, where = attribute(thing, name), site.name(name)
        if isinstance(value, nn.Module) or (value is None and name in vars(thing).get("_modules", ())):
            self._child(site, name, value, names, called)
        elif isinstance(value, Tensor):
            raise Unguarded(f"it reads {where}, a tensor that the accelerated code does not know")
        elif value is MISSING:
            default = defined(site.kind, name)
            if default is MISSING:
                site.values[name] = MISSING
            elif isinstance(default, PLAIN):
                site.functions[name] = default  # given by the class
        else:
            site.values[name] = _snapshot(value, where)
            if isinstance(value, FunctionType):
                self._held(value)
            elif _has_attributes(value) and where.count(".") < 3:
                self._object(where, value, names - {None}, called, ())

    def _held(self, function: FunctionType) -> None:
        """A function that the object holds, such as a loss: what it reads around it."""
        todo, seen = list(_code.functions(function)), set()
        for inner in todo:
            if inner not in seen:
                seen.add(inner)
                todo += self._surroundings(inner, _code.look(inner.__code__))

    def _child(self, site: Site, name: str, child: nn.Module | None, names: frozenset, called: frozenset) -> None:
        site.children[name] = child
        if child is not None:
            self._object(site.name(name), child, names - {None}, called, ("forward",) if name in called else ())


def _snapshot(value: object, where: str) -> object:
    """A copy of what may be changed in place."""
    if type(value).__module__ == "numpy" and hasattr(value, "shape"):
        raise Unguarded(f"it reads {where}, an array that may be changed in place")
    if not isinstance(value, (list, set, dict)):
        return value
    return copy.deepcopy(value) if _is_plain(value) else value.copy()


def _is_plain(value: object) -> bool:
    """Whether a container holds plain values, and containers of such, alone."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def _has_attributes(value: object) -> bool:
    """Whether this is an object such as a configuration."""
    plain = isinstance(value, (*PLAIN, list, tuple, set, dict, type))
    return not plain and hasattr(value, "__dict__") and not callable(value)


def _is_method(kind: type, name: str) -> bool:
    """Whether a class gives a method or property of this name that is part of the model, not of what is around it."""
    if name.startswith("__") or isinstance(getattr(kind, name, None), PLAIN):
        return False
    owner = next((k for k in kind.__mro__ if name in vars(k)), object)
    return owner is not object and not owner.__module__.startswith(_AROUND)
