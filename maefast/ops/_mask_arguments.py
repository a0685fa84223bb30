"""What a plan is made from, checked and counted on the host: sizes, maps, positions, numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maefast.ops import _checks


def check_size(batch: int, num_tokens: int) -> None:
    """Sizes of a plan, given by the caller."""
    for name, value in (("batch", batch), ("num_tokens", num_tokens)):
        if isinstance(value, bool) or not isinstance(value, _checks.INT):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if batch < 1 or num_tokens < 1:
        raise ValueError(
            f"a plan needs at least one sample and one token, got batch = {batch}, num_tokens = {num_tokens}"
        )
    if batch * num_tokens >= 2**31:
        raise ValueError(
            f"batch = {batch} x num_tokens = {num_tokens}: flat indices are int32, so B*N must stay below 2**31"
        )


def check_map(name: str, value: Tensor) -> None:
    """The size of a map [B, N] that a plan is made from."""
    batch, num_tokens = value.shape
    if batch < 1 or num_tokens < 1:
        raise ValueError(f"{name} must have at least one sample and one token, got shape {tuple(value.shape)}")
    if batch * num_tokens >= 2**31:
        raise ValueError(f"{name} is {batch} x {num_tokens}: flat indices are int32, so B*N must stay below 2**31")


def index_rows(name: str, indices: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One vector of positions a sample."""
    rows = list(indices.unbind(0)) if isinstance(indices, Tensor) and indices.ndim == 2 else indices
    if not isinstance(rows, (list, tuple)) or not rows:
        raise ValueError(f"{name} must be an int tensor [B, n] or a non-empty list of int vectors")
    for row in rows:
        _checks.tensor(name, row, ndim=1, floating=False)
        if row.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {row.dtype}")
        if row.device != rows[0].device:
            raise ValueError(f"{name} lie on {rows[0].device} and on {row.device}: move them to one device")
    return list(rows)


def counts_of(keep: int | Sequence[int] | Tensor, batch: int, num_tokens: int, name: str = "keep") -> int | list[int]:
    """Host counts; a tensor on a GPU costs one sync here."""
    if isinstance(keep, Tensor):
        if keep.is_floating_point() or keep.dtype is torch.bool or keep.shape not in ((), (batch,)):
            raise ValueError(f"{name} must be an int tensor of shape [{batch}], got {keep.dtype} {tuple(keep.shape)}")
        if keep.device.type == "meta" or keep.layout is not torch.strided:
            raise ValueError(f"{name} must hold values, got a tensor on {keep.device} of layout {keep.layout}")
        keep = keep.tolist()
    if isinstance(keep, (list, tuple)):
        counts = list(keep)
        if len(counts) != batch:
            raise ValueError(f"{name} has {len(counts)} counts for a batch of {batch}")
    else:
        counts = [keep]
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int, or ints, one a sample; got {count!r} ({type(count).__name__})")
        if not 0 <= count <= num_tokens:
            raise ValueError(f"{name} must lie in [0, {num_tokens}] (the number of tokens), got {count}")
    return one_or_all(counts)


def counted(name: str, given: int | Sequence[int] | None, wanted: Tensor, what: str):
    """The number of True entries of each row [B, N], or `given` if that is it."""
    counts = wanted.sum(1)
    if given is None:
        if wanted.device.type == "meta":
            raise ValueError(f"masked has no values to count (a meta tensor): give {name}")
        return counts
    given = counts_of(given, *wanted.shape, name=name)
    want = integers(given, wanted.device) if isinstance(given, list) else given
    _checks.holds(counts == want, f"from_bool: `{name}` does not match the number of {what}")
    return given


def sum_of(a: int | list[int], b: int | list[int], batch: int) -> int | list[int]:
    if not isinstance(a, list) and not isinstance(b, list):
        return a + b
    a, b = (value if isinstance(value, list) else [value] * batch for value in (a, b))
    return one_or_all([x + y for x, y in zip(a, b)])


def one_or_all(counts: list[int]) -> int | list[int]:
    return counts[0] if min(counts) == max(counts) else counts


def starts(counts: int | list[int], batch: int, device: torch.device) -> tuple[Tensor, int]:
    """(int32 [B+1], where each sample starts; how many in all)."""
    if not isinstance(counts, list):
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * counts, batch * counts
    cu = [0]
    for count in counts:
        cu.append(cu[-1] + count)
    return integers(cu, device), cu[-1]


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    """int32 [n] of numbers that the host knows; the host does not wait."""
    if device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        return _captured_integers(values, device)
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)


def _captured_integers(values: Sequence[int], device: torch.device) -> Tensor:
    """The same inside a CUDA graph, which cannot hold a copy from pageable memory, and would read a pinned page again
    at every replay, long after it was freed. Here the numbers are arguments of kernels, about a hundred to a launch."""
    out = torch.zeros(len(values), dtype=torch.int32, device=device)
    torch._foreach_add_(list(out.unbind()), list(values))
    return out
