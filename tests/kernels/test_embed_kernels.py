"""gather_tokens, patch_rows, place_tokens: Triton kernels against float64 plain PyTorch, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast.kernels import embed
from maefast.ops.embed import gather_tokens_reference, patch_rows_reference, place_tokens_reference
from tests.kernels.support import assert_close, property_test, random_plan, random_tensor


@st.composite
def token_cases(draw):
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    keep = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    width, prefix = draw(st.sampled_from([1, 7, 16, 48, 70, 128])), draw(st.sampled_from([0, 1, 3]))
    return batch, tokens, keep, width, prefix, draw(st.integers(0, 2**16))


def check_gather(batch, tokens, keep, width, prefix, seed, device, dtype):
    plan = random_plan(batch, tokens, keep, seed, absent=seed % 2 == 0)
    there = plan.to(device)
    x = random_tensor(batch, prefix + tokens, width, seed=seed, dtype=dtype)
    for masked in (False, True):
        index, cu = (plan.masked, plan.cu_masked) if masked else (plan.visible, plan.cu_visible)
        most = plan.max_masked if masked else plan.max_visible
        for keep_prefix in (True, False):
            high = x.double().requires_grad_()
            want = gather_tokens_reference(high, index, cu, prefix, keep_prefix)
            index_there, cu_there = index.to(device), cu.to(device)
            got = embed.gather_tokens(x.to(device), index_there, cu_there, most, prefix, keep_prefix)
            assert got.dtype is dtype
            assert torch.equal(got.cpu().double(), want.detach()), "the gather is not an exact copy"
            grad = random_tensor(*want.shape, seed=seed + 1, dtype=dtype)
            (want_x,) = torch.autograd.grad(want, high, grad.double(), allow_unused=True)
            want_x = torch.zeros_like(high) if want_x is None else want_x
            args = grad.to(device), there.slot, cu_there, prefix, keep_prefix, masked
            assert torch.equal(embed.gather_tokens_backward(*args).cpu().double(), want_x)


@given(token_cases())
@property_test(20)
def test_gather_tokens(device, dtype, case):
    check_gather(*case, device, dtype)


def test_gather_tokens_tiles(device, dtype):
    # More than one program along the rows and along the columns.
    check_gather(2, 41, [10, 33], 144, 1, 0, device, dtype)
    check_gather(3, 67, [67, 0, 20], 192, 3, 0, device, dtype)


@st.composite
def patch_cases(draw):
    sizes = [draw(st.integers(1, 3)) for _ in range(5)]  # B, C and the grid
    patch = draw(st.sampled_from([(1, 1, 1), (1, 2, 3), (1, 4, 4), (2, 3, 5), (2, 4, 8), (1, 14, 14), (1, 16, 16)]))
    return sizes, patch, draw(st.integers(0, 2**16))


def check_patch_rows(batch, channels, grid, patch, seed, device, dtype, out_dtype):
    shape = batch, channels, *(g * p for g, p in zip(grid, patch))
    tokens = grid[0] * grid[1] * grid[2]
    keep = torch.randint(0, tokens + 1, (batch,), generator=torch.Generator().manual_seed(seed)).tolist()
    plan = random_plan(batch, tokens, keep, seed, absent=seed % 2 == 0)
    images = random_tensor(*shape, seed=seed, dtype=dtype)
    high = images.double().requires_grad_()
    want = patch_rows_reference(high, plan.visible, patch)
    got = embed.patch_rows(images.to(device), plan.visible.to(device), list(patch), out_dtype)
    assert got.dtype is out_dtype
    assert torch.equal(got.cpu(), want.detach().to(dtype).to(out_dtype))
    grad = random_tensor(*want.shape, seed=seed + 1, dtype=out_dtype)
    (want_images,) = torch.autograd.grad(want, high, grad.double())
    args = grad.to(device), plan.slot.to(device), list(shape), list(patch), dtype
    got_images = embed.patch_rows_backward(*args)
    assert got_images.dtype is dtype
    assert torch.equal(got_images.cpu(), want_images.to(out_dtype).to(dtype))


@given(patch_cases())
@property_test(20)
def test_patch_rows(device, dtype, case):
    (batch, channels, *grid), patch, seed = case
    check_patch_rows(batch, channels, grid, patch, seed, device, dtype, dtype)


def test_patch_rows_casts(device, dtype):
    check_patch_rows(2, 3, (1, 3, 2), (1, 16, 16), 1, device, torch.float32, dtype)
    check_patch_rows(2, 3, (1, 3, 2), (1, 8, 8), 2, device, dtype, torch.float32)


def check_place(batch, tokens, keep, width, prefix, seed, has_pos, device, dtype, y_dtype):
    plan = random_plan(batch, tokens, keep, seed, absent=seed % 2 == 0)
    there = plan.to(device)
    y = random_tensor(plan.total_visible, width, seed=seed, dtype=y_dtype)
    pos = random_tensor(tokens, width, seed=seed + 1, dtype=dtype) if has_pos else None
    lead = random_tensor(prefix, width, seed=seed + 2, dtype=dtype) if prefix else None
    high = [None if x is None else x.double().requires_grad_() for x in (y, pos, lead)]
    want = place_tokens_reference(high[0], plan.visible, plan.cu_visible, tokens, high[1], high[2])
    extra = [None if x is None else x.to(device) for x in (pos, lead)]
    got = embed.place_tokens(y.to(device), there.visible, there.cu_visible, tokens, *extra)
    assert got.dtype is dtype
    assert_close(got, want, "place_tokens")
    grad = random_tensor(*want.shape, seed=seed + 3, dtype=dtype)
    wanted = [x for x in high if x is not None]
    grads = torch.autograd.grad(want, wanted, grad.double(), allow_unused=True)
    grads = {id(x): torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads)}
    low = torch.float16 if torch.float16 in (dtype, y_dtype) else None
    for need_pos in {has_pos, False}:
        for need_prefix in {prefix > 0, False}:
            args = grad.to(device), there.slot, there.cu_visible, prefix, need_pos, need_prefix, y_dtype
            got_y, got_pos, got_prefix = embed.place_tokens_backward(*args)
            assert got_y.dtype is y_dtype
            assert_close(got_y, grads[id(high[0])], "grad y", low)
            for need, out, x in ((need_pos, got_pos, high[1]), (need_prefix, got_prefix, high[2])):
                if need:
                    assert out.dtype is dtype
                    assert_close(out, grads[id(x)], "grad pos or prefix")
                else:
                    assert tuple(out.shape) == (0,)


@given(token_cases(), st.booleans())
@property_test(20)
def test_place_tokens(device, dtype, case, has_pos):
    batch, tokens, keep, width, prefix, seed = case
    check_place(batch, tokens, keep, width, prefix, seed, has_pos or prefix == 0, device, dtype, dtype)


def test_place_tokens_mixed_and_tiles(device, dtype):
    check_place(2, 41, [10, 33], 144, 1, 0, True, device, torch.float32, dtype)
    # 19 samples: more than one split of the batch, the last one short.
    check_place(19, 5, [i % 6 for i in range(19)], 32, 2, 0, True, device, dtype, dtype)
    check_place(3, 67, [67, 0, 20], 192, 0, 0, True, device, dtype, dtype)


def test_numbers_beyond_32_bits(device, dtype, monkeypatch):
    # The 64-bit variants, at small sizes: what they guard against needs more memory than a test should take.
    monkeypatch.setattr(embed, "INT32", 0)
    check_gather(3, 67, [67, 0, 20], 48, 3, 0, device, dtype)
    check_patch_rows(2, 3, (2, 3, 2), (2, 4, 6), 1, device, dtype, dtype)


def test_refuses_float64(device):
    x = torch.zeros(1, 4, 8, dtype=torch.float64, device=device)
    index, cu = (torch.tensor(v, dtype=torch.int32, device=device) for v in ([0, 1], [0, 2]))
    with pytest.raises(TypeError, match="float64"):
        embed.gather_tokens(x, index, cu, 2, 0, True)
    with pytest.raises(TypeError, match="float64"):
        embed.patch_rows(torch.zeros(1, 1, 1, 4, 4, device=device), index, [1, 2, 2], torch.float64)
