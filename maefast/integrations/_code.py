"""What code reads and writes, from its bytecode: the names that it may look up, more than it does, never fewer.

A comparison proves what code computes now. What it may compute later depends on what it reads, so that is what has to
be known: see `_guards`, and `beyond` for parts of which only known attributes may be used.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from types import CodeType, FunctionType
from typing import NamedTuple

from torch import nn

# Wrappers of these libraries hand on to what they wrap; what they read themselves is no switch of the model.
LIBRARIES = frozenset(("torch", "transformers", "timm", "lightly", "einops", "numpy", "functools", "contextlib"))
LIBRARIES |= {"typing", "warnings", "math", "logging"}
_LOOKS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD")
_STORES = ("STORE_ATTR", "DELETE_ATTR")
_BY_NAME = frozenset(("vars", "setattr", "delattr", "eval", "exec", "__dict__"))


class Look(NamedTuple):
    """What one code object and those inside it use.

    Attributes:
        names: attributes that are looked up on some object, and strings that may stand for one. called: those of them
            that may be called or handed on, not only looked into. globals: names of the module around the code.
        writes: attributes that are set on the first argument, or on what is reached from it. computed: whether names
            are made up while it runs (``getattr(self, name)``). handed: whether the first argument goes to other code
            as a whole, which may look up anything.
    """

    names: frozenset[str]
    called: frozenset[str]
    globals: frozenset[str]
    writes: frozenset[str]
    computed: bool
    handed: bool


@cache
def look(code: CodeType, first: str | None = None) -> Look:
    """`first` is the name of the first argument of a function around it."""
    steps = [s for s in dis.get_instructions(code) if s.opname not in ("CACHE", "EXTENDED_ARG", "NOP", "RESUME")]
    first = first or (code.co_varnames[0] if code.co_argcount else None)
    names, called, known, writes, computed, handed = set(), set(), set(), set(), False, False
    for i, step in enumerate(steps):
        after = steps[i + 1].opname if i + 1 < len(steps) else ""
        if step.opname in _LOOKS:
            name = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
            names.add(name)
            if after not in _LOOKS or step.opname != "LOAD_ATTR":
                called.add(name)
            computed |= name in _BY_NAME
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            known.add(step.argval)
            computed |= step.argval in _BY_NAME or (step.argval == "getattr" and not _is_constant(steps, i + 1))
        elif step.opname in _STORES:
            names.add(step.argval)
            if first is not None and _root(steps, i - 1) == first:
                writes.add(step.argval)
        elif step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            writes.add(step.argval)
        elif step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
            loaded = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            asked = _asks(steps, i - 1) or after in (*_LOOKS, *_STORES)
            handed |= first in loaded[:-1] or (loaded[-1] == first and not asked)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = look(constant, first)
            names |= inner.names
            called |= inner.called
            known |= inner.globals
            writes |= inner.writes
            computed |= inner.computed
            handed |= inner.handed
        elif isinstance(constant, tuple):  # class patterns, names to loop over
            names |= {name for name in constant if isinstance(name, str) and name.isidentifier()}
        elif isinstance(constant, str) and constant.isidentifier():  # getattr(self, "name"), config["name"]
            names.add(constant)
            called.add(constant)
    return Look(*map(frozenset, (names, called, known, writes)), computed, handed)


def _asks(steps: list, i: int) -> bool:
    """Whether a function of Python that looks at no attributes but those named to it is loaded at step `i`."""
    i -= steps[i].opname == "PUSH_NULL"
    return steps[i].opname == "LOAD_GLOBAL" and steps[i].argval in ("getattr", "hasattr", "isinstance", "type", "len")


def _root(steps: list, i: int) -> str | None:
    """The local variable from which a chain of attributes that ends at step `i` starts."""
    while i >= 0 and steps[i].opname in _LOOKS:
        i -= 1
    if i < 0 or not steps[i].opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
        return None
    name = steps[i].argval
    return name[-1] if isinstance(name, tuple) else name  # two loads in one, from Python 3.13


def _is_constant(steps: list, i: int) -> bool:
    """Whether the second argument of a `getattr` whose arguments start at step `i` is a constant."""
    if steps[i].opname == "PUSH_NULL":
        i += 1
    if not steps[i].opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL")):
        return False
    if isinstance(steps[i].argval, tuple):  # the second one is a variable too
        return False
    i += 1
    while steps[i].opname in _LOOKS:
        i += 1
    return steps[i].opname == "LOAD_CONST"


def returns(function: FunctionType) -> int | None:
    """How many values a function returns as a tuple that it builds; None where it does not, or not always as many."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    steps = [] if code is None else [s for s in dis.get_instructions(code) if s.opname != "EXTENDED_ARG"]
    ends = [(before, step) for before, step in pairwise(steps) if step.opname == "RETURN_VALUE"]
    counts = {a.argval if a.opname == "BUILD_TUPLE" and not b.is_jump_target else None for a, b in ends}
    return counts.pop() if len(counts) == 1 else None


def functions(function: FunctionType) -> Iterator[FunctionType]:
    """A function, and what it wraps; without the wrappers of libraries."""
    while isinstance(function, FunctionType):
        inner = getattr(function, "__wrapped__", None)
        if inner is None or not from_library(function.__globals__.get("__name__")):
            yield function
        function = inner


def from_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in LIBRARIES


# --- parts of which only known attributes may be used -------------------------------------------------------


def reads(module: nn.Module, method: str = "forward") -> set[str] | None:
    """Names of its own attributes that the forward of a module uses, methods that it calls included.

    None where they cannot be told: the forward is no plain function, or it writes attributes.
    """
    found, todo, seen = set(), [method], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        function = getattr(type(module), name)
        if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
            return None
        code = look(function.__code__)
        if code.writes or code.computed:
            return None
        for used in code.names:
            if used in vars(module) or any(used in vars(module)[k] for k in ("_parameters", "_buffers", "_modules")):
                found.add(used)
            elif hasattr(type(module), used) and not hasattr(nn.Module, used):
                is_method = isinstance(getattr(type(module), used), FunctionType)
                (todo.append if is_method else found.add)(used)
    return found


def beyond(module: nn.Module, needed: set[str], known: set[str], method: str = "forward") -> str:
    """What keeps the forward of a module from being one that we know, or ""."""
    used = reads(module, method)
    if used is None:
        return "code that cannot be looked into"
    if not needed <= used:
        return f"no {', '.join(sorted(needed - used))}"
    return ", ".join(sorted(used - needed - known))


def ignores(module: nn.Module, argument: str) -> bool:
    """Whether the forward of a module never looks at its argument of this name."""
    for step in dis.get_instructions(inspect.unwrap(type(module).forward)):
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if step.opname.startswith("LOAD_FAST") and argument in names:
            return False
    return True
