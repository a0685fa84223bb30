"""chamfer: the Triton kernels against float64 plain PyTorch, forward and both gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast.kernels import chamfer
from maefast.ops.chamfer import chamfer_reference
from tests.kernels.support import assert_close, property_test, random_tensor


def check(groups, n, m, coordinates, seed, coarse, device):
    sets = [random_tensor(groups, count, coordinates, seed=seed + i) for i, count in enumerate((n, m))]
    # Of few digits, so that float32 ranks distances as float64 does.
    sets = [(points * (1 if coarse else 64)).round() / (1 if coarse else 64) for points in sets]
    high = [points.double().requires_grad_() for points in sets]
    low = [points.to(device) for points in sets]
    want = chamfer_reference(*high)
    *got, at_b, at_a = chamfer.chamfer(*low)
    for a, b, what in zip(got, want, ("to b", "to a")):
        assert_close(a, b, what)
    assert at_b.dtype is at_a.dtype is torch.int32
    slopes = [random_tensor(groups, count, seed=seed + 2 + i) for i, count in enumerate((n, m))]
    grads = torch.autograd.grad(want, high, [slope.double() for slope in slopes])
    back = chamfer.chamfer_backward(*(slope.to(device) for slope in slopes), *low, at_b, at_a)
    for a, b, what in zip(back, grads, ("grad a", "grad b")):
        assert_close(a, b, what)


@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**16), st.booleans()
)
@property_test(30)
def test_chamfer(device, groups, n, m, coordinates, seed, coarse):
    check(groups, n, m, coordinates, seed, coarse, device)


def test_the_largest_group(device):
    check(2, 64, 128, 3, 0, False, device)


def test_refuses_float64(device):
    a = torch.zeros(1, 4, 3, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="float64"):
        chamfer.chamfer(a, a)
