"""Pools of packed cells: the Triton kernels against the dense pool in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast.kernels import pool
from maefast.ops.pool import _radius, avg_pool_cells_reference, max_pool_cells_reference
from tests.kernels.support import assert_close, property_test, random_tensor
from tests.kernels.test_cells_kernels import random_cells

WINDOWS = [(3, 2, 1), (2, 2, 0), (1, 1, 0), (3, 1, 1), (5, 1, 2), (1, 2, 0), (3, 4, 0)]


def check(plan, x, window, device):
    window = tuple(tuple(v) for v in window)
    table = plan.neighbours(_radius(x, *window)).to(device)
    high = x.double().requires_grad_()
    want = max_pool_cells_reference(high, plan, *window)
    got, argmax = pool.max_pool_cells(x.to(device), table, *window)
    assert torch.equal(got.cpu().double(), want)
    grad = random_tensor(*want.shape, seed=1, dtype=x.dtype)
    (wanted,) = torch.autograd.grad(want, high, grad.double())
    assert_close(pool.max_pool_cells_backward(grad.to(device), argmax, table, *window), wanted, "grad of max")
    for include_pad in (True, False):
        want = avg_pool_cells_reference(high, plan, *window, include_pad)
        assert_close(pool.avg_pool_cells(x.to(device), table, *window, include_pad), want, "avg")
        (wanted,) = torch.autograd.grad(want, high, grad.double())
        got = pool.avg_pool_cells_backward(grad.to(device), table, *window, include_pad)
        assert_close(got, wanted, "grad of avg")


@st.composite
def cases(draw):
    batch, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    keep = draw(st.lists(st.integers(0, rows * columns), min_size=batch, max_size=batch))
    plan = random_cells(batch, rows, columns, keep, draw(st.integers(0, 2**16)))
    sizes = [draw(st.sampled_from([8, 4, 2, 1, 3]))]
    sizes.append(draw(st.sampled_from([sizes[0], sizes[0], 1])))
    axes = [draw(st.sampled_from([w for w in WINDOWS if size % w[1] == 0])) for size in sizes]
    x = random_tensor(plan.total, *sizes, draw(st.sampled_from([1, 3, 16, 37])), seed=draw(st.integers(0, 2**16)))
    return plan, draw(st.sampled_from([x, x.relu(), -x.abs()])), tuple(zip(*axes))


@given(cases())
@property_test(20)
def test_pools(device, dtype, case):
    plan, x, window = case
    check(plan, x.to(dtype), window, device)


def test_tiles(device, dtype):
    stem = ((3, 3), (2, 2), (1, 1))
    plan = random_cells(2, 3, 4, [5, 0])
    check(plan, random_tensor(5, 8, 8, 64, dtype=dtype), stem, device)
    check(plan, random_tensor(5, 4, 4, 80, dtype=dtype), stem, device)
    check(plan, random_tensor(5, 2, 2, 130, dtype=dtype), stem, device)


def test_nan_and_infinity(device, dtype):
    plan = random_cells(1, 2, 2, 4)
    window = ((3, 3), (2, 2), (1, 1))
    x = random_tensor(4, 4, 4, 5, dtype=dtype)
    x[0, 1, 1, 0], x[1, 2, 2, 1], x[3, :, :, 2] = float("nan"), float("inf"), float("-inf")
    want = max_pool_cells_reference(x.double(), plan, *window)
    got = pool.max_pool_cells(x.to(device), plan.neighbours(1).to(device), *window)[0].cpu().double()
    assert bool(want.isnan().any())
    assert torch.equal(got.nan_to_num(nan=7e9), want.nan_to_num(nan=7e9))


def test_refuses_float64(device):
    plan = random_cells(1, 2, 2, 2).to(device)
    x, table = torch.zeros(2, 2, 2, 3, dtype=torch.float64, device=device), plan.neighbours(0)
    with pytest.raises(TypeError, match="float64"):
        pool.max_pool_cells(x, table, (2, 2), (2, 2), (0, 0))
