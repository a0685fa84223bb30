"""Elementwise functions of torch on `Cells`: torch's own function on the packed values of the sites that are seen.

Which functions are elementwise, torch itself says: the tag ``pointwise`` of its operators. From it one table is made of
every function, method, operator and in-place form. Only what has no tag stands here by hand; a test finds what
is missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.nn.cells import ELEMENTWISE, HANDLERS, Cells, UnknownSparseArgument, method, where

NAMESPACES = (torch, torch.Tensor, F, torch.special)

# Without the tag: composed of operators that have it, or other names of them; and hardswish, to which torch forgot it.
COMPOSED = """
    absolute arccos arccosh arcsin arcsinh arctan arctan2 arctanh conj divide expit fix floor_divide gammainc gammaincc
    gammaln greater greater_equal hardswish isclose isreal less less_equal log_sigmoid multigammaln multiply ndtr
    negative not_equal psi resolve_conj resolve_neg softsign subtract tanhshrink _threshold
"""
# Each value by a draw of its own, so that masked sites need none; like, not the same as, those of a dense map.
RANDOM = """
    alpha_dropout bernoulli dropout rand_like randn_like randint_like rrelu bernoulli_ cauchy_ exponential_ geometric_
    log_normal_ normal_ random_ uniform_
"""
COPIES = """
    bfloat16 bool byte char double empty_like float full_like half int long ones_like short to type type_as zeros_like
