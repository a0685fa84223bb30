"""restore_tokens: the Triton kernels against float64 plain PyTorch, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast.kernels import restore
from maefast.ops.restore import restore_tokens_reference
from tests.kernels.support import assert_close, property_test, random_plan, random_tensor


def check(batch, tokens, keep, width, prefix, seed, pos_kind, visible_first, device, dtype, x_dtype, absent=False):
    plan = random_plan(batch, tokens, keep, seed, absent=absent)
    visible_first = visible_first or absent
    there = plan.to(device)
    on_masked = pos_kind == "masked"
    rows = {"none": 0, "tokens": tokens, "masked": tokens, "all": prefix + tokens}[pos_kind]
    x = random_tensor(plan.total_visible + batch * prefix, width, seed=seed, dtype=x_dtype)
    mask_token = random_tensor(width, seed=seed + 1, dtype=dtype)
    pos = random_tensor(rows, width, seed=seed + 2, dtype=dtype) if rows else None
    high = [None if value is None else value.double().requires_grad_() for value in (x, mask_token, pos)]
    lists = plan.visible, plan.masked
    some, some_there = ((p.cu_masked, tokens) if absent else (None, 0) for p in (plan, there))
    want = restore_tokens_reference(
        high[0], *lists, plan.cu_visible, high[1], high[2], prefix, visible_first, on_masked, *some
    )
    got = restore.restore_tokens(
        x.to(device),
        there.visible,
        there.masked,
        there.cu_visible,
        mask_token.to(device),
        None if pos is None else pos.to(device),
        prefix,
        visible_first,
        on_masked,
        *some_there,
    )
    assert got.dtype is dtype
    assert_close(got, want, "restore_tokens")

    grad = random_tensor(*want.shape, seed=seed + 3, dtype=dtype)
    wanted = [value for value in high if value is not None]
    grads = torch.autograd.grad(want, wanted, grad.double(), allow_unused=True)
    grads = [torch.zeros_like(v) if g is None else g for v, g in zip(wanted, grads)]
    low = torch.float16 if torch.float16 in (dtype, x_dtype) else None
    for need_mask_token in (True, False):
        for pos_rows in {rows, 0}:
            got_x, got_mask, got_pos = restore.restore_tokens_backward(
                grad.to(device),
                there.visible,
                there.masked,
                there.slot,
                there.cu_visible,
                pos_rows,
                prefix,
                visible_first,
                on_masked,
                need_mask_token,
                x_dtype,
                some_there[0],
            )
            assert got_x.dtype is x_dtype
            assert_close(got_x, grads[0], "grad x", low)
            if need_mask_token:
                assert_close(got_mask, grads[1], "grad mask token")
            else:
                assert tuple(got_mask.shape) == (0,)
            if pos_rows:
                assert got_pos.dtype is dtype
                assert_close(got_pos, grads[2], "grad pos")
            else:
                assert tuple(got_pos.shape) == (0,)


@st.composite
def cases(draw):
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    keep = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    width, prefix = draw(st.sampled_from([1, 7, 16, 48, 70, 128])), draw(st.sampled_from([0, 1, 3]))
    pos_kind = draw(st.sampled_from(["none", "tokens", "masked", "all"]))
    return batch, tokens, keep, width, prefix, draw(st.integers(0, 2**16)), pos_kind, draw(st.booleans())


@pytest.mark.parametrize("absent", [False, True], ids=["all", "absent"])
@given(cases())
@property_test(30)
def test_restore_tokens(device, dtype, absent, case):
    check(*case, device, dtype, dtype, absent)


@pytest.mark.parametrize("visible_first", [False, True], ids=["position", "visible_first"])
def test_mixed_dtypes_and_tiles(device, dtype, visible_first):
    check(2, 41, [10, 33], 144, 1, 0, "all", visible_first, device, torch.float32, dtype)
    # 19 samples: more than one split of the batch, the last one short.
    check(19, 5, [i % 6 for i in range(19)], 32, 2, 0, "all", visible_first, device, dtype, dtype)
    check(3, 67, [67, 0, 20], 192, 0, 0, "masked", visible_first, device, dtype, dtype)
    check(19, 9, [i % 6 for i in range(19)], 32, 2, 0, "all", visible_first, device, dtype, dtype, absent=True)
    check(3, 67, [0, 0, 20], 192, 1, 0, "masked", visible_first, device, dtype, dtype, absent=True)


def test_all_and_none_visible(device, dtype):
    for visible_first in (False, True):
        check(2, 9, 9, 24, 1, 0, "all", visible_first, device, dtype, dtype)
        check(2, 9, 0, 24, 1, 0, "all", visible_first, device, dtype, dtype)
        check(2, 9, 0, 24, 0, 0, "tokens", visible_first, device, dtype, dtype)


def test_numbers_beyond_32_bits(device, dtype, monkeypatch):
    # The 64-bit variant, at a small size: what it guards against needs more memory than a test should take.
    monkeypatch.setattr(restore, "INT32", 0)
    for visible_first in (False, True):
        check(3, 67, [67, 0, 20], 48, 3, 0, "all", visible_first, device, dtype, dtype)
    check(3, 67, [67, 0, 20], 48, 3, 0, "all", True, device, dtype, dtype, absent=True)


def test_refuses_float64(device):
    ints = lambda *v: torch.tensor(v, dtype=torch.int32, device=device)  # noqa: E731
    x = torch.zeros(1, 8, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="float64"):
        restore.restore_tokens(x, ints(0), ints(1), ints(0, 1), x[0], None, 0, False, False)
