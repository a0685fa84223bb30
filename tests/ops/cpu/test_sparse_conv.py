"""The C++ kernels of sparse_conv: exact copies, sums in float32, the same bits for any number of threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maefast.ops import CellMask
from maefast.ops._conv_table import Window
from maefast.ops.cells import pack_cells_reference, unpack_cells_reference
from tests.ops.common import assert_close
from tests.ops.cpu.common import needs_cpu_ops, randn, raw

pytestmark = needs_cpu_ops

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
WINDOWS = [
    Window((3, 3), (1, 1), (1, 1), (1, 1)),
    Window((7, 7), (2, 2), (3, 3), (1, 1)),
    Window((3, 5), (2, 1), (2, 2), (2, 1)),
]


def plan_of() -> CellMask:
    masked = torch.rand(3, 3, 4, generator=torch.Generator().manual_seed(5)) > 0.6
    masked[1] = True
    return CellMask.from_bool(masked)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("size", [(4, 2, 35), (2, 4, 3), (2, 1, 64)], ids=str)
def test_taps(dtype, window, size):
    plan, (h, w, channels) = plan_of(), size
    if w % window.stride[1]:
        w = 2 * w
    x = randn(plan.total, h, w, channels, dtype=dtype)
    table = plan.neighbours(window.radius((h, w)))
    high = x.double().requires_grad_()
    want = F.unfold(unpack_cells_reference(high, plan), window.kernel, window.dilation, window.padding, window.stride)
    want = want.view(plan.batch, -1, 3 * h // window.stride[0], 4 * w // window.stride[1])
    want = pack_cells_reference(want, plan).unflatten(3, (channels, -1)).transpose(3, 4)
    taps = raw("gather_taps", x, table, *window)
    assert torch.equal(taps.double(), want.reshape(taps.shape))
    grad = randn(*taps.shape, dtype=dtype, seed=1)
    (ref,) = torch.autograd.grad(want, high, grad.double().view(want.shape))
    assert_close(raw("gather_taps_backward", grad, table, (h, w, channels), *window), ref, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("halo", [(1, 1, 1, 1), (3, 0, 2, 5)], ids=str)
def test_halo(dtype, halo):
    plan, (top, left, bottom, right) = plan_of(), halo
    x = randn(plan.total, 2, 4, 35, dtype=dtype)
    table = plan.neighbours(2)
    high = x.double().requires_grad_()
    full = F.pad(unpack_cells_reference(high, plan), (left, right, top, bottom))
    cells = [(*divmod(int(c) % 12, 4), int(c) // 12) for c in plan.cells]
    want = [
        full[b, :, 2 * i : 2 * i + top + 2 + bottom, 4 * j : 4 * j + left + 4 + right].permute(1, 2, 0)
        for i, j, b in cells
    ]
    want = torch.stack(want)
    assert torch.equal(raw("halo_cells", x, table, halo).double(), want)
    grad = randn(*want.shape, dtype=dtype, seed=1)
    (ref,) = torch.autograd.grad(want, high, grad.double())
    assert_close(raw("halo_cells_backward", grad, table, halo), ref, dtype)


def test_threads_change_nothing():
    plan, window = CellMask.all_visible(4, (5, 5)), WINDOWS[0]
    table, x = plan.neighbours(1), randn(100, 4, 4, 40)
    frame, taps = randn(100, 6, 6, 40), randn(1600, 360)
    runs, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            runs.append(
                [
                    raw("halo_cells", x, table, (1, 1, 1, 1)),
                    raw("halo_cells_backward", frame, table, (1, 1, 1, 1)),
                    raw("gather_taps", x, table, *window),
                    raw("gather_taps_backward", taps, table, (4, 4, 40), *window),
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))