"""
# Python's operators whose names are not those of torch's functions.
OPERATORS = {
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "lshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
    "truediv": "div",
    "floordiv": "floor_divide",
    "mod": "remainder",
}
NEVER = ("__div__", "__rdiv__", "__idiv__", "_conj_physical", "_conj_physical_")  # Python 2's, private


def handles(*functions: Callable):
    """Register the handler of torch functions."""

    def register(handler):
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


# --- operands ----------------------------------------------------------------------------------------------


def operand(x: Cells, other) -> Tensor | float:
    """`other` in a shape that combines with x.rows: cells of the same plan, a number, a tensor that broadcasts, or a
    whole map, of which the active cells are taken."""
    if isinstance(other, Cells):
        check_same(x, other)
        return other.rows
    if not isinstance(other, Tensor) or other.ndim == 0:
        return other
    value = other if other.ndim >= x.ndim else other.reshape((1,) * (x.ndim - other.ndim) + tuple(other.shape))
    if x.channels_last and value.ndim == x.ndim:
        value = value.movedim(-1, 1)
    batch, channels, *sides = value.shape
    if value.ndim == x.ndim and batch in (1, x.plan.batch) and (channels in (1, x._channels) or x._channels == 1):
        if max(sides) == 1:
            return per_cell(value.movedim(1, -1), x)
        sites = tuple(s * g for s, g in zip(x._sites, x.plan.grid))
        if all(size in (1, full) for size, full in zip(sides, sites)):
            return Cells.pack(value.expand(x.plan.batch, -1, *sites), x.plan).rows
    raise UnknownSparseArgument(f"{where()}a tensor {tuple(other.shape)} does not go with cells {tuple(x.shape)}")


def of_sides(x: Cells, what: str, sides: int) -> None:
    """Raise where a function of maps is given volumes, or the other way round."""
    if x.ndim != sides + 2:
        raise UnknownSparseArgument(f"{where()}{what} takes maps of {sides} sides, and these are {x.layouts[0]}")


def per_cell(value: Tensor, x: Cells) -> Tensor:
    """[B or 1, 1, 1, C], with one 1 more of volumes, -> one for each cell of its sample."""
    if value.shape[0] == 1:
        return value
    keep = x.plan.tokens.keep
    if keep is not None:
        return value[:, None].expand(-1, keep, *value.shape[1:]).reshape(-1, *value.shape[1:])
    return value.index_select(0, samples(x))


def samples(x: Cells) -> Tensor:
    """[T], the sample of each cell."""
    return torch.div(x.plan.cells, x.plan.tokens.num_tokens, rounding_mode="floor")


def check_same(x: Cells, other: Cells) -> None:
    if other.plan is not x.plan or other._sites != x._sites or other.channels_last != x.channels_last:
        raise UnknownSparseArgument(f"{where()}cells of different plans, sizes or layouts: {other!r} and {x!r}")


def wrap(x: Cells, out):
    """The result of a function of x.rows, as cells."""
    if out is x._rows:
        return x  # what torch gives back itself, such as a dropout in evaluation
    if isinstance(out, Tensor):
        if out.shape[:-1] != x._rows.shape[:-1]:
            raise UnknownSparseArgument(f"{where()}the result is no map any more")
        return x.like(out)
    return tuple(wrap(x, part) for part in out) if isinstance(out, tuple) else out


# --- out of place and in place -----------------------------------------------------------------------------


def elementwise(function: Callable, fused: str | None = None) -> Callable:
    """The handler of a function; `fused` is the activation that a batch norm which waits can take along."""

    def handler(*args, **kwargs):
        x = _first(args, kwargs)
        if kwargs:
            if kwargs.pop("inplace", False):
                return change(x, handler, args, kwargs)
            if kwargs:
                kwargs.pop("memory_format", None)
                if kwargs.get("out") is not None:
                    raise UnknownSparseArgument(f"{where()}packed cells cannot be the `out` of a function")
        if fused is not None and x._norm is not None and x._norm.fits():
            return x.like(x._norm.run(fused))
        if len(args) == 1 and not kwargs:
            return wrap(x, function(x.rows))
        return wrap(x, function(*(operand(x, a) for a in args), **{k: operand(x, v) for k, v in kwargs.items()}))

    return handler


def in_place(handler: Callable) -> Callable:
    """The handler of the form with ``_``, from that of the function without."""

    def changed(*args, **kwargs) -> Cells:
        return change(args[0] if args else next(iter(kwargs.values())), handler, args, kwargs)

    return changed


def change(x, handler: Callable, args: tuple, kwargs: dict) -> Cells:
    """Give `x` the values of ``handler(*args, **kwargs)``."""
    if not isinstance(x, Cells) or (args and args[0] is not x):
        raise UnknownSparseArgument(f"{where()}a plain tensor cannot take the values of packed cells in place")
    out = handler(*args, **kwargs)
    if out is x:
        return x
    if out._channels != x._channels:
        raise UnknownSparseArgument(f"{where()}cells {tuple(x.shape)} cannot become {tuple(out.shape)} in place")
    if out.dtype is not x.dtype:
        if not torch.can_cast(out.dtype, x.dtype):
            raise UnknownSparseArgument(f"{where()}cells of {x.dtype} cannot become {out.dtype} in place")
        out = out.like(out.rows.to(x.dtype))
    return x.replace(out)


def _set(function: Callable, value: Callable) -> None:
    HANDLERS[function] = in_place(lambda x, *args: x.like(value(x, *args)))


_set(Tensor.zero_, lambda x: torch.zeros_like(x.rows))
_set(Tensor.fill_, lambda x, value: torch.full_like(x.rows, value))
_set(Tensor.copy_, lambda x, other, *_: torch.zeros_like(x.rows).copy_(operand(x, other)))


def _moved(function: Callable) -> Callable:
    """Another device takes a plan there."""

    def handler(x: Cells, *args, **kwargs) -> Cells:
        out = wrap(x, function(x.rows, *(a.rows if isinstance(a, Cells) else a for a in args), **kwargs))
        if out.device != x.device:
            out.plan = x.plan.to(out.device)
        return out

    return handler


for _function in (Tensor.to, Tensor.cpu, Tensor.cuda):
    HANDLERS[_function] = _moved(_function)


def _asked(name: str) -> Callable:
    return lambda x: getattr(x.rows, name)()


for _name in ("is_floating_point", "is_complex", "is_signed", "element_size", "get_device"):
    for _space in (torch, Tensor):
        if hasattr(_space, _name):
            HANDLERS[getattr(_space, _name)] = _asked(_name)
HANDLERS[torch.numel] = Cells.numel


def _first(args: tuple, kwargs: dict) -> Cells:
    for value in args:
        if isinstance(value, Cells):
            return value
    for value in kwargs.values():
        if isinstance(value, Cells):
            return value
    raise UnknownSparseArgument(f"{where()}packed cells are inside a list, where no elementwise function looks")


# --- the table ---------------------------------------------------------------------------------------------


@functools.cache
def fill() -> None:
    """Make `ELEMENTWISE`, and the methods of `Cells` from all that is known."""
    found = table()
    for name in dir(Tensor):
        function = getattr(Tensor, name)
        if not name.startswith("_") and name not in vars(Cells) and (function in HANDLERS or function in found):
            setattr(Cells, name, method(function))
    ELEMENTWISE.update(found)  # last: whoever finds something in it relies on the methods, too


def table() -> dict[Callable, Callable]:
    found: dict[Callable, Callable] = {}
    for function, base, changes in functions():
        if function in HANDLERS or function in found:
            continue
        found[function] = in_place(_out_of_place(function, base)) if changes else elementwise(function)
    return found


def functions() -> Iterator[tuple[Callable, str, bool]]:
    """(function, name of the function out of place, whether it is in place) of all that is elementwise."""
    by_hand = {*COMPOSED.split(), *RANDOM.split(), *COPIES.split()}
    for space in NAMESPACES:
        for name in dir(space):
            function = getattr(space, name)
            if not callable(function) or isinstance(function, type) or name in NEVER:
                continue
            base, changes = _base(name)
            own = _base(getattr(function, "__name__", name))[0]
            if base and any(n in by_hand or pointwise(n) for n in (base, own, own.removeprefix("special_"))):
                yield function, base, changes


def _base(name: str) -> tuple[str, bool]:
    """("add", True) for "add_" and "__iadd__", ("sub", False) for "__rsub__"."""
    if not name.startswith("__"):
        return (name, False) if not name.endswith("_") else (name[:-1], True)
    name = name.strip("_")
    for prefix, changes in (("", False), ("i", True), ("r", False)):
        base = name.removeprefix(prefix)
        base = OPERATORS.get(base, base)
        if name.startswith(prefix) and (pointwise(base) or base in OPERATORS.values()):
            return base, changes
    return "", False


@functools.cache
def pointwise(name: str) -> bool:
    """Whether torch calls its operator of this name elementwise."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = () if packet is None else (getattr(packet, o) for o in packet.overloads())
    return any(
        torch.Tag.pointwise in overload.tags and {str(r.type) for r in overload._schema.returns} == {"Tensor"}
        for overload in overloads
    )


def _out_of_place(function: Callable, base: str) -> Callable:
    # Those of torch._C._nn and of torch.nn.functional differ in their arguments.
    native = (torch._C._nn,) if getattr(function, "__module__", None) == "torch._C._nn" else ()
    for space in (*native, Tensor, torch, F):
        other = getattr(space, base, None)
        if other is not None:
            return HANDLERS.get(other) or elementwise(other)
    return elementwise(lambda rows, *args, **kwargs: function(rows.clone(), *args, **kwargs))  # such as normal_
