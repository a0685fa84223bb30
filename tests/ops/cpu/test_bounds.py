"""A plan that does not fit its tensors raises; nothing is read or written outside of them."""

from __future__ import annotations

import pytest
import torch

from maefast.ops import token_mask
from tests.ops.cpu.common import needs_cpu_ops, randn, raw

pytestmark = needs_cpu_ops

BATCH, TOKENS, WIDTH, KEEP = 3, 8, 5, 2
OUT_OF_RANGE = [-(2**31), -1, TOKENS * BATCH, 2**31 - 1]


def plan():
    return token_mask(torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(0)), KEEP, backend="reference")


def changed(index: torch.Tensor, value: int, at: int = 1) -> torch.Tensor:
    index = index.clone()
    index[at] = value
    return index


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("value", [*OUT_OF_RANGE, TOKENS * 2])  # the last: a token of another sample
def test_bad_index(value):
    p = plan()
    visible, masked = changed(p.visible, value), changed(p.masked, value)
    cu, x, pos = p.cu_visible, randn(BATCH * KEEP, WIDTH), randn(TOKENS, WIDTH)
    with pytest.raises(RuntimeError, match="out of range"):
        raw("gather_tokens", randn(BATCH, TOKENS, WIDTH), visible, cu, KEEP, 0, True)
    with pytest.raises(RuntimeError, match="out of range"):
        raw("place_tokens", x, visible, cu, TOKENS, pos, None)
    for lists in ((visible, p.masked), (p.visible, masked)):
        with pytest.raises(RuntimeError, match="out of range"):
            raw("restore_tokens", x, *lists, cu, randn(WIDTH), pos, 0, False, False)
    if value in OUT_OF_RANGE:
        images, args = randn(BATCH, 3, 1, 2, 16), ([1, 2, 2], True, False, 1, 0, 1.0)
        with pytest.raises(RuntimeError, match="out of range"):
            raw("patch_rows", images, visible, [1, 2, 2], torch.float32)
        pred = randn(masked.numel(), 12)
        with pytest.raises(RuntimeError, match="out of range"):
            raw("patch_loss", pred, images, masked, *args)
        each, stats = raw("patch_loss", pred, images, p.masked, *args)
        with pytest.raises(RuntimeError, match="out of range"):
            raw("patch_loss_backward", each, pred, images, masked, p.slot, stats, *args, False)


@pytest.mark.parametrize("value", [BATCH * KEEP, 2**31 - 2])  # ~(2^31 - 1) says that a token is absent
def test_bad_slot(value):
    p = plan()
    t, m = int(p.visible[0]), int(p.masked[0])
    slot, masked_slot = changed(p.slot, value, t), changed(p.slot, ~max(value, BATCH * (TOKENS - KEEP)), m)
    cu, grad = p.cu_visible, randn(BATCH * KEEP, WIDTH)
    with pytest.raises(RuntimeError, match="out of range"):
        raw("gather_tokens_backward", grad, slot, cu, 0, True, False)
    with pytest.raises(RuntimeError, match="out of range"):
        raw("gather_tokens_backward", randn(p.total_masked, WIDTH), masked_slot, p.cu_masked, 0, True, True)
    with pytest.raises(RuntimeError, match="out of range"):
        raw("place_tokens_backward", grad, slot, cu, 0, True, False, torch.float32)
    with pytest.raises(RuntimeError, match="out of range"):
        raw("patch_rows_backward", randn(BATCH * KEEP, 12), slot, [BATCH, 3, 1, 2, 16], [1, 2, 2], torch.float32)
    for bad in (slot, masked_slot):
        full = randn(BATCH, TOKENS, WIDTH)
        with pytest.raises(RuntimeError, match="out of range"):
            raw("restore_tokens_backward", full, p.visible, p.masked, bad, cu, 0, 0, True, False, True, torch.float32)
    images, args = randn(BATCH, 3, 1, 2, 16), ([1, 2, 2], True, False, 1, 0, 1.0)
    pred = randn(p.total_masked, 12)
    each, stats = raw("patch_loss", pred, images, p.masked, *args)
    with pytest.raises(RuntimeError, match="out of range"):
        raw("patch_loss_backward", each, pred, images, p.masked, masked_slot, stats, *args, True)


