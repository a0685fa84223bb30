"""Input checks shared by the public ops: plain Python, before any kernel runs."""

from __future__ import annotations

from numbers import Integral, Real

import numpy
import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
STRIDED = torch.strided
INT = (int, torch.SymInt, Integral)  # the ABCs, which NumPy's scalars are registered with, are slow and so come last
NUMBER = (float, int, torch.SymFloat, torch.SymInt, Real)
FLAG = (bool, int, torch.SymBool, numpy.bool_)


def tensor(name: str, value: object, *, ndim: int | tuple[int, ...] | None = None, floating: bool = True) -> None:
    """`value` is a strided tensor with an allowed number of dimensions and (if asked) a floating dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if ndim is not None:
        allowed = (ndim,) if isinstance(ndim, int) else ndim
        if value.ndim not in allowed:
            want = " or ".join(str(n) for n in allowed)
            raise ValueError(f"{name} must have {want} dimensions, got shape {tuple(value.shape)}")
    # Dynamo refuses to read a layout in a backward, and has no tensors of another one.
    if not torch.compiler.is_compiling() and value.layout is not STRIDED:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")
    if floating and value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {value.dtype}")


def autocast(kind: str) -> torch.dtype | None:
    """The dtype of autocast on a kind of device; None where it is off, or where torch knows of none (meta)."""
    known = kind == "cpu" or kind == "cuda" or torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else None


def same_device(**tensors: Tensor | None) -> None:
    """All given tensors live on one device."""
    first_name = first = None
    for name, value in tensors.items():
        if value is None:
            continue
        try:
            device = value.device
        except AttributeError:
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}") from None
        if first is None:
            first_name, first = name, device
        elif device != first:
            raise ValueError(f"{name} is on {device} but {first_name} is on {first}: move them to one device")


def integer(name: str, value: object, least: int = 0) -> None:
    """`value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, INT):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def sides(name: str, value: object, least: int = 0, count: int = 2) -> tuple[int, ...]:
    """One int or `count` (two or three), each at least `least`, as so many."""
    every = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    words = {2: "two", 3: "three"}[count]
    if any(isinstance(v, bool) or not isinstance(v, INT) for v in every):
        raise TypeError(f"{name} must be an int or {words} ints, got {value!r}")
    if len(every) != count:
        raise ValueError(f"{name} must be an int or {words} ints, got {value!r}")
    if min(every) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return every


def pair(name: str, value: object, least: int = 0) -> tuple[int, int]:
    """One int or two, each at least `least`, as two."""
    return sides(name, value, least)


def grid(name: str, value: object, solid: bool = False) -> tuple[int, ...]:
    """Rows x columns, each at least one; where `solid`, planes x rows x columns, too."""
    if not isinstance(value, (tuple, list)) or len(value) not in ((2, 3) if solid else (2,)):
        want = "two ints (rows, columns)" + (" or three (planes, rows, columns)" if solid else "")
        raise TypeError(f"{name} must be {want}, got {value!r}")
    return sides(name, value, 1, len(value))


def device(name: str, value: object) -> torch.device | None:
    """`value` as a device; None stays None."""
    if value is None or isinstance(value, torch.device):
        return value
    try:
        if type(value) is int and not torch.accelerator.is_available():  # a torch for CUDA would fail later
            raise RuntimeError("there is no accelerator here")
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError) as error:
        kind = ValueError if isinstance(value, (str, int)) else TypeError
        raise kind(f"{name} must be a torch.device or the name of one, got {value!r}: {error}") from None


def flag(name: str, value: object) -> bool:
    """`value` is true or false, and not something that has a length."""
    if not isinstance(value, FLAG):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return bool(value)


def number(name: str, value: object) -> None:
    if not isinstance(value, NUMBER):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def positive(name: str, value: object) -> None:
    """`value` is a number above 0."""
    if not isinstance(value, NUMBER):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not value > 0:  # NaN too
        raise ValueError(f"{name} must be positive, got {value}")


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(repr(a) for a in allowed)}, got {value!r}")


def table(name: str, value: Tensor, rows: tuple[int, ...], width: int) -> Tensor:
    """A table of embeddings [rows, width]; leading dimensions of size one are dropped."""
    tensor(name, value)
    if value.ndim > 2 and all(size == 1 for size in value.shape[:-2]):
        value = value.reshape(value.shape[-2:])
    if value.ndim != 2 or all(value.shape[0] != r for r in rows) or value.shape[1] != width:
        want = " or ".join(f"[{r}, {width}]" for r in rows)
        raise ValueError(f"{name} must have shape {want} (or with a leading 1), got {tuple(value.shape)}")
    return value


def vector(name: str, value: Tensor, width: int) -> Tensor:
    """A vector of `width` values; dimensions of size one are dropped."""
    tensor(name, value)
    shape = value.shape
    if len(shape) == 1 and shape[0] == width:
        return value  # no node in the autograd graph for nothing
    if len(shape) == 0 or value.numel() != width or shape[-1] != width:
        raise ValueError(f"{name} must hold {width} values, e.g. shape [{width}], got {tuple(shape)}")
    return value.reshape(width)


def holds(condition: Tensor, message: str) -> None:
    """Raise where a value is wrong: at once on a CPU, by a device-side assertion (no sync) on a GPU."""
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(condition.all()):
            raise ValueError(message)
    else:
        torch._assert_async(condition.all(), message)


def promote(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that PyTorch gives to the sum of the given tensors."""
    dtypes = [t.dtype for t in tensors if t is not None]
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result
