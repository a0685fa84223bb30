"""Guards: what was compared is what runs.

`accelerate` compares its code with the model's own, and what it finds holds for that moment. The model's own code may
compute something else later: a switch that was off is turned on, a method is replaced on the object or on its class, a
part is exchanged for another one. So a replaced method carries guards, as the output of a tracing compiler does. They
are made from what the bytecode of the methods that it stands for may read (`_code`), for the module and everything
inside that the accelerated code passes over:

- the functions that would have been called, on class and object, and helpers around them;
- the values of plain attributes, of a configuration too, also of those that are not there yet;
- the parts inside, and their classes; the forwards of torch's own layers;
- the mode, where only training or only evaluation agreed.

They are asked at every call. While one fails the model's own code runs; a warning says why, once, and the report when.
What the accelerated code reads itself at every call, whatever it is, is `live` and needs no guard. Where a guard cannot
be had (`Unguarded`: code in C, attributes that the method writes, tensors that only the original knows), the method is
not replaced.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter, itemgetter
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from maefast.integrations import _code

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
_MISSING = type("Missing", (), {})()
_HIDDEN = ("_parameters", "_buffers", "_modules", "training")
_LAYERS = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Conv3d, nn.GELU, nn.Dropout, nn.Identity)
_LAYER_FORWARDS = tuple(kind.forward for kind in _LAYERS)
# Where the classes around a model come from whose methods are no part of its arithmetic.
_AROUND = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.configuration_utils")
_AROUND += ("transformers.integrations", "transformers.utils", "huggingface_hub", "lightning", "pytorch_lightning")
# Tensors have these too, and code asks those; saving a model changes the one of its configuration.
_OF_CONFIGURATIONS = ("dtype", "torch_dtype")


class Unguarded(Exception):
    """What the original code reads or writes cannot be guarded; says why."""


class _Site:
    """One object that the original code reads: a module, or something with attributes, such as a configuration.

    Attributes:
        path: its name in the module whose methods are guarded. object: itself; None for that module, since guards are
            kept there and would keep it alive. functions: methods and defaults that its class gives. values: its plain
            attributes, `_MISSING` for those that may come. children: modules inside. All as the comparison saw them.
    """

    __slots__ = ("children", "functions", "kind", "object", "path", "values")

    def __init__(self, path: str, thing: object) -> None:
        self.path, self.object, self.kind = path, thing if path else None, base_of(thing)
        self.functions: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.children: dict[str, Any] = {}

    def name(self, attribute: str) -> str:
        return f"{self.path}.{attribute}" if self.path else attribute


def base_of(thing: object) -> type:
    """The class as the model's author knows it, without ours on top."""
    kind = type(thing)
    return getattr(kind, "_maefast_base", kind) if isinstance(thing, nn.Module) else kind


