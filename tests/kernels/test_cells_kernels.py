"""pack_cells, unpack_cells, fill_sum: the Triton kernels against plain PyTorch, in both layouts of the map."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast.kernels import cells
from maefast.ops.cells import CellMask, pack_cells_reference, unpack_cells_reference
from tests.kernels.support import assert_close, property_test, random_plan, random_tensor


def random_cells(batch, rows, columns, keep, seed=0) -> CellMask:
    return CellMask(random_plan(batch, rows * columns, keep, seed), (rows, columns))


def memory(x, channels_last: bool):
    return (x.permute(0, 2, 3, 1) if channels_last else x).contiguous()


def check(plan, size, channels, seed, device, dtype):
    (rows, columns), (h, w) = plan.grid, size
    there = plan.to(device)
    full = random_tensor(plan.batch, channels, rows * h, columns * w, seed=seed, dtype=dtype)
    packed = pack_cells_reference(full, plan).contiguous()
    fill = random_tensor(channels, seed=seed + 1, dtype=dtype)
    grid3 = [plan.batch, rows, columns]
    for channels_last in (True, False):
        got = cells.pack_cells(memory(full, channels_last).to(device), there.cells, [rows, columns], channels_last)
        assert torch.equal(got.cpu(), packed)
        for value in (None, fill):
            there_value = None if value is None else value.to(device)
            got = cells.unpack_cells(packed.to(device), there.slot, grid3, there_value, channels_last)
            assert torch.equal(got.cpu(), memory(unpack_cells_reference(packed, plan, value), channels_last))
    full = full.abs()  # or the sum of a lone channel may be next to nothing
    got = cells.fill_sum(memory(full, True).to(device), there.slot, grid3)
    assert got.dtype is torch.float32
    masked = ~plan.upsampled_mask((rows * h, columns * w))
    assert_close(got, (full.double() * masked).sum((0, 2, 3)), "fill_sum")


@st.composite
def cases(draw):
    batch, rows, columns = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    keep = draw(st.lists(st.integers(0, rows * columns), min_size=batch, max_size=batch))
    plan = random_cells(batch, rows, columns, keep, draw(st.integers(0, 2**16)))
    h = draw(st.sampled_from([8, 4, 2, 1, 3]))
    size = h, draw(st.sampled_from([h, h, 1, 5]))
    return plan, size, draw(st.sampled_from([1, 3, 16, 37, 64])), draw(st.integers(0, 2**16))


@given(cases())
@property_test(20)
def test_cells(device, dtype, case):
    check(*case, device, dtype)


def test_tiles(device, dtype):
    check(random_cells(2, 3, 2, [4, 0]), (4, 8), 192, 0, device, dtype)
    check(random_cells(3, 7, 7, [20, 1, 49]), (2, 2), 80, 0, device, dtype)
    check(random_cells(1, 1, 1, [1]), (70, 3), 3, 0, device, dtype)
    check(random_cells(2, 2, 2, 0), (2, 2), 16, 0, device, dtype)


def test_numbers_beyond_32_bits(device, dtype, monkeypatch):
    # The 64-bit variant, at a small size: what it guards against needs more memory than a test should take.
    monkeypatch.setattr(cells, "INT32", 0)
    check(random_cells(2, 3, 2, [4, 1]), (4, 3), 20, 0, device, dtype)


def test_refuses_float64(device):
    plan = random_cells(1, 2, 2, 2).to(device)
    with pytest.raises(TypeError, match="float64"):
        cells.pack_cells(torch.zeros(1, 2, 2, 3, dtype=torch.float64, device=device), plan.cells, [2, 2], True)
