"""bias_gelu: the Triton kernels against float64 plain PyTorch, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast.kernels import gelu
from maefast.ops.gelu import bias_gelu_reference
from tests.kernels.support import assert_close, property_test, random_tensor


def check(rows, width, has_bias, need_bias, tanh, seed, device, dtype, need_out=False):
    x = (2 * random_tensor(rows, width, seed=seed)).to(dtype)
    bias = random_tensor(width, seed=seed + 1) if has_bias else None
    high = [None if t is None else t.double().requires_grad_() for t in (x, bias)]
    want = bias_gelu_reference(*high, tanh)
    there = x.to(device), None if bias is None else bias.to(device)
    assert_close(gelu.bias_gelu(*there, tanh), want, "out", dtype)
    grad = random_tensor(rows, width, seed=seed + 2, dtype=dtype)
    grads = torch.autograd.grad(want, [t for t in high if t is not None], grad.double())
    got_x, got_bias, again = gelu.bias_gelu_backward(grad.to(device), *there, tanh, need_bias and has_bias, need_out)
    assert_close(got_x, grads[0], "grad x", dtype)
    if need_out:
        assert_close(again, want, "out once more", dtype)
    else:
        assert tuple(again.shape) == (0, width)
    if need_bias and has_bias:
        assert_close(got_bias, grads[1], "grad bias")
    else:
        assert tuple(got_bias.shape) == (0,)


@given(st.integers(1, 40), st.integers(1, 300), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**16))
@property_test(30)
def test_bias_gelu(device, dtype, rows, width, has_bias, need_bias, tanh, seed):
    check(rows, width, has_bias, need_bias, tanh, seed, device, dtype, seed % 2 == 0)


def test_tiles(device, dtype):
    check(9000, 8, True, True, False, 0, device, dtype)  # several tiles of rows a program
    check(5, 1111, True, True, True, 0, device, dtype)  # several blocks of columns


def test_no_rows(device, dtype):
    x = torch.empty(0, 8, device=device, dtype=dtype)
    assert gelu.bias_gelu(x, None, False).shape == x.shape
    bias = torch.ones(8, device=device)
    assert not gelu.bias_gelu_backward(x, x, bias, False, True)[1].any()


@pytest.mark.parametrize("tanh", [False, True])
def test_far_out(device, tanh):
    """Both tails, element by element; infinities and NaN as they are."""
    x = torch.cat(
        [torch.linspace(-14, 14, 8192 - 64), torch.tensor([1e4, -1e4, 1e37, -1e37, 0.0, -0.0, 1e-30, math.nan] * 8)]
    )
    x = x.view(-1, 64)
    high = x.double().requires_grad_()
    want = bias_gelu_reference(high, None, tanh)
    (slope,) = torch.autograd.grad(want.sum(), high)
    there = x.to(device)
    out = gelu.bias_gelu(there, None, tanh).double().cpu()
    grad = gelu.bias_gelu_backward(torch.ones_like(there), there, None, tanh, False)[0].double().cpu()
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(grad, slope, rtol=3e-6, atol=3e-6, equal_nan=True)
