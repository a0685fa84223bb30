"""What the Triton launchers share: launch options, tile sizes, the device guard, the second stage of a sum."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INT32 = 2**31 - 1
ABSENT = tl.constexpr(-(2**31))  # the slot of a token that is neither visible nor masked; `ABSENT` of ops/mask.py

# Every operation rounds as it is written, whatever this Triton version fuses by default.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}
COPY = {"num_warps": 4, **OPTIONS}  # of the kernels that `row_tile` serves

_NO_GUARD = nullcontext()


def power(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def guard(x: Tensor) -> AbstractContextManager:
    """Make x's device the current one; free of cost where it already is."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(x.device)


def check_dtypes(op: str, *tensors: Tensor | None) -> None:
    """The kernels compute in float32, so float64 must never reach one."""
    for x in tensors:
        if x is not None and x.dtype not in FLOATS:
            raise TypeError(f"{op}: the Triton kernels serve float32, float16 and bfloat16, not {x.dtype}")


def check_count(op: str, what: str, count: int) -> None:
    """For the kernels that count in 32 bits where nothing real comes near: an error, never a wrong number."""
    if count > INT32:
        raise ValueError(f"{op}: the Triton kernel takes at most 2^31 - 1 {what}, got {count}")


def row_tile(rows: int, width: int, itemsize: int) -> tuple[int, int]:
    """(rows, columns) of the tile that one program of 4 warps copies.

    Columns: the power of two in 64..1024 that covers `width` with the least padding (192 -> 64, 768 -> 256,
    1024 -> 1024), so a row is read in whole 128-byte lines wherever its length allows. Rows fill the tile to 8 KiB:
    four independent 16-byte accesses a thread, enough in flight to cover latency at 16 warps an SM. Triton makes
    16-byte accesses only of rows it knows to be aligned, a width that 16 divides; others move one element at a
    time, so their tile is 8 elements a thread, to stay in registers.
    """
    sizes = [64, 128, 256, 512, 1024]
    block = min(sizes, key=lambda size: (ceil_div(width, size) * size, -size))
    block = min(block, power(width))
    values = 8192 // itemsize if width % 16 == 0 else 1024
    return max(1, min(values // block, power(rows))), block


def batch_splits(batch: int, programs: int, summed: bool) -> tuple[int, int]:
    """(splits, samples in each) of a batch whose samples one program visits in turn; `programs` cover one sample.

    About 1024 programs fill any GPU of today; a split also costs one float32 partial sum of the whole sequence, so
    where there are sums, a split has 8 samples or more (at 16 bits: a quarter of the gradient's own traffic).
    """
    splits = min(ceil_div(1024, programs), ceil_div(batch, 8) if summed else batch)
    each = ceil_div(batch, max(1, splits))
    return ceil_div(batch, each), each


@triton.jit
def sum_parts_kernel(parts, out, count, stride, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out[c] = sum over p of parts[p, c]: the second stage of a sum, always in the same order."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in range(0, count, PARTS):
        p = start + tl.arange(0, PARTS)
        here = (p < count)[:, None] & (cols < width)[None, :]
        total += tl.load(parts + p.to(tl.int64)[:, None] * stride + cols[None, :], mask=here, other=0.0)
    tl.store(out + cols, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=cols < width)


def sum_parts(parts: Tensor, out: Tensor) -> None:
    """Sum float32 `parts` [S, ...], whose rows may stand apart, into `out` [...]."""
    width = out.numel()
    if width == 0:
        return
    rows = min(256, power(parts.shape[0]))  # long columns are cut short: each step waits for memory
    block = min(4096 // rows, power(width))
    sum_parts_kernel[(ceil_div(width, block),)](
        parts, out, parts.shape[0], parts.stride(0), width, PARTS=rows, BLOCK=block, **COPY
    )
