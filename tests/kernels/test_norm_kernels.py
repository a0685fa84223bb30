"""add_norm: the Triton kernels against float64 plain PyTorch, forward and backward."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast.kernels import norm
from maefast.ops.norm import add_norm_reference
from tests.kernels.support import assert_close, property_test, random_tensor


def check(rows, width, has_delta, has_passed, need_weight, seed, device, x_dtype, delta_dtype, y_dtype):
    x = random_tensor(rows, width, seed=seed, dtype=x_dtype) + 0.5
    delta = random_tensor(rows, width, seed=seed + 1, dtype=delta_dtype) if has_delta else None
    weight, bias = random_tensor(width, seed=seed + 2), random_tensor(width, seed=seed + 3)
    residual, y, mean, rstd = norm.add_norm(
        x.to(device),
        None if delta is None else delta.to(device),
        weight.to(device),
        bias.to(device),
        1e-6,
        y_dtype,
    )
    assert y.dtype is y_dtype
    if has_delta:
        assert torch.equal(residual.cpu(), x + delta)
    else:
        assert tuple(residual.shape) == (0,)
    # The norm is that of the stream as stored, so the float64 side starts from there.
    stream = (x if delta is None else x + delta).double().requires_grad_()
    high = [t.double().requires_grad_() for t in (weight, bias)]
    want = add_norm_reference(stream, None, *high, 1e-6, torch.float64)[1]
    assert_close(y, want, "y")
    assert_close(mean, stream.mean(1), "mean")

    grad_y = random_tensor(rows, width, seed=seed + 4, dtype=y_dtype)
    passed = random_tensor(rows, width, seed=seed + 5, dtype=x_dtype) if has_passed else None
    grads = torch.autograd.grad(want, [stream, *high], grad_y.double())
    want_x = grads[0] if passed is None else grads[0] + passed.double()
    got_x, tables = norm.add_norm_backward(
        grad_y.to(device),
        None if passed is None else passed.to(device),
        (x if delta is None else x + delta).to(device),
        mean,
        rstd,
        weight.to(device),
        need_weight,
    )
    assert got_x.dtype is x_dtype
    assert_close(got_x, want_x, "grad x")
    if need_weight:
        assert_close(tables[0], grads[1], "grad weight")
        assert_close(tables[1], grads[2], "grad bias")
    else:
        assert tuple(tables.shape) == (0, width)


@given(st.integers(1, 40), st.integers(8, 300), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**16))
@property_test(30)
def test_add_norm(device, dtype, rows, width, has_delta, has_passed, need_weight, seed):
    check(rows, width, has_delta, has_passed, need_weight, seed, device, dtype, dtype, dtype)


def test_mixed_dtypes_and_many_rows(device, dtype):
    check(37, 192, True, True, True, 0, device, torch.float32, dtype, dtype)
    check(1500, 16, True, True, True, 0, device, torch.float32, dtype, dtype)  # several rows a program, many programs
    check(3, 1280, False, True, True, 0, device, dtype, dtype, dtype)


def test_no_rows(device, dtype):
    x, weight = torch.empty(0, 8, device=device, dtype=dtype), torch.ones(8, device=device)
    residual, y, mean, rstd = norm.add_norm(x, x, weight, weight, 1e-6, dtype)
    assert y.shape == residual.shape == x.shape
    assert not norm.add_norm_backward(y, None, residual, mean, rstd, weight, True)[1].any()