class Guards:
    """All that the originals of some methods of a module read. `failing` is asked at every call.

    Args:
        module: whose. methods: their names. live: dotted names of what the accelerated code reads itself at every call.
        beside: paths of parts whose forward is passed over too.

    Raises:
        Unguarded: something cannot be guarded.
    """

    def __init__(
        self, module: nn.Module, methods: Iterable[str], live: Iterable[str] = (), beside: Iterable[str] = ()
    ) -> None:
        self.methods, self.live, self.beside = tuple(methods), frozenset(live), tuple(beside)
        self.mode: bool | None = None  # training, where the other mode computes something else
        self._look(module)
        self.signature = self._sign()

    def _look(self, module: nn.Module) -> None:
        walk = _Walk(self.live)
        walk.start(module, self.methods)
        for path in self.beside:
            walk.beside(module, path)
        self.sites, self.around = list(walk.sites.values()), list(walk.around.values())
        self._compile(module)

    # A copy, or one from a file, belongs to other objects: it looks anew, and compares signatures.
    def __getstate__(self) -> dict:
        return {name: getattr(self, name) for name in ("methods", "live", "beside", "mode", "signature")}

    def _sign(self) -> dict[str, Any]:
        """What the guards hold on to, without objects of this process."""
        found = {}
        for site in self.sites:
            found[f"class of {site.path or 'the module'}"] = site.kind.__qualname__
            for name, value in (site.functions | site.values | site.children).items():
                found[site.name(name)] = _digest(value)
        for get, space, names in self.around:
            for name, value in names.items():
                found[f"{_space_name(get, space)}:{name}"] = _digest(value)
        return found

    # --- asked at every call --------------------------------------------------------------------------------

    def _compile(self, module: nn.Module) -> None:
        """Snapshots that one comparison each can check. They may fail for harmless reasons: `_examine` decides."""
        others = [site.object for site in self.sites if site.path]
        self._kind, self._size = type(module), len(vars(module))
        self._others, self._kinds = tuple(others), tuple(map(type, others))
        classes: dict[type, dict] = {}
        for site in self.sites:
            classes.setdefault(site.kind, {}).update(site.functions)
        spaces = [vars(thing) for thing in others] + [vars(k) for kind in classes for k in kind.__mro__ if _code_of(k)]
        self._spaces, self._sizes = tuple(spaces), tuple(map(len, spaces))
        self._own, checks = [], []
        for site in self.sites:
            thing = site.object if site.path else module
            found = _attributes(thing, site)
            if site.path:
                checks += [(itemgetter, space, names) for _, space, names in found]
            else:
                self._own = [(kind, *_check(itemgetter, names)) for kind, _, names in found if names]
        checks += [(attrgetter, kind, names) for kind, names in classes.items()]
        checks += self.around
        self._checks = [(source, *_check(getter, names)) for getter, source, names in checks if names]

    def failing(self, module: nn.Module) -> str | None:
        """What is not as it was compared, or None."""
        own = module.__dict__
        if self.mode is not None and own["training"] is not self.mode:
            return in_mode(not self.mode)
        try:
            if (
                type(module) is self._kind
                and len(own) == self._size
                and tuple(map(type, self._others)) == self._kinds
                and tuple(map(len, self._spaces)) == self._sizes
            ):
                for kind, get, wanted in self._own:
                    if get(own[kind] if kind else own) != wanted:
                        return self._examine(module)
                for source, get, wanted in self._checks:
                    if get(source) != wanted:
                        return self._examine(module)
                if _layers_now() == _LAYER_FORWARDS:
                    return None
        except (KeyError, AttributeError):
            pass
        return self._examine(module)

    def failing_traced(self, module: nn.Module) -> str | None:
        """`failing` for torch.compile, which guards what it sees read here. It watches over functions by itself."""
        if self.mode is not None and module.training is not self.mode:
            return in_mode(not self.mode)
        for site in self.sites:
            thing = site.object if site.path else module
            for name, wanted in site.values.items():
                if isinstance(wanted, (bool, int, float, str)) and getattr(thing, name) != wanted:
                    return f"{name} has changed"
        return None

    def _examine(self, module: nn.Module) -> str | None:
        if "sites" not in self.__dict__ and (reason := self._look_again(module)):
            return reason
        for kind, forward in zip(_LAYERS, _LAYER_FORWARDS):
            if kind.forward is not forward:
                return f"torch's {kind.__name__}.forward was replaced"
        for site in self.sites:
            if reason := _failing(site, site.object if site.path else module):
                return reason
        for get, space, names in self.around:
            for name, value in names.items():
                now = space.get(name, _MISSING) if get is itemgetter else getattr(space, name, _MISSING)
                if not same(now, value):
                    return f"{_space_name(get, space)}.{name} was replaced"
        self._compile(module)  # another class of ours or of FSDP's on top, or an attribute that nobody reads
        return None

    def _look_again(self, module: nn.Module) -> str | None:
        """The guards of a copy: what has changed since those of the first, or None."""
        try:
            self._look(module)
        except Unguarded as reason:
            return str(reason)
        before, now = self.signature, self._sign()
        changed = next((name for name in {**before, **now} if before.get(name) != now.get(name)), None)
        if changed is None:
            return None
        del self.sites
        return f"{changed} has changed"


