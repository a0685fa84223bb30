"""How a method of somebody else's module is replaced, and given back.

The module's class becomes a subclass of its own, with the same name, whose methods are ours. So parameters, buffers,
hooks, `isinstance`, `state_dict`, `deepcopy`, pickling, DDP, FSDP and `torch.compile` go on as before, the class of the
user stays untouched, and `unswap` puts the old class back.

Every replaced method is a plain function ``fast(self, ...)`` at the top level of a module of `maefast.integrations`. It
hands anything that it does not serve to `fall_back`, and runs only while its guards hold (`_guards`).
"""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from maefast.integrations import _worth
from maefast.integrations._guards import Guards, Runs, warn_once

Methods = tuple[tuple[str, Callable], ...]  # ((name, fast function), ...), sorted

_classes: dict[tuple[type, Methods], type] = {}
_plain = False
BASE, METHODS, SETTINGS = "_maefast_base", "_maefast_methods", "_maefast_settings"
OURS = "_maefast_method"  # on every method that we put into a class
GUARDS, RUNS = "guards", "runs"  # settings: name of the method -> Guards, Runs
SIZE = "size"  # setting: `_worth.Size`, for methods that are left alone where they are given little
UNUSUAL = "of another size, dtype, device or argument than maefast serves, or of an adapted part"
# Types of a first argument that only accelerated code makes, which has asked `runs_fast` before.
HANDED: set[type] = set()


@contextmanager
def plain():
    """Inside, every accelerated module runs its own, original code (process-wide)."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def is_plain() -> bool:
    """Whether original code runs: asked for, or because something is at work that our kernels cannot go through:
    `torch.func` and forward-mode gradients (they have no rules for either) or `torch.jit.trace` (they cannot be written
    to a file)."""
    if torch.compiler.is_compiling():
        return _plain or torch.compiler.is_exporting()
    return _plain or _transformed()


def _transformed() -> bool:
    if forward_ad._current_level >= 0 or torch.jit.is_tracing():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def definer(kind: type, name: str) -> type | None:
    """The class that gives `kind` its attribute `name`."""
    return next((base for base in kind.__mro__ if name in vars(base)), None)


def own(module: nn.Module, name: str) -> bool:
    """Whether the object has a method of its own that does not lead to ours. What Accelerate's `prepare` puts around a
    forward that is replaced already does."""
    return around(module, name) and not any(hasattr(value, OURS) for value in _chain(vars(module)[name]))


def around(module: nn.Module, name: str) -> bool:
    """Whether the object has a method of its own, which may call that of its class."""
    return name in vars(module) and not _left_behind(module, name)


def _left_behind(module: nn.Module, name: str) -> bool:
    """Whether the object has the method of its class, bound: transformers 4 leaves such."""
    value = vars(module).get(name)
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is getattr(type(module), name)


def _chain(value: object) -> Iterator[object]:
    """A method and what it says that it wraps."""
    while value is not None:
        yield value
        value = getattr(value, "__func__", None) or getattr(value, "__wrapped__", None)


def _its_own(module: nn.Module, name: str) -> str:
    text = f"this object has its own {name}"
    if any(value is getattr(type(module), name, text) for value in _chain(vars(module)[name])):
        text += ", around that of its class: call maefast.accelerate before it is put there (by Accelerate, say)"
    return text


def overridden(module: nn.Module, name: str, root: type) -> str | None:
    """Why method `name` is not the one of `root` and the classes under it: who overrides it, or None."""
    if own(module, name):
        return _its_own(module, name)
    owner = definer(type(module), name)
    if owner is None:
        return f"there is no {name}"
    return None if owner in root.__mro__ else f"{owner.__name__}.{name} overrides it"


def overriding(module: nn.Module, name: str) -> str | None:
    """Who overrides a method that a class under it has too, or None: for families without a fixed list of methods."""
    if own(module, name):
        return _its_own(module, name)
    found = {}  # function -> class; HF's layers repeat the same function, wrapped once more, in every subclass
    for kind in type(module).__mro__:
        if kind is not nn.Module and name in vars(kind) and METHODS not in vars(kind):
            found[inspect.unwrap(vars(kind)[name])] = kind
    owners = list(found.values())
    return None if len(owners) < 2 else f"{owners[0].__name__}.{name} overrides that of {owners[1].__name__}"


def root_class(kind: type, names: tuple[str, ...]) -> type | None:
    """The most basic class under `kind` that has all of these methods: where the family's own code is."""
    return next((base for base in reversed(kind.__mro__) if all(hasattr(base, name) for name in names)), None)


