"""patch_loss: the Triton kernels against float64 plain PyTorch, for predictions and for images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast.kernels import loss
from maefast.kernels.loss import MAX_PATCH, patch_loss, patch_loss_backward
from maefast.ops.loss import patch_loss_reference
from tests.kernels.support import assert_close, property_test, random_plan, random_tensor


def check(
    batch, channels, grid, patch, keep, seed, packed, channels_first, norm, kind, device, dtype, image_dtype=None
):
    image_dtype = image_dtype or dtype
    tokens = grid[0] * grid[1] * grid[2]
    plan = random_plan(batch, tokens, keep, seed, absent=seed % 2 == 0)
    there = plan.to(device)
    values = channels * patch[0] * patch[1] * patch[2]
    # Pixels with an offset, as in pictures, so that mean and variance must be taken in two passes.
    images = random_tensor(batch, channels, *(g * p for g, p in zip(grid, patch)), seed=seed) + 3
    images = images.to(image_dtype)
    pred = random_tensor(plan.total_masked if packed else batch * tokens, values, seed=seed + 1, dtype=dtype)
    args = list(patch), packed, channels_first, norm, kind, 0.7
    high = pred.double().requires_grad_(), images.double().requires_grad_()
    want = patch_loss_reference(*high, plan.masked, *args)
    low = pred.to(device), images.to(device), there.masked
    got, stats = patch_loss(*low, *args)
    assert got.dtype is torch.float32
    assert tuple(stats.shape) == (plan.total_masked, channels if norm == 2 else 1, 2)
    assert stats.dtype is torch.float32
    assert not bool(stats.isnan().any())
    assert_close(got, want, "loss")

    slope = random_tensor(plan.total_masked, seed=seed + 2)
    slope += slope.sign()  # away from 0, or a gradient of a few values lies where float16 has fewer digits
    grads = torch.autograd.grad(want, high, slope.double(), allow_unused=True)
    grads = [torch.zeros_like(v) if g is None else g for v, g in zip(high, grads)]
    for need_images in (False, True):
        back = patch_loss_backward(slope.to(device), *low, there.slot, stats, *args, need_images)
        assert back[0].dtype is dtype
        assert_close(back[0], grads[0], "grad pred")
        if need_images:
            assert back[1].dtype is image_dtype
            assert_close(back[1], grads[1], "grad images")
        else:
            assert tuple(back[1].shape) == (0,)


@st.composite
def cases(draw):
    batch, channels = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5]))
    grid = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    patch = draw(st.sampled_from([(1, 1, 3), (1, 2, 3), (1, 4, 4), (2, 3, 5), (2, 4, 8), (1, 14, 14)]))
    tokens = grid[0] * grid[1] * grid[2]
    keep = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    flags = draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 3)), draw(st.integers(0, 1))
    return batch, channels, grid, patch, keep, draw(st.integers(0, 2**16)), *flags


@given(cases())
@property_test(40)
def test_patch_loss(device, dtype, case):
    check(*case, device, dtype)


@pytest.mark.parametrize("norm", [0, 1, 2, 3])
@pytest.mark.parametrize("patch", [(1, 16, 16), (1, 14, 14), (2, 16, 16), (1, 8, 8)], ids=str)
def test_published_patches(device, dtype, patch, norm):
    check(2, 3, (1, 2, 2), patch, [1, 2], 5, norm != 1, norm == 3, norm, norm % 2, device, dtype)


def test_large_patch(device, dtype):
    check(1, 3, (1, 1, 2), (2, 40, 40), 1, 0, True, False, 1, 0, device, dtype)  # 9600 values
    check(1, 200, (1, 1, 2), (1, 6, 6), 1, 1, False, False, 2, 1, device, dtype)  # 7200 values, many channels


def test_half_precision_predictions_of_float32_images(device, dtype):
    check(2, 3, (1, 2, 2), (1, 16, 16), [1, 2], 6, True, False, 1, 0, device, dtype, torch.float32)
    check(2, 3, (1, 2, 2), (1, 16, 16), [1, 2], 7, True, False, 2, 1, device, torch.float32, dtype)


def test_all_and_none_masked(device, dtype):
    for packed in (True, False):
        check(2, 3, (1, 2, 2), (1, 4, 4), 0, 8, packed, False, 1, 0, device, dtype)
        check(2, 3, (1, 2, 2), (1, 4, 4), 4, 9, packed, False, 1, 0, device, dtype)


@pytest.mark.parametrize("norm", [1, 2, 3])
def test_constant_patches_stay_finite(device, norm):
    images = torch.full((1, 3, 1, 8, 8), 0.25, device=device)
    plan = random_plan(1, 4, 1, 0).to(device)
    pred = random_tensor(3, 48).to(device)
    args = [1, 4, 4], True, False, norm, 0, 1.0
    each, stats = patch_loss(pred, images, plan.masked, *args)
    torch.testing.assert_close(each, (pred**2).mean(1), rtol=1e-5, atol=0)
    grads = patch_loss_backward(torch.ones_like(each), pred, images, plan.masked, plan.slot, stats, *args, True)
    assert all(bool(g.isfinite().all()) for g in grads)


def test_numbers_beyond_32_bits(device, dtype, monkeypatch):
    # The 64-bit variant, at a small size: what it guards against needs more memory than a test should take.
    monkeypatch.setattr(loss, "INT32", 0)
    check(2, 3, (1, 2, 2), (2, 4, 6), [1, 2], 6, True, False, 1, 0, device, dtype)


def test_refuses_what_it_cannot_hold(device):
    index = torch.zeros(1, dtype=torch.int32, device=device)
    args = [1, 1, MAX_PATCH + 1], True, False, 0, 0, 1.0
    with pytest.raises(ValueError, match=str(MAX_PATCH)):
        patch_loss(torch.zeros(1, 4, device=device), torch.zeros(1, 1, 1, 1, 4, device=device), index, *args)
    args = [1, 2, 2], True, False, 0, 0, 1.0
    images = torch.zeros(1, 1, 1, 2, 2, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="float64"):
        patch_loss(torch.zeros(1, 4, device=device), images, index, *args)
