"""Input checks shared by the public ops: plain Python, before any kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def tensor(name: str, value: object, *, ndim: int | tuple[int, ...] | None = None, floating: bool = True) -> None:
    """`value` is a strided tensor with an allowed number of dimensions and (if asked) a floating dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if ndim is not None:
        allowed = (ndim,) if isinstance(ndim, int) else ndim
        if value.ndim not in allowed:
            want = " or ".join(str(n) for n in allowed)
            raise ValueError(f"{name} must have {want} dimensions, got shape {tuple(value.shape)}")
    if floating and value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {value.dtype}")


def same_device(**tensors: Tensor | None) -> None:
    """All given tensors live on one device."""
    first_name = first = None
    for name, value in tensors.items():
        if value is None:
            continue
        if first is None:
            first_name, first = name, value.device
        elif value.device != first:
            raise ValueError(f"{name} is on {value.device} but {first_name} is on {first}: move them to one device")


def one_of(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
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
    if value.numel() != width or value.shape[-1] != width:
        raise ValueError(f"{name} must hold {width} values, e.g. shape [{width}], got {tuple(value.shape)}")
    return value if value.ndim == 1 else value.reshape(width)  # no node in the autograd graph for nothing


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
