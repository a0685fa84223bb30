"""When accelerated code is worth it: below some size its checks cost more than its kernels save.

`LEAST` is what `maefast bench worth` measured on transformer blocks, for each kind of device and arithmetic: (power,
size), so that no block was slower than it was before where tokens x width ** power (1 or 2) is at least that size.
Smaller ones run as they were, and so do the methods of their model, whose tokens are counted after masking. A kind of
device that was not measured has no limits, and neither has torch.compile, after which no checks are left.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from maefast.ops import _attention_table, _checks, _dispatch

# (device, arithmetic, whether gradients are recorded) -> (power, size). None: never worth it.
# AMD EPYC of family 26, the larger of those for 1 and 2 threads, torch 2.13: `worth-*-threads.json` in bench/results/.
LEAST: dict[tuple[str, str, bool], tuple[int, int] | None] = {
    ("cpu", "float32", True): (2, 2_359_296),
    ("cpu", "float32", False): (2, 2_506_752),
    ("cpu", "bfloat16", True): (1, 13_056),
    ("cpu", "bfloat16", False): (1, 196_608),
    ("cpu", "float64", True): None,
    ("cpu", "float64", False): None,
}
# Where a block is not worth it if its attention runs as it was: the rest saves less than the calls cost.
WITH_ATTENTION = {("cpu", "bfloat16")}
MASKED = 4  # of a model's methods, which are given images, blocks see a part: a quarter at the usual mask ratio
ALL = (1, 0)
_always = False


class Size(NamedTuple):
    """What a module makes of images: a token of `width` values for each `pixels` values."""

    pixels: int = 1
    width: int = 1


@contextmanager
def always():
    """Inside, nothing is too small (process-wide): for comparisons, tests and measurements."""
    global _always
    before, _always = _always, True
    try:
        yield
    finally:
        _always = before


def arithmetic(x: Tensor) -> str:
    if x.dtype is torch.float64:
        return "float64"
    if x.dtype.itemsize == 2 or _checks.autocast(x.device.type) is not None:
        return "bfloat16"
    return "float32"


def why_not(x: object, size: Size = Size()) -> str | None:  # noqa: B008
    """Why code that is given tokens [B, S, D], or images, is quicker as it was, or None."""
    if _always or not isinstance(x, Tensor) or torch.compiler.is_compiling():
        return None
    key = (x.device.type, arithmetic(x), torch.is_grad_enabled())
    limit = LEAST.get(key, ALL)
    if limit is ALL:
        return None
    if limit is not None:
        power, least = limit
        values, width = x.numel(), x.shape[-1]
        if x.ndim != 3:
            values, width = values // size.pixels * size.width // MASKED, size.width
        if values * (width if power == 2 else 1) >= least:
            return None
    return _text(*key[:2], limit)


@cache
def _text(device: str, kind: str, limit: tuple[int, int] | None) -> str:
    if limit is None:
        return f"{kind} is quicker as it was on a {device.upper()}"
    size = "tokens x width" if limit[0] == 1 else "tokens x width^2"
    return f"below {limit[1]:,} ({size}) {kind} is quicker as it was on a {device.upper()}"


def needs_attention(x: Tensor) -> bool:
    """Whether a block is worth it only if its attention is fused."""
    if _always or torch.compiler.is_compiling():
        return False
    return (x.device.type, arithmetic(x)) in WITH_ATTENTION


def no_kernel(device: str, dtype: torch.dtype, head_dim: int, length: int) -> str | None:
    """Why attention with a bias of each pair or rotated queries is not fused, or None: no kernel serves the call, and
    the reference keeps all scores. The rest of a block alone was not quicker (0.96 to 1.02x on an AMD EPYC)."""
    if _always or _dispatch.forced() is not None:
        return None
    call = _attention_table.Call(
        device,
        dtype,
        head_dim,
        length,
        length,
        packed=False,
        cross=False,
        causal=False,
        extras=True,
    )
    if _attention_table.choose(call, None) != "reference":
        return None
    kind = str(dtype).removeprefix("torch.")
    return f"no kernel serves positions in {kind}, heads of {head_dim}, on a {device.upper()}"
