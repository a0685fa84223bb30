"""feature_loss: the Triton kernels against float64 plain PyTorch, forward and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast.kernels import feature_loss as kernels
from maefast.ops.feature_loss import feature_loss_reference
from tests.kernels.support import DTYPES, assert_close, property_test, random_tensor

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
    assert_close(got, wanted, "grad pred")
