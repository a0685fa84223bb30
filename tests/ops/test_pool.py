"""Pools of packed cells against the dense pool times the mask: ties, borders, masked neighbours, global means."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from maefast import masking, ops
from maefast.ops import CellMask, _registry
from maefast.ops.pool import global_pool_cells_reference

from .common import assert_close, backends, compare, dtypes_of, property_test
from .test_cells import cell_masks, ragged

BACKENDS = backends("max_pool_cells")
# (kernel, stride, padding) of one axis; the stride divides the cell.
WINDOWS = [(3, 2, 1), (2, 2, 0), (1, 1, 0), (3, 1, 1), (5, 1, 2), (1, 2, 0), (4, 4, 0), (3, 4, 0), (6, 4, 1), (9, 1, 4)]


@st.composite
def cases(draw):
    """(plan, x, window): cells of 8, 4, 2, 1 or odd numbers of sites, another window along each axis at times."""
    plan = draw(cell_masks())
    sizes = [draw(st.sampled_from([8, 4, 2, 1, 3]))]
    sizes.append(draw(st.sampled_from([sizes[0], sizes[0], 6, 1])))
    axes = [draw(st.sampled_from([w for w in WINDOWS if size % w[1] == 0])) for size in sizes]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(plan.total, *sizes, draw(st.integers(1, 37)), generator=generator)
    kind = draw(st.sampled_from(["normal", "relu", "negative"]))  # zeros tie with masked sites; they win
    x = {"normal": x, "relu": x.relu(), "negative": -x.abs()}[kind]
    return plan, x, tuple(zip(*axes))


def by_hand(x, plan, kernel, stride, padding, kind, include_pad=True):
    """Site by site."""
    (rows, columns), (cells, h, w, channels) = plan.grid, x.shape
    slot = plan.slot.tolist()
    out = torch.empty(cells, h // stride[0], w // stride[1], channels, dtype=x.dtype)
    for t, cell in enumerate(plan.cells.tolist()):
        b, y0, x0 = cell // (rows * columns), cell // columns % rows, cell % columns
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                sites = []
                for ky in range(kernel[0]):
                    for kx in range(kernel[1]):
                        y = y0 * h + i * stride[0] - padding[0] + ky
                        at = x0 * w + j * stride[1] - padding[1] + kx
                        if 0 <= y < rows * h and 0 <= at < columns * w:
                            s = slot[(b * rows + y // h) * columns + at // w]
                            sites.append(x[s, y % h, at % w] if s >= 0 else torch.zeros(channels, dtype=x.dtype))
                stacked = torch.stack(sites)
                if kind == "max":
                    out[t, i, j] = stacked.amax(0)
                else:
                    out[t, i, j] = stacked.sum(0) / (kernel[0] * kernel[1] if include_pad else len(sites))
    return out


@given(case=cases(), include_pad=st.booleans())
@property_test
def test_references_equal_a_loop(case, include_pad):
    plan, x, window = case
    if x.numel() > 4000:
        x = x[..., :2].contiguous()
    x = x.double()
    assert torch.equal(ops.max_pool_cells(x, plan, *window, backend="reference"), by_hand(x, plan, *window, "max"))
    got = ops.avg_pool_cells(x, plan, *window, include_pad, backend="reference")
    assert_close(got, by_hand(x, plan, *window, "avg", include_pad), x.dtype)


@pytest.mark.parametrize("where", BACKENDS)
@given(case=cases(), data=st.data())
@property_test
def test_max_pool_and_its_gradient(where, case, data):
    """Exact values and choices: ties go to the same site as in the dense pool."""
    backend, device = where
    plan, x, window = case
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))

    def call(backend, device, x):
        return ops.max_pool_cells(x, plan.to(device), *window, backend=backend)

    compare(call, {"x": x}, backend, device, dtype)
    x = x.to(dtype)
    assert torch.equal(call(backend, device, x.to(device)).cpu(), call("reference", "cpu", x))


@pytest.mark.parametrize("where", BACKENDS)
@given(case=cases(), include_pad=st.booleans(), data=st.data())
@property_test
def test_avg_pool_and_its_gradient(where, case, include_pad, data):
    backend, device = where
    plan, x, window = case

    def call(backend, device, x):
        return ops.avg_pool_cells(x, plan.to(device), *window, include_pad, backend=backend)

    compare(call, {"x": x}, backend, device, data.draw(st.sampled_from(dtypes_of(backend))))


@pytest.mark.parametrize("where", BACKENDS)
def test_negative_values_lose_to_masked_neighbours_but_not_to_the_border(where):
    """SparK's rule, spelled out: -inf beyond the image, 0 at masked sites."""
    backend, device = where
    masked = torch.tensor([[[False, True], [False, False]]])
    plan = CellMask.from_bool(masked).to(device)
    x = torch.full((3, 2, 2, 1), -1.0, device=device)
    y = ops.max_pool_cells(x, plan, 3, 1, 1, backend=backend)[..., 0].cpu()
    assert y[0].tolist() == [[-1, 0], [-1, 0]]  # the right column touches the masked cell
    assert y[1].tolist() == [[-1, 0], [-1, -1]]  # its corner does
    assert y[2].tolist() == [[0, 0], [-1, -1]]


