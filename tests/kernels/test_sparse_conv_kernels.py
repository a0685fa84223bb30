"""The Triton kernels of sparse_conv against PyTorch in float64: frames, rows of taps, and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maefast.kernels import sparse_conv
from maefast.ops._conv_table import Window
from maefast.ops.cells import CellMask, pack_cells_reference, unpack_cells_reference
from tests.kernels.support import assert_close, random_plan, random_tensor

# (kernel, stride, padding, dilation), rows then columns
WINDOWS = [
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((7, 7), (2, 2), (3, 3), (1, 1)),
    ((3, 3), (1, 1), (2, 2), (2, 2)),
    ((3, 5), (2, 1), (2, 2), (2, 1)),
]
SIZES = [(4, 4, 16), (2, 4, 7), (2, 1, 70), (4, 2, 3)]
CASES = [(size, Window(*w)) for size in SIZES for w in WINDOWS if size[0] % w[1][0] == size[1] % w[1][1] == 0]


def plan_of(seed: int = 0) -> CellMask:
    return CellMask(random_plan(3, 12, [5, 0, 12], seed), (3, 4))


def sites(plan: CellMask, x: torch.Tensor, window: Window) -> torch.Tensor:
    """Every tap of every output of the dense map, [T, ho, wo, kh, kw, C], by F.unfold."""
    (kh, kw), (sh, sw) = window.kernel, window.stride
    full = unpack_cells_reference(x, plan)
    taps = F.unfold(full, window.kernel, window.dilation, window.padding, window.stride)
    taps = taps.view(plan.batch, -1, full.shape[2] // sh, full.shape[3] // sw)
    return pack_cells_reference(taps, plan).unflatten(3, (-1, kh, kw)).permute(0, 1, 2, 4, 5, 3)


@pytest.mark.parametrize(("size", "window"), CASES, ids=str)
def test_taps(device, dtype, size, window):
    plan = plan_of()
    table = plan.neighbours(window.radius(size[:2])).to(device)
    x = random_tensor(plan.total, *size, dtype=dtype)
    high = x.double().requires_grad_()
    want = sites(plan, high, window)
    taps = sparse_conv.gather_taps(x.to(device), table, *window)
    assert_close(taps, want.reshape(taps.shape), "gather_taps")
    some = sparse_conv.gather_taps(x.to(device), table[2:5], *window)
    assert torch.equal(some, taps.unflatten(0, (plan.total, -1))[2:5].flatten(0, 1))
    grad = random_tensor(*taps.shape, seed=1, dtype=dtype)
    (ref,) = torch.autograd.grad(want, high, grad.double().view(want.shape))
    assert_close(sparse_conv.gather_taps_backward(grad.to(device), table, size, *window), ref, "gradient")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("halo", [(1, 1, 1, 1), (0, 2, 1, 0), (3, 3, 2, 2)], ids=str)
def test_halo(device, dtype, size, halo):
    plan, (h, w, _) = plan_of(1), size
    top, left, bottom, right = halo
    radius = max(-(-n // s) for n, s in zip(halo, (h, w) * 2))
    table = plan.neighbours(radius).to(device)
    x = random_tensor(plan.total, *size, dtype=dtype)
    high = x.double().requires_grad_()
    full = F.pad(unpack_cells_reference(high, plan), (left, right, top, bottom))
    cells = [(*divmod(int(c) % 12, 4), int(c) // 12) for c in plan.cells]
    lines, columns = top + h + bottom, left + w + right
    want = torch.stack([full[b, :, y * h : y * h + lines, z * w : z * w + columns] for y, z, b in cells])
    want = want.permute(0, 2, 3, 1)
    out = sparse_conv.halo_cells(x.to(device), table, halo)
    assert_close(out, want, "halo_cells")
    grad = random_tensor(*want.shape, seed=2, dtype=dtype)
    (ref,) = torch.autograd.grad(want, high, grad.double())
    assert_close(sparse_conv.halo_cells_backward(grad.to(device), table, halo), ref, "gradient")


def test_wide_row_numbers(device, monkeypatch):
    monkeypatch.setattr(sparse_conv, "INT32", 0)
    test_taps(device, torch.float32, *CASES[1])
    test_halo(device, torch.float32, SIZES[0], (1, 1, 1, 1))


def test_nothing_active(device, dtype):
    plan = CellMask(random_plan(2, 4, 0, 0), (2, 2)).to(device)
    x, table = torch.zeros(0, 4, 4, 8, device=device, dtype=dtype), plan.neighbours(1)
    window = Window(*WINDOWS[0])
    assert sparse_conv.halo_cells(x, table, (1, 1, 1, 1)).shape == (0, 6, 6, 8)
    taps = sparse_conv.gather_taps(x, table, *window)
    assert taps.shape == (0, 72)
    assert sparse_conv.gather_taps_backward(taps, table, (4, 4, 8), *window).shape == x.shape


def test_refuses_float64(device):
    plan = plan_of()
    x = torch.zeros(plan.total, 2, 2, 4, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="float64"):
        sparse_conv.halo_cells(x, plan.neighbours(1).to(device), (1, 1, 1, 1))