@pytest.mark.parametrize(
    "cu", [ints(0, 2, 4, 7), ints(1, 2, 4, 6), ints(0, 4, 2, 6), ints(0, 2, 4), ints(0, -1, 4, 6), ints(0, 0, 14, 6)]
)
def test_bad_cu(cu):
    p = plan()
    with pytest.raises(RuntimeError, match="cu"):
        raw("gather_tokens", randn(BATCH, TOKENS, WIDTH), p.visible, cu, KEEP, 0, True)
    with pytest.raises(RuntimeError, match="cu"):
        raw("token_mask", randn(BATCH, TOKENS), cu, BATCH * KEEP, False)
    with pytest.raises(RuntimeError, match="maefast"):
        raw("place_tokens", randn(BATCH * KEEP, WIDTH), p.visible, cu, TOKENS, randn(TOKENS, WIDTH), None)
    with pytest.raises(RuntimeError, match="maefast"):
        raw("gather_tokens_backward", randn(BATCH * KEEP, WIDTH), p.slot, cu, 0, True, False)


def test_bad_sizes():
    p = plan()
    cu, x, token = p.cu_visible, randn(BATCH * KEEP, WIDTH), randn(WIDTH)
    images, args = randn(BATCH, 3, 1, 2, 16), ([1, 2, 2], True, False, 0, 0, 1.0)
    pred = randn(p.total_masked, 12)
    each, stats = raw("patch_loss", pred, images, p.masked, *args)
    for op, *bad in (
        ("gather_tokens", randn(BATCH, TOKENS - 1, WIDTH), ints(*range(12, 20)), ints(0, 0, 8, 8), 8, 0, True),
        ("gather_tokens", randn(BATCH, TOKENS, WIDTH).transpose(0, 1), p.visible, cu, KEEP, 0, True),
        ("gather_tokens", randn(BATCH, TOKENS, WIDTH), p.visible.long(), cu, KEEP, 0, True),
        ("place_tokens", x[1:], p.visible, cu, TOKENS, randn(TOKENS, WIDTH), None),
        ("place_tokens", x, p.visible, cu, TOKENS, randn(TOKENS - 1, WIDTH), None),
        ("place_tokens", x, p.visible, cu, TOKENS, randn(TOKENS, WIDTH, dtype=torch.float16), None),
        ("restore_tokens", x[1:], p.visible, p.masked, cu, token, None, 0, False, False),
        ("restore_tokens", x, p.visible, p.masked, cu, token[1:], None, 0, False, False),
        ("restore_tokens", x, p.visible, p.masked, cu, token, randn(TOKENS + 1, WIDTH), 0, False, False),
        ("restore_tokens", x, p.visible, p.masked, cu, token, None, 0, False, False, p.cu_masked, TOKENS),
        ("restore_tokens", x, p.visible, p.masked, cu, token, None, 0, True, False, p.cu_masked[1:], TOKENS),
        ("restore_tokens", x, p.visible, p.masked[1:], cu, token, None, 0, True, False, p.cu_masked, TOKENS),
        ("patch_rows", images, p.visible, [1, 2, 3], torch.float32),
        ("patch_rows", images, p.visible, [1, 0, 2], torch.float32),
        ("patch_rows_backward", x, p.slot, list(images.shape), [1, 2, 2], torch.float32),
        ("patch_loss", pred[1:], images, p.masked, *args),
        ("patch_loss", pred, images[1:], p.masked, [1, 2, 1], *args[1:]),
        ("patch_loss_backward", each[1:], pred, images, p.masked, p.slot, stats, *args, True),
        ("patch_loss_backward", each, pred, images, p.masked, p.slot[1:], stats, *args, True),
        ("patch_loss_backward", each, pred, images, p.masked, p.slot, stats[1:], *args, True),
    ):
        with pytest.raises(RuntimeError, match="maefast: "):
            raw(op, *bad)