@pytest.mark.parametrize("where", BACKENDS)
def test_nan_and_infinity(where):
    backend, device = where
    plan = CellMask.all_visible(1, (2, 2), device)
    x = torch.randn(4, 4, 4, 5, device=device)
    x[0, 1, 1, 0], x[1, 2, 2, 1], x[3, :, :, 2] = float("nan"), float("inf"), float("-inf")
    want = ops.max_pool_cells(x.cpu(), plan.to("cpu"), 3, 2, 1, backend="reference")
    assert bool(want.isnan().any())
    got = ops.max_pool_cells(x, plan, 3, 2, 1, backend=backend).cpu()
    assert torch.equal(got.nan_to_num(nan=7e9), want.nan_to_num(nan=7e9))


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("include_pad", [False, True])
def test_all_visible_is_the_dense_pool(where, include_pad):
    backend, device = where
    plan = CellMask.all_visible(2, (3, 2), device)
    full = torch.randn(2, 7, 12, 8, device=device)
    x = ops.pack_cells(full, plan)
    got = ops.unpack_cells(ops.max_pool_cells(x, plan, 3, 2, 1, backend=backend), plan)
    assert torch.equal(got, F.max_pool2d(full, 3, 2, 1))
    got = ops.unpack_cells(ops.avg_pool_cells(x, plan, 3, 2, 1, include_pad, backend=backend), plan)
    torch.testing.assert_close(got, F.avg_pool2d(full, 3, 2, 1, count_include_pad=include_pad))