def swap(
    module: nn.Module, methods: Mapping[str, Callable], guards: Mapping[str, Guards] | None = None, **settings: Any
) -> None:
    """Replace methods of `module` (more of them, if some are already), each with its guards. `settings` are read back
    by `setting`."""
    kind = type(module)
    before = dict(vars(kind).get(METHODS, ()))
    base = kind.__dict__.get(BASE, kind)
    _drop_leftovers(module, methods)
    _become(module, _accelerated(base, tuple(sorted({**before, **methods}.items()))))
    kept = {**module.__dict__.get(SETTINGS, {}), **settings}
    kept[GUARDS] = {**kept.get(GUARDS, {}), **(guards or {})}
    kept[RUNS] = {**kept.get(RUNS, {}), **{name: Runs() for name in methods}}
    module.__dict__[SETTINGS] = kept


def _become(module: nn.Module, kind: type) -> None:
    """Past a `__setattr__` of the class's own, which may refuse."""
    object.__setattr__(module, "__class__", kind)


def unswap(module: nn.Module, names: tuple[str, ...] | None = None) -> bool:
    """Give back all replaced methods, or those of `names`; False if there was nothing to give back."""
    kind = type(module)
    ours = next((k for k in kind.__mro__ if BASE in vars(k)), None)
    if ours is None:
        return False
    _drop_leftovers(module, [name for name, _ in vars(ours)[METHODS]])
    left = () if names is None else tuple((n, f) for n, f in vars(ours)[METHODS] if n not in names)
    new = _accelerated(vars(ours)[BASE], left) if left else vars(ours)[BASE]
    if kind is not ours:  # FSDP2 made a class of its own on top of ours
        bases = tuple(new if base is ours else base for base in kind.__bases__)
        new = type(kind)(
            kind.__name__, bases, {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        )
    _become(module, new)
    settings = dict(module.__dict__.get(SETTINGS, {}))  # a shallow copy of the module has the same one
    for kind in (GUARDS, RUNS):
        settings[kind] = {n: v for n, v in settings.get(kind, {}).items() if n in dict(left)}
    module.__dict__[SETTINGS] = settings
    if not left:
        module.__dict__.pop(SETTINGS, None)
    return True


def _drop_leftovers(module: nn.Module, names: Iterable[str]) -> None:
    """Methods of the class that stand, bound, in the object too would outlive the class."""
    for name in names:
        if _left_behind(module, name):
            del vars(module)[name]


def methods(module: nn.Module) -> tuple[str, ...]:
    """Names of the methods that are replaced."""
    return tuple(name for name, _ in getattr(type(module), METHODS, ()))


def setting(module: nn.Module, name: str, default: Any = None) -> Any:
    return module.__dict__.get(SETTINGS, {}).get(name, default)


def fall_back(module: nn.Module, name: str, why: str = UNUSUAL) -> Callable:
    """The method as it was, bound, for a call that ours does not serve; counted as run for this reason."""
    if not torch.compiler.is_compiling():
        runs = module.__dict__[SETTINGS][RUNS][name]
        runs.fast -= 1
        runs.fell_back(why)
    return original(module, name)


def original(module: nn.Module, name: str) -> Callable:
    """The method as it was, bound."""
    return getattr(getattr(type(module), BASE), name).__get__(module)


def runs_fast(module: nn.Module, name: str, x: object = None) -> bool:
    """Whether the method is replaced, worth it for its first argument x, and its guards hold now."""
    if name not in methods(module):
        return False
    if around(module, name):
        return False  # something around it wants to see its arguments and what it returns
    return _allowed(module, module.__dict__.get(SETTINGS), name, x, count=False)


def _allowed(module: nn.Module, settings: dict | None, name: str, x: object, count: bool = True) -> bool:
    """Whether a method is worth it, its guards hold, and nothing asks for original code. Objects made from the class,
    as by its from_pretrained, were not accelerated: they have no settings."""
    if settings is None:
        return False
    size = settings.get(SIZE)
    if size is not None and (reason := _worth.why_not(x, size)):  # the cheapest question first
        if count:
            settings[RUNS][name].fell_back(reason)
        return False
    if is_plain():
        return False
    guards = settings[GUARDS].get(name)
    if guards is None:
        return True
    if torch.compiler.is_compiling():
        return guards.failing_traced(module) is None
    reason = guards.failing(module)
    if reason is None:
        return True
    if count:
        settings[RUNS][name].fell_back(reason)
    if guards.mode is None or module.training is guards.mode:
        warn_once(
            f"{type(module).__name__}.{name} runs as it was, because {reason} after maefast.accelerate(model); call it "
            "again to have the present state compared"
        )
    return False


def _accelerated(base: type, methods: Methods) -> type:
    found = _classes.get((base, methods))
    if found is None:
        body = {name: _method(base, name, fast) for name, fast in methods}
        body |= {BASE: base, METHODS: methods, "__reduce_ex__": _reduce_ex, "__setstate__": _set_state}
        body |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        found = _classes[base, methods] = type(base)(base.__name__, (*_between(base, methods), base), body)
    return found


def _between(base: type, methods: Methods) -> tuple[type, ...]:
    """A class between ours and `base`, where methods of `base` say ``super(type(self), self)`` (SparK's do).

    From our class that leads to `base` again, without end; this class answers with what stands under `base`.
    """
    body: dict[str, Any] = {METHODS: ()}
    for name, _ in methods:
        code = getattr(inspect.unwrap(getattr(base, name)), "__code__", None)
        if code is not None and {"super", "type"} <= set(code.co_names):
            under = next((kind for kind in base.__mro__[1:] if name in vars(kind)), None)
            body |= {} if under is None else {name: vars(under)[name]}
    return (type(base.__name__, (), body),) if len(body) > 1 else ()


def _method(base: type, name: str, fast: Callable) -> Callable:
    @wraps(getattr(base, name))  # whoever looks at the signature (HF's Trainer does) finds the old one
    def method(self, *args, **kwargs):
        settings = self.__dict__.get(SETTINGS)
        x = args[0] if args else None
        if type(x) in HANDED:
            if not torch.compiler.is_compiling():
                settings[RUNS][name].fast += 1
        elif not _allowed(self, settings, name, x):
            return getattr(base, name)(self, *args, **kwargs)
        elif not torch.compiler.is_compiling():
            settings[RUNS][name].fast += 1
        return fast(self, *args, **kwargs)

    setattr(method, OURS, True)
    return method


def _reduce_ex(self: nn.Module, protocol: int):
    """Pickle the class as what it is made of: it has no place where it could be imported from."""
    kind = type(self)
    make, args, *rest = vars(kind)[BASE].__reduce_ex__(self, max(protocol, 2))
    if make is not copyreg.__newobj__ or args != (kind,):
        raise TypeError(f"{kind.__name__} pickles itself in its own way: call maefast.restore(model) first")
    return (_blank, (vars(kind)[BASE], vars(kind)[METHODS]), *rest)


def _set_state(self: nn.Module, state: dict) -> None:
    """Of a copy, or one from a file: its guards look at it."""
    original(self, "__setstate__")(state)
    for guards in self.__dict__.get(SETTINGS, {}).get(GUARDS, {}).values():
        guards.settle(self)


def _blank(base: type, methods: Methods) -> nn.Module:
    kind = _accelerated(base, methods)
    return kind.__new__(kind)
