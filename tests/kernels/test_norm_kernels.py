"""add_norm: the Triton kernels against float64 plain PyTorch, forward and backward."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast.kernels import norm
from maefast.ops.norm import add_norm_reference
from tests.kernels.support import assert_close, property_test, random_tensor


def check(rows, width, has_delta, has_passed, need_weight, seed, device, x_dtype, delta_dtype, y_dtype, shifted=False):
    x = random_tensor(rows, width, seed=seed, dtype=x_dtype) + 0.5
    delta = random_tensor(rows, width, seed=seed + 1, dtype=delta_dtype) if has_delta else None
    weight, bias, shift = (random_tensor(width, seed=seed + n) for n in (2, 3, 6))
    shift = shift if shifted else None
    residual, y, mean, rstd = norm.add_norm(
        x.to(device),
        None if delta is None else delta.to(device),
        weight.to(device),
        bias.to(device),
        1e-6,
        y_dtype,
        None if shift is None else shift.to(device),
    )
    assert y.dtype is y_dtype
    if shifted:
        assert_close(residual, x.double() + delta.double() + shift.double(), "residual", x_dtype)
    elif has_delta:
        assert torch.equal(residual.cpu(), x + delta)
    else:
        assert tuple(residual.shape) == (0,)
    # The norm is that of the stream as stored, so the float64 side starts from there.
    stored = residual.cpu() if has_delta else x
    stream = stored.double().requires_grad_()
    high = [t.double().requires_grad_() for t in (weight, bias)]
    want = add_norm_reference(stream, None, *high, 1e-6, torch.float64)[1]
    assert_close(y, want, "y")
    assert_close(mean, stream.mean(1), "mean")

    grad_y = random_tensor(rows, width, seed=seed + 4, dtype=y_dtype)
    passed = random_tensor(rows, width, seed=seed + 5, dtype=x_dtype) if has_passed else None
    grads = torch.autograd.grad(want, [stream, *high], grad_y.double())
    want_x = grads[0] if passed is None else grads[0] + passed.double()
    got_x, tables, got_delta, again = norm.add_norm_backward(
        grad_y.to(device),
        None if passed is None else passed.to(device),
        stored.to(device),
        mean,
        rstd,
        weight.to(device),
        need_weight,
        bias.to(device) if has_passed else None,
        delta_dtype if has_delta else None,
        shifted,
    )
    assert got_x.dtype is x_dtype
    assert_close(got_x, want_x, "grad x")
    if has_passed:
        assert again.dtype is y_dtype
        assert_close(again, want, "y once more")
    else:
        assert tuple(again.shape) == (0, width)
    if has_delta and delta_dtype is not x_dtype:
        assert got_delta.dtype is delta_dtype
        assert_close(got_delta, want_x, "grad delta", delta_dtype)
    else:
        assert tuple(got_delta.shape) == (0, width)
    if shifted:
        assert tables.shape == (3, width)
        assert_close(tables[2], want_x.sum(0), "grad shift")
    if need_weight or shifted:
        assert_close(tables[0], grads[1], "grad weight")
        assert_close(tables[1], grads[2], "grad bias")
    else:
        assert tuple(tables.shape) == (0, width)


@given(st.integers(1, 40), st.integers(8, 300), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**16))
@property_test(30)
def test_add_norm(device, dtype, rows, width, has_delta, has_passed, need_weight, seed):
    shifted = has_delta and seed % 2 == 0
    check(rows, width, has_delta, has_passed, need_weight, seed, device, dtype, dtype, dtype, shifted)


def test_mixed_dtypes_and_many_rows(device, dtype):
    check(37, 192, True, True, True, 0, device, torch.float32, dtype, dtype)
    check(37, 192, True, True, True, 0, device, torch.float32, dtype, dtype, True)
    check(600, 40, True, False, False, 0, device, torch.float32, dtype, torch.float32, True)
    check(1500, 16, True, True, True, 0, device, torch.float32, dtype, dtype)  # several rows a program, many programs
    check(3, 1280, False, True, True, 0, device, dtype, dtype, dtype)


def test_no_rows(device, dtype):
    x, weight = torch.empty(0, 8, device=device, dtype=dtype), torch.ones(8, device=device)
    residual, y, mean, rstd = norm.add_norm(x, x, weight, weight, 1e-6, dtype)
    assert y.shape == residual.shape == x.shape
    assert not norm.add_norm_backward(y, None, residual, mean, rstd, weight, True)[1].any()
