"""depthwise_cells: the Triton kernels against float64 plain PyTorch, forward, gradient of x and of the taps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast.kernels import depthwise
from maefast.ops import CellMask
from maefast.ops.depthwise import depthwise_cells_reference
from tests.kernels.support import assert_close, property_test, random_tensor


def check(plan, cell, channels, size, has_bias, seed, device, dtype):
    x = random_tensor(plan.total, *cell, channels, seed=seed, dtype=dtype)
    grad = random_tensor(*x.shape, seed=seed + 1, dtype=dtype)
    weight = random_tensor(channels, 1, size, size, seed=seed + 2)
    bias = random_tensor(channels, seed=seed + 3) if has_bias else None
    high = [t.double().requires_grad_() for t in (x, weight, torch.zeros(channels) if bias is None else bias)]
    want = depthwise_cells_reference(high[0], plan, *high[1:])
    wanted = torch.autograd.grad(want, high, grad.double())

    table = plan.neighbours(-(-(size // 2) // min(cell))).to(device)
    taps = weight.flatten(1).t().contiguous().to(device)
    low, low_grad = x.to(device), grad.to(device)
    y = depthwise.depthwise(low, table, taps, None if bias is None else bias.to(device), False)
    assert y.dtype is dtype
    assert_close(y, want, "y")
    assert_close(depthwise.depthwise(low_grad, table, taps, None, True), wanted[0], "grad x")
    grad_taps, grad_bias = depthwise.depthwise_grad_weight(low, low_grad, table, size)
    assert grad_taps.dtype is grad_bias.dtype is torch.float32
    assert_close(grad_taps.t().reshape(weight.shape), wanted[1], "grad weight", dtype)
    assert_close(grad_bias, wanted[2], "grad bias", dtype)


def random_cells(batch: int, grid: tuple[int, int], share: float, seed: int) -> CellMask:
    return CellMask.from_bool(torch.rand(batch, *grid, generator=torch.Generator().manual_seed(seed)) < share)


@pytest.mark.parametrize("cell", [(8, 8), (4, 4), (2, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("size", [3, 5, 7])
def test_every_level(device, dtype, size, cell):
    check(random_cells(1, (2, 3), 0.7, 0), cell, 20, size, True, 0, device, dtype)


@given(
    st.integers(1, 2),
    st.tuples(st.integers(1, 2), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 5)),
    st.sampled_from([1, 5, 16, 70]),
    st.sampled_from([3, 5, 7]),
    st.sampled_from([0.0, 0.3, 0.7, 1.1]),
    st.booleans(),
    st.integers(0, 2**16),
)
@property_test(10)
def test_odd_shapes(device, dtype, batch, grid, cell, channels, size, share, has_bias, seed):
    check(random_cells(batch, grid, share, seed), cell, channels, size, has_bias, seed, device, dtype)


def test_runs_agree_bit_for_bit(device, dtype):
    plan = random_cells(3, (3, 3), 0.5, 0)
    x, grad = (random_tensor(plan.total, 4, 4, 20, seed=s, dtype=dtype).to(device) for s in (0, 1))
    table = plan.neighbours(1).to(device)
    runs = [depthwise.depthwise_grad_weight(x, grad, table, 5) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
