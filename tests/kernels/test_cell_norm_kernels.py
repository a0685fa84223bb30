"""cell_norm: the Triton kernels against float64 plain PyTorch, and the public ops on them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import ops
from maefast.kernels import cell_norm
from maefast.ops import CellMask
from tests.kernels.support import INTERPRET, assert_close, bound, property_test, random_tensor


def activated(z, act):
    return z if act == 0 else z.relu() if act == 1 else z.clamp(0, 6)


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=3),
    st.integers(1, 300),
    st.integers(1, 9),
    st.integers(0, 2),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**16),
)
@property_test(15)
def test_raw_ops(device, dtype, cells, width, sites, act, has_cu, has_residual, seed):
    check(cells, width, sites, act, has_cu, has_residual, seed, device, dtype)


def test_many_rows(device, dtype, monkeypatch):
    monkeypatch.setattr(cell_norm, "PROGRAMS", 8)  # several tiles a program, several pieces
    check([900], 24, 1, 0, False, True, 0, device, dtype)
    check([20, 0, 60], 300, 2, 2, True, False, 0, device, dtype)


def check(cells, width, sites, act, has_cu, has_residual, seed, device, dtype):
    rows = sum(cells) * sites
    cu = torch.tensor([0, *cells]).cumsum(0).int() if has_cu else None
    bounds = cu.mul(sites).tolist() if has_cu else [0, rows]
    segments = len(bounds) - 1
    x = random_tensor(rows, width, seed=seed, dtype=dtype) + 2
    to = lambda t: None if t is None else t.to(device)  # noqa: E731
    mean, var = cell_norm.segment_stats(to(x), to(cu), sites)
    parts = [x.double()[a:b] for a, b in pairwise(bounds)]
    want = torch.stack([p.mean(0) if len(p) else p.new_zeros(width) for p in parts])
    assert_close(mean, want, "mean")
    want = torch.stack([p.var(0, correction=0) if len(p) else p.new_zeros(width) for p in parts])
    # One row has no variance, and two equal ones none but the rounding of their mean.
    error, size = float((var.double().cpu() - want).abs().max()), max(1.0, float(want.max()))
    print(f"variance: error {error:.3g} of {size:.3g}")
    assert error <= bound(var) * size

    mean, scale = random_tensor(segments, width, seed=seed + 1), random_tensor(segments, width, seed=seed + 2)
    bias = random_tensor(width, seed=seed + 3)
    residual = random_tensor(rows, width, seed=seed + 4, dtype=dtype) if has_residual else None
    which = torch.repeat_interleave(torch.arange(segments), torch.tensor(bounds).diff())
    m, s = mean.double()[which], scale.double()[which]
    z = (x.double() - m) * s + bias.double() + (0 if residual is None else residual.double())
    y = cell_norm.norm_act(to(x), to(residual), to(cu), sites, to(mean), to(scale), to(bias), act)
    assert_close(y, activated(z, act), "y")

    grad = random_tensor(rows, width, seed=seed + 5, dtype=dtype)
    grad[(z.abs() < 1e-3) | ((z - 6).abs() < 1e-3)] = 0  # a kink turns a rounding error into a whole gradient
    gate = None if residual is None or act == 0 else to(residual) if act == 2 else y
    passed, sums = cell_norm.norm_act_sums(to(grad), to(x), gate, to(cu), sites, to(mean), to(scale), to(bias), act)
    gated = grad.double() * ((z > 0) & ((z < 6) | (act < 2)) | (act == 0))
    if gate is None:
        assert tuple(passed.shape) == (0,)
    else:
        assert torch.equal(passed.cpu().double(), gated)
    if residual is None or gate is not None or act == 0:
        total = lambda v: torch.stack([v[a:b].sum(0) for a, b in pairwise(bounds)])  # noqa: E731
        assert_close(sums, torch.stack([total(gated), total(gated * (x.double() - m))]), "sums")

    if residual is None or act == 0:
        offset, slope = random_tensor(segments, width, seed=seed + 6), random_tensor(segments, width, seed=seed + 7)
        for moving in (False, True):
            pair = (to(offset), to(slope)) if moving else (None, None)
            got = cell_norm.norm_act_backward(to(grad), to(x), to(cu), sites, to(mean), to(scale), to(bias), *pair, act)
            want = gated * s
            if moving:
                want = want - offset.double()[which] - (x.double() - m) * slope.double()[which]
            assert_close(got, want, "grad x")


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_public_ops(device, act, has_residual):
    """Registration and autograd around the kernels: values and every gradient of all four ops."""
    torch.manual_seed(0)
    plan = CellMask.from_bool(torch.tensor([[[0, 1], [0, 0]], [[1, 1], [1, 1]], [[0, 1], [1, 1]]]).bool())
    x = torch.randn(plan.total, 3, 5, 12)
    leaves = [x + 1, torch.randn(12), torch.randn(12), torch.randn_like(x)]

    def outputs(backend, leaves, plan):
        x, weight, bias, residual = leaves
        mean, var = torch.zeros(12).to(weight), torch.ones(12).to(weight)
        added = residual if has_residual else None
        yield ops.batch_norm_act(x, weight, bias, mean, var, act=act, residual=added, backend=backend)
        yield mean
        yield var
        yield ops.group_norm_cells(x, plan, 3, weight, bias, backend=backend)
        for scope in ("sample", "batch", "dense"):
            yield ops.grn(x, plan, weight, bias, scope=scope, backend=backend)
        yield ops.segment_sum(x, plan, backend=backend)

    low = [t.to(device).requires_grad_() for t in leaves]
    high = [t.double().requires_grad_() for t in leaves]
    for got, want in zip(outputs("triton", low, plan.to(device)), outputs("reference", high, plan)):
        assert_close(got, want, "output")
        if want.requires_grad:
            seed = torch.randn(want.shape)
            grads = torch.autograd.grad(got, low, seed.to(device), allow_unused=True)
            wanted = torch.autograd.grad(want, high, seed.double(), allow_unused=True)
            for a, b in zip(grads, wanted):
                assert (a is None) == (b is None)
                if b is not None:
                    assert_close(a, b, "gradient")


def test_no_rows(device, dtype):
    x, table = torch.empty(0, 8, device=device, dtype=dtype), torch.ones(1, 8, device=device)
    mean, var = cell_norm.segment_stats(x, None, 1)
    assert not mean.any()
    assert not var.any()
    assert cell_norm.norm_act(x, None, None, 1, mean, var, table[0], 1).shape == x.shape
    assert not cell_norm.norm_act_sums(x, x, None, None, 1, mean, var, table[0], 0)[1].any()
    assert cell_norm.norm_act_backward(x, x, None, 1, mean, var, table[0], None, None, 0).shape == x.shape


if not INTERPRET:  # 70,000 programs, one after another

    def test_more_segments_than_a_grid_is_wide(device):
        check([1] * 70_000, 16, 1, 1, True, False, 0, device, torch.float32)
