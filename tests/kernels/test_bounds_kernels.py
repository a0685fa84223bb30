"""No kernel reads or writes outside its tensors.

In the interpreter a kernel's loads and stores are real ones, so every input and output is put against a memory page
that may not be touched: a step over the edge ends the process, which test_interpreter.py reports. Each case runs with
the tensors against the page behind them, then against the page before them.
"""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from torch import Tensor

from maefast.kernels import _common, cells, embed, implicit_conv, loss, mask, pool, restore
from maefast.ops.cells import CellMask
from tests.kernels.support import INTERPRET, random_plan, random_tensor

PAGE = mmap.PAGESIZE
PROT_NONE = 0


def fenced_empty(shape, *, dtype: torch.dtype, device=None, at_end: bool) -> Tensor:
    """torch.empty between two pages that may not be touched, ending at the second or starting at the first."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    room = -(-max(size, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + room):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), PROT_NONE) == 0
    offset = PAGE + (room - size if at_end else 0)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


def fenced(op, at_end: bool):
    """`op` on fenced copies of its inputs."""

    def call(*args):
        copies = [
            fenced_empty(x.shape, dtype=x.dtype, at_end=at_end).copy_(x) if isinstance(x, Tensor) else x for x in args
        ]
        return op(*copies)

    return call


class FencedTorch:
    """The `torch` that a kernel module sees: every output it allocates is fenced."""

    def __init__(self, at_end: bool):
        self.at_end = at_end

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, shape, **kwargs):
        return fenced_empty(shape, **kwargs, at_end=self.at_end)


def cases(batch: int, tokens: int, keep, width: int, prefix: int):
    """(op, arguments) of every raw op on one plan."""
    plan = random_plan(batch, tokens, keep, 0)
    kept, rows, cu = plan.total_visible, batch * prefix, plan.cu_visible
    for by_position in (False, True):
        yield mask.token_mask, (random_tensor(batch, tokens), cu, kept, by_position)
        yield mask.token_mask, (random_tensor(batch, tokens).half(), cu, kept, by_position)

    x = random_tensor(batch, prefix + tokens, width)
    yield embed.gather_tokens, (x, plan.masked, plan.cu_masked, plan.max_masked, prefix, True)
    yield embed.gather_tokens, (x, plan.visible, cu, plan.max_visible, prefix, False)
    packed, pos, lead = random_tensor(kept + rows, width), random_tensor(tokens, width), random_tensor(prefix, width)
    yield embed.gather_tokens_backward, (packed, plan.slot, cu, prefix, True, False)
    yield embed.gather_tokens_backward, (packed[:kept].clone(), plan.slot, cu, prefix, False, False)
    yield embed.place_tokens, (packed[:kept].clone(), plan.visible, cu, tokens, pos, lead if prefix else None)
    yield embed.place_tokens_backward, (packed, plan.slot, cu, prefix, True, prefix > 0, torch.float32)
    yield embed.place_tokens_backward, (packed, plan.slot, cu, prefix, False, False, torch.float16)

    token, table = random_tensor(width), random_tensor(prefix + tokens, width)
    lists = plan.visible, plan.masked
    for first in (False, True):
        yield restore.restore_tokens, (packed, *lists, cu, token, table, prefix, first, False)
        yield restore.restore_tokens, (packed, *lists, cu, token, pos, prefix, first, True)
        back = x, *lists, plan.slot, cu
        for pos_rows, on_masked, need in ((prefix + tokens, False, True), (tokens, True, False), (0, False, False)):
            yield restore.restore_tokens_backward, (*back, pos_rows, prefix, first, on_masked, need, torch.float32)

    spatial = CellMask(plan, (tokens, 1))
    for h, w in ((2, 3), (1, 1)):
        mapped, flat = random_tensor(batch, tokens * h, w, width), random_tensor(kept, h, w, width)
        sizes = [batch, tokens, 1]
        yield cells.fill_sum, (mapped, plan.slot, sizes)
        for channels_last in (True, False):
            image = mapped if channels_last else mapped.permute(0, 3, 1, 2).contiguous()
            yield cells.pack_cells, (image, plan.visible, sizes[1:], channels_last)
            yield cells.unpack_cells, (flat, plan.slot, sizes, token, channels_last)
        window, around = ([3, 3], [h, 1], [1, 1]), spatial.neighbours(1)
        yield pool.max_pool_cells, (flat, around, *window)
        small = random_tensor(kept, 1, w, width)
        yield pool.max_pool_cells_backward, (small, small.abs().byte(), around, *window)
        for include_pad in (True, False):
            yield pool.avg_pool_cells, (flat, around, *window, include_pad)
            yield pool.avg_pool_cells_backward, (small, around, *window, include_pad)
        taps, bias, grad = random_tensor(9, width, 7), random_tensor(7), random_tensor(kept, 1, w, 7)
        yield implicit_conv.implicit_conv, (flat, around, taps, bias, *window, [1, 1])
        yield implicit_conv.implicit_conv_grad_x, (grad, around, taps, *window, [1, 1])
        yield implicit_conv.implicit_conv_grad_weight, (flat, grad, around, *window, [1, 1])

    for patch, channels in (((1, 3, 5), 3), ((2, 4, 4), 2)):
        shape = batch, channels, patch[0], patch[1] * tokens, patch[2]
        images, values = random_tensor(*shape), channels * patch[0] * patch[1] * patch[2]
        yield embed.patch_rows, (images, plan.visible, patch, torch.float16)
        yield embed.patch_rows_backward, (random_tensor(kept, values), plan.slot, shape, patch, torch.float32)
        for packed_rows, channels_first, norm in ((True, False, 1), (False, True, 2), (False, False, 0)):
            pred = random_tensor(plan.total_masked if packed_rows else batch * tokens, values)
            args = patch, packed_rows, channels_first, norm, 1, 1.0
            yield loss.patch_loss, (pred, images, plan.masked, *args)
            stats = random_tensor(plan.total_masked, channels if norm == 2 else 1, 2)
            back = random_tensor(plan.total_masked), pred, images, plan.masked, plan.slot, stats
            yield loss.patch_loss_backward, (*back, *args, False)
            yield loss.patch_loss_backward, (*back, *args, True)


SIZES = [(2, 11, [3, 8], 20, 1), (2, 9, [9, 0], 16, 3), (1, 1, 1, 1, 0), (1, 1, 0, 5, 2), (2, 33, [1, 20], 80, 0)]

if INTERPRET:  # a GPU has no fence; compute-sanitizer does this there

    @pytest.mark.parametrize("at_end", [True, False], ids=["behind", "before"])
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_nothing_outside_is_touched(monkeypatch, size, at_end):
        for module in (_common, cells, embed, implicit_conv, loss, mask, pool, restore):
            monkeypatch.setattr(module, "torch", FencedTorch(at_end))
        ran = 0
        for op, args in cases(*size):
            fenced(op, at_end)(*args)
            ran += 1
        assert ran > 40

    def test_the_fence_holds():
        tensor = fenced_empty((5,), dtype=torch.float32, at_end=True)
        tensor.fill_(1.0)
        assert (tensor.data_ptr() + 20) % PAGE == 0
        assert fenced_empty((5,), dtype=torch.float32, at_end=False).data_ptr() % PAGE == 0