@pytest.mark.parametrize("where", BACKENDS)
def test_runs_agree_bit_for_bit(where):
    backend, device = where
    plan = CellMask(masking.random(4, 49, keep=[20, 1, 0, 49]).to(device), (7, 7))
    x = torch.randn(plan.total, 8, 8, 48, device=device, requires_grad=True)
    runs = []
    for _ in range(2):
        outs = [
            ops.max_pool_cells(x, plan, 3, 2, 1, backend=backend),
            ops.avg_pool_cells(x, plan, 3, 1, 1, backend=backend),
            ops.global_pool_cells(x, plan, backend=backend),
        ]
        runs.append([*outs, *(torch.autograd.grad(out.square().sum(), x)[0] for out in outs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_ceil_mode_where_it_changes_nothing():
    plan = ragged()
    x = torch.randn(17, 4, 4, 3)
    want = ops.avg_pool_cells(x, plan, 2, count_include_pad=False)
    assert torch.equal(ops.avg_pool_cells(x, plan, 2, 2, 0, False, ceil_mode=True), want)


# --- global --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", backends("segment_stats"))
@given(plan=cell_masks(), seed=st.integers(0, 2**16), data=st.data())
@property_test
def test_global_pool_and_its_gradient(where, plan, seed, data):
    backend, device = where
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    x = torch.randn(plan.total, 2, 3, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
    low, high = x.to(device).requires_grad_(), x.double().requires_grad_()
    got, want = ops.global_pool_cells(low, plan.to(device), backend=backend), global_pool_cells_reference(high, plan)
    assert got.dtype is dtype
    assert_close(got, want, dtype)
    weights = torch.randn(want.shape).to(dtype)
    (grad,) = torch.autograd.grad(got, low, weights.to(device))
    (wanted,) = torch.autograd.grad(want, high, weights.double())
    assert_close(grad, wanted, dtype)


def test_global_pool_is_the_mean_of_the_active_sites():
    plan = ragged()
    x = torch.randn(17, 2, 2, 3, dtype=torch.float64)
    full, active = ops.unpack_cells(x, plan), plan.upsampled_mask((6, 8))[:, 0]
    for b in (0, 2):
        torch.testing.assert_close(ops.global_pool_cells(x, plan)[b], full[b][:, active[b]].mean(1))
    assert torch.equal(ops.global_pool_cells(x, plan)[1], torch.zeros(3, dtype=torch.float64))


# --- bad input, opcheck, compile -----------------------------------------------------------------------------

X = torch.randn(17, 4, 6, 3)
BAD = [
    (lambda: ops.max_pool_cells(X, ragged().tokens, 2), TypeError, "CellMask"),
    (lambda: ops.max_pool_cells(X[1:], ragged(), 2), ValueError, "packed cells"),
    (lambda: ops.max_pool_cells(X, ragged(), 4), ValueError, "coarser than the mask"),
    (lambda: ops.max_pool_cells(X, ragged(), 3, 2, 0), ValueError, "exactly 1/2 of the sites"),
    (lambda: ops.max_pool_cells(X, ragged(), 2, 2, 1), ValueError, "exactly 1/2 of the sites"),
    (lambda: ops.max_pool_cells(X, ragged(), 17, 1, 8), ValueError, "at most 255"),
    (lambda: ops.max_pool_cells(X, ragged(), (2, 2, 2)), ValueError, "kernel must be an int or two"),
    (lambda: ops.max_pool_cells(X, ragged(), 2.0), TypeError, "kernel must be an int or two"),
    (lambda: ops.max_pool_cells(X, ragged(), 0), ValueError, "kernel must be at least 1"),
    (lambda: ops.max_pool_cells(X, ragged(), 2, 0), ValueError, "stride must be at least 1"),
    (lambda: ops.max_pool_cells(X, ragged(), 2, 2, -1), ValueError, "padding must be at least 0"),
    (lambda: ops.max_pool_cells(X.int(), ragged(), 2), TypeError, "float32"),
    (lambda: ops.avg_pool_cells(X, ragged(), 3, 2, 0), ValueError, "exactly 1/2 of the sites"),
    (lambda: ops.avg_pool_cells(X, ragged(), 3, 2, 1, ceil_mode=True), ValueError, "ceil_mode=True"),
    (lambda: ops.avg_pool_cells(X, ragged(), 33, 1, 16), ValueError, "at most 1024"),
    (lambda: ops.avg_pool_cells(X.to("meta"), ragged(), 2), ValueError, "one device"),
    (lambda: ops.global_pool_cells(X[1:], ragged()), ValueError, "packed cells"),
    (lambda: ops.global_pool_cells(X, None), TypeError, "CellMask"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("where", backends("max_pool_cells", reference=False))
def test_opcheck(where):
    backend, device = where
    plan = ragged(device)
    x, table, window = torch.rand(17, 4, 2, 5, device=device), plan.neighbours(1), ([3, 2], [2, 2], [1, 0])
    raw = lambda op: _registry.raw(op, backend)  # noqa: E731
    torch.library.opcheck(raw("max_pool_cells"), (x, table, *window))
    y, argmax = raw("max_pool_cells")(x, table, *window)
    torch.library.opcheck(raw("max_pool_cells_backward"), (y, argmax, table, *window))
    for include_pad in (False, True):
        torch.library.opcheck(raw("avg_pool_cells"), (x, table, *window, include_pad))
        torch.library.opcheck(raw("avg_pool_cells_backward"), (y, table, *window, include_pad))


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(where, dynamic):
    backend, device = where

    def step(x, noise):
        plan = CellMask(masking.random(x.shape[0], 12, keep=5, noise=noise, backend=backend), (3, 4))
        cells = ops.pack_cells(x, plan, backend=backend)
        cells = ops.max_pool_cells(cells, plan, 3, 2, 1, backend=backend)
        cells = ops.avg_pool_cells(cells, plan, 3, 1, 1, False, backend=backend)
        return ops.global_pool_cells(cells, plan, backend=backend).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, 5, 12, 16, device=device, requires_grad=True)
        noise = torch.rand(batch, 12, device=device)
        (got,), (want,) = torch.autograd.grad(compiled(x, noise), x), torch.autograd.grad(step(x, noise), x)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("where", backends("max_pool_cells", reference=False))
def test_a_table_that_does_not_fit_is_refused(where):
    backend, device = where
    if device != "cpu":
        pytest.skip("only the CPU kernels check the content of a plan")
    plan, x = ragged(), torch.rand(17, 4, 4, 3)
    run = _registry.raw("max_pool_cells", backend)
    with pytest.raises(RuntimeError, match="beyond the table"):
        run(x, plan.neighbours(0), [3, 3], [2, 2], [1, 1])
    with pytest.raises(RuntimeError, match="out of range"):
        run(x, plan.neighbours(1) + 1, [3, 3], [2, 2], [1, 1])
