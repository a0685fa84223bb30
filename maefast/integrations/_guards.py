"""Guards: what was compared is what runs.

`accelerate` compares its code with the model's own, and what it finds holds for that moment. The model's own code may
compute something else later: a switch that was off is turned on, a method is replaced on the object or on its class, a
part is exchanged for another one. So a replaced method carries guards, as the output of a tracing compiler does. They
are made from what the bytecode of the methods that it stands for may read (`_sites`, on `_code`), for the module and
everything inside that the accelerated code passes over:

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
import warnings
from collections.abc import Callable, Iterable
from operator import attrgetter, itemgetter
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from maefast.integrations._sites import (
    CONTAINERS,
    MISSING,
    PLAIN,
    Site,
    Unguarded,
    Walk,
    attribute,
    base_of,
    bound,
    defined,
    is_of_the_model,
    parametrised,
)

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LAYERS = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Conv3d, nn.GELU, nn.Dropout, nn.Identity)
_LAYER_FORWARDS = tuple(kind.forward for kind in _LAYERS)


class Guards:
    """All that the originals of some methods of a module read. `failing` is asked at every call.

    Args:
        module: whose. methods: their names. live: dotted names of what the accelerated code reads itself at every call.
        beside: paths of parts whose forward is passed over too. hooks: whether hooks on parts that are passed over have
            the original run; not where the accelerated code asks for them itself.

    Raises:
        Unguarded: something cannot be guarded.
    """

    def __init__(
        self,
        module: nn.Module,
        methods: Iterable[str],
        live: Iterable[str] = (),
        beside: Iterable[str] = (),
        hooks: bool = False,
    ) -> None:
        self.methods, self.live, self.beside = tuple(methods), frozenset(live), tuple(beside)
        self.hooks = hooks
        self.mode: bool | None = None  # training, where the other mode computes something else
        self._look(module)
        self.signature = self._sign()

    def _look(self, module: nn.Module) -> None:
        walk = Walk(self.live)
        walk.start(module, self.methods)
        for path in self.beside:
            walk.beside(module, path)
        self.sites, self.around = list(walk.sites.values()), list(walk.around.values())
        self._compile(module)

    # A copy, or one from a file, belongs to other objects: it looks anew, and compares signatures.
    def __getstate__(self) -> dict:
        return {name: getattr(self, name) for name in ("methods", "live", "beside", "hooks", "mode", "signature")}

    def settle(self, module: nn.Module) -> None:
        """Of a copy, once its module is complete."""
        if "sites" not in self.__dict__:
            self._look_again(module)

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
            classes.setdefault(site.kind, {}).update({name: getattr(site.kind, name) for name in site.functions})
        spaces = [vars(thing) for thing in others]
        for thing in (module, *others):
            if type(thing).__module__.startswith("torch.nn.") and not isinstance(thing, CONTAINERS):
                continue  # torch's own layers take no notice of parts that they do not know
            if isinstance(thing, nn.Module):
                spaces += [vars(thing)[kind] for kind in ("_modules", "_parameters", "_buffers")]
        hooks = [vars(thing)[kind] for thing in others if isinstance(thing, nn.Module) for kind in HOOKS if self.hooks]
        spaces += [vars(k) for kind in classes for k in kind.__mro__ if is_of_the_model(k)]
        self._spaces, self._sizes = (*spaces, *hooks), (*map(len, spaces), *(0 for _ in hooks))
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
        if "sites" not in self.__dict__:
            return "a copy is not as it was compared"
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
            # Whoever reached the replaced method itself went through what the object has around it.
            around = () if site.path else self.methods
            if reason := _failing(site, site.object if site.path else module, around):
                return reason
            if self.hooks and site.path and any(getattr(site.object, kind, None) for kind in HOOKS):
                return f"{site.path} has a hook"
        for get, space, names in self.around:
            for name, value in names.items():
                now = space.get(name, MISSING) if get is itemgetter else getattr(space, name, MISSING)
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
        del self.sites, self._kind  # nothing holds, until a look finds what was compared
        return f"{changed} has changed"


def _layers_now() -> tuple:
    a, b, c, d, e, f, g = _LAYERS
    return a.forward, b.forward, c.forward, d.forward, e.forward, f.forward, g.forward


def _attributes(thing: object, site: Site) -> list[tuple[str, dict, dict[str, Any]]]:
    """(key of the dictionary in the attributes of `thing` or "", itself, names -> wanted values) of what is there."""
    own = vars(thing)
    there = {n: v for n, v in site.values.items() if v is not MISSING}
    plain = {n: v for n, v in there.items() if n in own}
    plain |= {n: own[n] for n in site.functions if n in own}  # bound, see `bound`
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


def _failing(site: Site, thing: object, around: tuple[str, ...]) -> str | None:
    """`around`: methods that the object may have something of its own around."""
    if site.kind not in type(thing).__mro__:
        return f"{site.path or 'the module'} is of another class now: {type(thing).__name__}"
    if parametrised(thing) and not site.parametrised and is_of_the_model(site.kind):  # torch's layers are called then
        return f"{site.path or 'the module'} is parametrised"
    own = vars(thing)
    for name, value in site.functions.items():
        if name in own and name not in around and not bound(thing, own[name], value):
            if isinstance(value, PLAIN):
                return f"{site.name(name)} has changed from {_short(value)} to {_short(own[name])}"
            return f"{site.name(name)} was replaced on the object"
        now = defined(type(thing), name)
        if now is not value and not (isinstance(value, PLAIN) and same(now, value)):
            return f"{type(thing).__name__}.{name} was replaced"
    for name, value in site.values.items():
        now = attribute(thing, name)
        if value is MISSING and now is MISSING:
            now = defined(type(thing), name)
        if not same(now, value):
            return f"{site.name(name)} has changed from {_short(value)} to {_short(now)}"
    for name, child in site.children.items():
        if thing._modules.get(name, MISSING) is not child:
            return f"{site.name(name)} is another module now"
    if site.path and isinstance(thing, CONTAINERS) and site.items != len(thing):
        return f"{site.path} has other parts now"
    return None


def in_mode(training: bool) -> str:
    return f"in {'training' if training else 'evaluation'} it computes something else"


def same(a: object, b: object) -> bool:
    """Equal values of one type, or one object."""
    if a is b:
        return True
    try:
        return bool(a == b) and type(a) is type(b)
    except Exception:
        return False


def _short(value: object) -> str:
    if value is MISSING:
        return "nothing"
    text = repr(value) if isinstance(value, (*PLAIN, tuple, list, set, dict)) else "another object"
    return text if len(text) < 40 else text[:36] + " ..."


def _space_name(get: Callable, space: Any) -> str:
    return space.get("__name__", "") if get is itemgetter else "a variable around it"


def _digest(value: object) -> object:
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(v, PLAIN) for v in value):
        return type(value).__name__, repr(value)
    if isinstance(value, dict):
        return type(value).__name__, tuple((repr(k), _digest(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(_digest, value))
    value = getattr(value, "__func__", value)  # of static methods and class methods
    if isinstance(value, FunctionType):
        return _digest_code(value.__code__), repr(value.__defaults__), repr(value.__kwdefaults__)
    return base_of(value).__qualname__


def _digest_code(code: CodeType) -> str:
    parts = [code.co_code, repr(code.co_names).encode()]
    for constant in code.co_consts:
        parts.append((_digest_code(constant) if isinstance(constant, CodeType) else repr(constant)).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


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