def _layers_now() -> tuple:
    a, b, c, d, e, f, g = _LAYERS
    return a.forward, b.forward, c.forward, d.forward, e.forward, f.forward, g.forward


def _code_of(kind: type) -> bool:
    """Whether a class may hold code of the model."""
    return not (kind is object or kind.__module__.startswith(("torch.", *_AROUND)))


def _attributes(thing: object, site: _Site) -> list[tuple[str, dict, dict[str, Any]]]:
    """(key of the dictionary in the attributes of `thing` or "", itself, names -> wanted values) of what is there."""
    own = vars(thing)
    there = {n: v for n, v in site.values.items() if v is not _MISSING}
    plain = {n: v for n, v in there.items() if n in own}
    plain |= {n: own[n] for n in site.functions if n in own}  # bound, see `_bound`
    found = [("", own, plain)]
    if isinstance(thing, nn.Module):
        found.append(("_modules", own["_modules"], site.children))
        for kind in ("_parameters", "_buffers"):
            found.append((kind, own[kind], {n: None for n in there if n not in own and n in own[kind]}))
    return found


def _check(getter: Callable, names: dict[str, Any]) -> tuple[Callable, Any]:
    """A getter of these names and what it must give. Always tuples, which ask for identity before equality: that of a
    configuration takes long."""
    keys = [*names] if len(names) > 1 else [*names] * 2
    return getter(*keys), tuple(names[key] for key in keys)


def _failing(site: _Site, thing: object) -> str | None:
    if site.kind not in type(thing).__mro__:
        return f"{site.path or 'the module'} is of another class now: {type(thing).__name__}"
    own = vars(thing)
    for name, value in site.functions.items():
        if name in own and not _bound(thing, own[name], value):
            if isinstance(value, _PLAIN):
                return f"{site.name(name)} has changed from {_short(value)} to {_short(own[name])}"
            return f"{site.name(name)} was replaced on the object"
        if not same(_given(thing, name), value):
            return f"{type(thing).__name__}.{name} was replaced"
    for name, value in site.values.items():
        now = _attribute(thing, name)
        if value is _MISSING and now is _MISSING:
            now = _given(thing, name)
        if not same(now, value):
            return f"{site.name(name)} has changed from {_short(value)} to {_short(now)}"
    for name, child in site.children.items():
        if thing._modules.get(name, _MISSING) is not child:
            return f"{site.name(name)} is another module now"
    return None


def _given(thing: object, name: str) -> object:
    """What the classes of an object give it under this name, without ours."""
    for kind in type(thing).__mro__:
        if name in vars(kind) and "_maefast_methods" not in vars(kind):
            return getattr(kind, name)
    return _MISSING


def in_mode(training: bool) -> str:
    return f"in {'training' if training else 'evaluation'} it computes something else"


def _bound(thing: object, value: object, function: object) -> bool:
    """A method of the class, its author's or ours on top, that stands, bound, in the object too: transformers 4 leaves
    such behind."""
    if not isinstance(value, MethodType) or value.__self__ is not thing:
        return False
    return value.__func__ is function or value.__func__ is getattr(type(thing), value.__func__.__name__, None)


def _attribute(thing: object, name: str) -> object:
    """An attribute of the object itself, parts and parameters included; never one of its class."""
    own = vars(thing)
    if name in own:
        return own[name]
    if isinstance(thing, nn.Module):
        for kind in ("_parameters", "_buffers", "_modules"):
            if name in own[kind]:
                return own[kind][name]
    return _MISSING


def same(a: object, b: object) -> bool:
    """Equal values of one type, or one object."""
    if a is b:
        return True
    try:
        return bool(a == b) and type(a) is type(b)
    except Exception:
        return False


