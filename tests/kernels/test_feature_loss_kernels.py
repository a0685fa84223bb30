"""feature_loss: the Triton kernels against float64 plain PyTorch, forward and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from maefast.kernels import feature_loss as kernels
from maefast.ops.feature_loss import feature_loss_reference
from tests.kernels.support import DTYPES, assert_close, bound, property_test, random_tensor

FORMS = [(norm, kind) for norm in range(3) for kind in range(3)] + [(0, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.sampled_from(FORMS), st.integers(1, 9), st.integers(2, 70), st.booleans(), st.integers(0, 2**16))
@property_test(30)
def test_feature_loss(device, dtype, form, rows, width, indexed, seed):
    norm, kind = form
    pred = random_tensor(rows, width, seed=seed, dtype=dtype)
    target = random_tensor(5 if indexed else rows, width, seed=seed + 1, dtype=dtype)
    index = torch.arange(rows, dtype=torch.int32) * 3 % 5 if indexed else None
    high = pred.double().requires_grad_()
    want = feature_loss_reference(high, target.double(), index, norm, kind, 0.5, 1e-6)
    at = None if index is None else index.to(device)
    low = pred.to(device), target.to(device), at
    each, stats = kernels.feature_loss(*low, norm, kind, 0.5, 1e-6)
    assert_close(each, want, "loss")
    grad = random_tensor(rows, seed=seed + 2)
    (wanted,) = torch.autograd.grad(want, high, grad.double())
    got = kernels.feature_loss_backward(grad.to(device), *low, stats, norm, kind, 0.5)
    if norm == 2:
        # The gradient is what a projection leaves: roundings are relative to what was there before it, which at a
        # width of two or three can be far more.
        unit = F.normalize(pred.double()).requires_grad_()
        other = F.normalize(target.double())
        each = feature_loss_reference(unit, other, index, 0, kind, 0.5, 1e-6)
        (before,) = torch.autograd.grad(each, unit, grad.double())
        before = before / pred.double().norm(dim=1, keepdim=True)
        assert float((got.cpu().double() - wanted).norm() / before.norm()) <= bound(got)
    else:
        assert_close(got, wanted, "grad pred")


def test_nearly_equal_and_zero_rows(device):
    pred = random_tensor(4, 33, seed=0)
    target = pred + 1e-3 * random_tensor(4, 33, seed=1)
    pred[1] = target[2] = pred[3] = target[3] = 0
    high = pred.double().requires_grad_()
    want = feature_loss_reference(high, target.double(), None, 0, 3, 1.0, 1e-12)
    each, stats = kernels.feature_loss(pred.to(device), target.to(device), None, 0, 3, 1.0, 1e-12)
    torch.testing.assert_close(each.cpu().double(), want.detach(), rtol=1e-3, atol=0)
    (wanted,) = torch.autograd.grad(want.sum(), high)
    got = kernels.feature_loss_backward(
        torch.ones(4, device=device), pred.to(device), target.to(device), None, stats, 0, 3, 1.0
    )
    # A rounding of a normalised value, 6e-8, against the distance.
    assert float((got[0].cpu() - wanted[0]).norm() / wanted[0].norm()) < 1e-4
    assert_close(got, wanted, "grad pred")


def test_refuses_float64(device):
    x = torch.zeros(1, 4, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="float64"):
        kernels.feature_loss(x, x, None, 0, 0, 1.0, 1e-6)
    low = x.float()
    with pytest.raises(TypeError, match="float64"):
        kernels.feature_loss_backward(x[0, :1], low, low, None, low, 0, 0, 1.0)


def test_refuses_rows_too_wide(device):
    x = torch.zeros(1, kernels.MAX_WIDTH + 1, device=device)
    with pytest.raises(ValueError, match="at most 16384 values"):
        kernels.feature_loss(x, x, None, 0, 0, 1.0, 1e-6)


def test_no_rows(device):
    x = torch.zeros(0, 4, device=device)
    each, stats = kernels.feature_loss(x, x, None, 0, 0, 1.0, 1e-6)
    assert each.shape == (0,)
    assert stats.shape == (0, 4)
    assert kernels.feature_loss_backward(each, x, x, None, stats, 0, 0, 1.0).shape == (0, 4)
