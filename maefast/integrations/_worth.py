"""When an accelerated transformer block is worth it: below some size its checks cost more than its kernels save.

`LEAST` is what `python -m bench.worth` measured, for each kind of device and arithmetic: the number of values of the
residual stream (tokens x width) from which on no block was slower than it was before. Smaller ones run as they were. A
kind of device that has not been measured has no limits.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor

# (device, arithmetic, whether gradients are recorded) -> tokens x width. None: never worth it.
# AMD EPYC, 1 and 2 threads, torch 2.13: bench/results/worth/cpu.json.
LEAST: dict[tuple[str, str, bool], int | None] = {}
# Where a block is not worth it if its attention runs as it was: the rest saves less than the calls cost.
WITH_ATTENTION = {("cpu", "bfloat16")}
_always = False


@contextmanager
def always():
    """Inside, no block is too small (process-wide): for tests, and for measuring."""
    global _always
    before, _always = _always, True
    try:
        yield
    finally:
        _always = before


def arithmetic(x: Tensor) -> str:
    if x.dtype is torch.float64:
        return "float64"
    if x.dtype.itemsize == 2 or torch.is_autocast_enabled(x.device.type):
        return "bfloat16"
    return "float32"


def why_not(x: Tensor) -> str | None:
    """Why a block that is given x [B, S, D] is quicker as it was, or None."""
    if _always:
        return None
    gradients = torch.is_grad_enabled()
    kind = arithmetic(x)
    least = LEAST.get((x.device.type, kind, gradients), 0)
    if least is None:
        return f"in {kind} {'with' if gradients else 'without'} gradients it is not slower as it was"
    if x.numel() < least:
        return f"fewer than {least:,} values (tokens x width) are quicker as they were"
    return None


def needs_attention(x: Tensor) -> bool:
    """Whether a block is worth it only if its attention is fused."""
    return not _always and (x.device.type, arithmetic(x)) in WITH_ATTENTION