def _short(value: object) -> str:
    if value is _MISSING:
        return "nothing"
    text = repr(value) if isinstance(value, (*_PLAIN, tuple, list, set, dict)) else "another object"
    return text if len(text) < 40 else text[:36] + " ..."


def _space_name(get: Callable, space: Any) -> str:
    return space.get("__name__", "") if get is itemgetter else "a variable around it"


def _digest(value: object) -> object:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(v, _PLAIN) for v in value):
        return type(value).__name__, repr(value)
    if isinstance(value, FunctionType):
        return _digest_code(value.__code__)
    return base_of(value).__qualname__


def _digest_code(code: CodeType) -> str:
    parts = [code.co_code, repr(code.co_names).encode()]
    for constant in code.co_consts:
        parts.append((_digest_code(constant) if isinstance(constant, CodeType) else repr(constant)).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


# --- finding what is read -----------------------------------------------------------------------------------


class _Walk:
    """Collects sites: follows the bytecode of methods from object to object."""

    def __init__(self, live: frozenset[str]) -> None:
        self.live = live
        self.sites: dict[int, _Site] = {}
        self.around: dict[tuple, tuple[Callable, Any, dict[str, Any]]] = {}

    def start(self, module: nn.Module, methods: Iterable[str], path: str = "") -> None:
        self._object(path, module, frozenset(), frozenset(), methods)

    def beside(self, module: nn.Module, path: str) -> None:
        """A part whose forward is passed over, and its place."""
        self.start(module.get_submodule(path), ("forward",), path)
        parent, _, name = path.rpartition(".")
        holder = module.get_submodule(parent)
        self.sites.setdefault(id(holder), _Site(parent, holder)).children[name] = holder._modules[name]

    def _is_live(self, name: str) -> bool:
        return name in self.live or re.sub(r"\.\d+(?=\.|$)", ".*", name) in self.live

    def _object(self, path: str, thing: object, names: frozenset, called: frozenset, methods: Iterable[str]) -> None:
        """`names`: what code elsewhere looks up on it, `called`: and may call. `methods`: its own ones that are run."""
        site = self.sites.setdefault(id(thing), _Site(path, thing))
        names, called = self._names(site, thing, names, called, methods)
        if None in names or site.kind.__module__.startswith("torch.nn."):
            names = names.union(n for n in vars(thing) if not n.startswith("_"))
        for name in sorted(names - {None, "__class__", *_HIDDEN}):
            if not self._is_live(site.name(name)):
                self._attribute(site, thing, name, names, called)
        if isinstance(thing, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            for name, child in thing._modules.items():
                if not self._is_live(site.name(name)):
                    self._child(site, name, child, names, called | {name})

    def _names(
        self, site: _Site, thing: object, names: frozenset, called: frozenset, methods: Iterable[str]
    ) -> tuple[frozenset, frozenset]:
        """`names` and `called` with those that its methods use. None stands for any name."""
        found, called, seen = set(names), set(called), set()
        methods = tuple(methods)
        todo = [*methods, *(n for n in names if _is_method(site.kind, n))]
        for name in todo:
            if name in seen or (self._is_live(site.name(name)) and name not in methods):
                continue
            seen.add(name)
            value = getattr(site.kind, name, _MISSING)
            if name in vars(thing) and not _bound(thing, vars(thing)[name], value):
                raise Unguarded(f"{site.name(name)} is the object's own")
            if value is _MISSING:
                continue
            site.functions[name] = value
            for look in self._looks(site, name, value):
                found |= look.names | ({None} if look.computed or look.handed else set())
                called |= look.called
                todo += [n for n in look.names if _is_method(site.kind, n)]
        return frozenset(found - seen), frozenset(called)

    def _looks(self, site: _Site, name: str, value: object) -> list[_code.Look]:
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
            value = space.get(name, _MISSING)
            if name in self.live:
                continue
            if isinstance(value, (FunctionType, *_PLAIN)) and not name.startswith("__"):
                self._around(itemgetter, space, name, value)
                if isinstance(value, FunctionType) and not _code.from_library(value.__module__):
                    yield from _code.functions(value)
            elif isinstance(value, ModuleType) and not _code.from_library(value.__name__):
                for inner in (look.names & set(vars(value))) - self.live:
                    if isinstance(vars(value)[inner], (FunctionType, *_PLAIN)):
                        self._around(itemgetter, vars(value), inner, vars(value)[inner])
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            value = cell.cell_contents
            if isinstance(value, (FunctionType, type, *_PLAIN)):
                self._around(attrgetter, cell, "cell_contents", value)
                if isinstance(value, FunctionType) and not _code.from_library(value.__module__):
                    yield from _code.functions(value)
            elif not callable(value) or hasattr(value, "__dict__"):
                raise Unguarded(f"{function.__qualname__} reads {name}, a variable of the function around it")

    def _around(self, get: Callable, space: Any, name: str, value: object) -> None:
        self.around.setdefault((get, id(space)), (get, space, {}))[2][name] = value

    def _attribute(self, site: _Site, thing: object, name: str, names: frozenset, called: frozenset) -> None:
        if name in _OF_CONFIGURATIONS and site.kind.__module__.startswith("transformers."):
            return
        value, where = _attribute(thing, name), site.name(name)
        if isinstance(value, nn.Module) or (value is None and name in vars(thing).get("_modules", ())):
            self._child(site, name, value, names, called)
        elif isinstance(value, Tensor):
            raise Unguarded(f"it reads {where}, a tensor that the accelerated code does not know")
        elif value is _MISSING:
            default = getattr(site.kind, name, _MISSING)
            if default is _MISSING:
                site.values[name] = _MISSING
            elif isinstance(default, _PLAIN):
                site.functions[name] = default  # given by the class
        else:
            site.values[name] = value.copy() if isinstance(value, (list, set, dict)) else value
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

    def _child(self, site: _Site, name: str, child: nn.Module | None, names: frozenset, called: frozenset) -> None:
        site.children[name] = child
        if child is not None:
            self._object(site.name(name), child, names - {None}, called, ("forward",) if name in called else ())


def _has_attributes(value: object) -> bool:
    """Whether this is an object such as a configuration."""
    plain = isinstance(value, (*_PLAIN, list, tuple, set, dict, type))
    return not plain and hasattr(value, "__dict__") and not callable(value)


def _is_method(kind: type, name: str) -> bool:
    """Whether a class gives a method or property of this name that is part of the model, not of what is around it."""
    if name.startswith("__") or isinstance(getattr(kind, name, None), _PLAIN):
        return False
    owner = next((k for k in kind.__mro__ if name in vars(k)), object)
    return owner is not object and not owner.__module__.startswith(_AROUND)


# --- what is said -------------------------------------------------------------------------------------------

_said: set[str] = set()


def warn_once(text: str) -> None:
    if text not in _said and not torch.compiler.is_compiling():
        _said.add(text)
        warnings.warn(f"maefast: {text}", stacklevel=4)


class Runs:
    """How often a replaced method ran fast, and how often the model's own code did, because of what, since when."""

    __slots__ = ("fast", "own")

    def __init__(self) -> None:
        self.fast = 0
        self.own: dict[str, list[int]] = {}  # reason -> [how often, number of the call when it came up]

    def fell_back(self, why: str) -> None:
        entry = self.own.get(why)
        if entry is None:
            entry = self.own[why] = [0, self.fast + sum(n for n, _ in self.own.values()) + 1]
        entry[0] += 1

    def text(self) -> str:
        """ "ran fast 3 times, as it was 2 times because ... (since call 4)", or "" before the first call."""
        parts = [f"ran fast {_times(self.fast)}"] if self.fast else []
        parts += [f"as it was {_times(n)} because {why} (since call {first})" for why, (n, first) in self.own.items()]
        text = ", ".join(parts)
        return text if self.fast or not text else "ran " + text


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
