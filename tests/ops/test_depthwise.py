"""depthwise_cells against the dense convolution of the masked map, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from maefast import ops
from maefast.ops import CellMask, _registry

from .common import assert_close, backends, compare, dtypes_of, property_test
from .cpu.common import needs_cpu_ops

BACKENDS = backends("depthwise")
COMPILED = backends("depthwise", reference=False)
CELLS = [(8, 8), (4, 4), (2, 2), (1, 1)]


def random_cells(batch=2, grid=(3, 4), seed=0, share=0.6) -> CellMask:
    return CellMask.from_bool(torch.rand(batch, *grid, generator=torch.Generator().manual_seed(seed)) < share)


def inputs_for(plan: CellMask, cell: tuple[int, int], channels: int, size: int, seed: int = 0, bias: bool = True):
    generator = torch.Generator().manual_seed(seed)
    found = {"x": torch.randn(plan.total, *cell, channels, generator=generator)}
    found["weight"] = torch.randn(channels, 1, size, size, generator=generator)
    return found | ({"bias": torch.randn(channels, generator=generator)} if bias else {})


def caller(plan: CellMask):
    def call(backend, device, x, weight, bias=None):
        return ops.depthwise_cells(x, plan.to(device), weight, bias, backend=backend)

    return call


@pytest.mark.parametrize("size", [3, 5, 7])
def test_reference_equals_loops(size):
    plan, cell, pad = random_cells(1, (2, 3)), (2, 3), size // 2
    x, weight, bias = inputs_for(plan, cell, 2, size).values()
    got = ops.depthwise_cells(x, plan, weight, bias, backend="reference")
    sites = {}  # (row, column) in the image -> value of an active site
    places = [divmod(int(c), 3) for c in plan.cells]
    for t, (cy, cx) in enumerate(places):
        for i in range(2):
            for j in range(3):
                sites[cy * 2 + i, cx * 3 + j] = (t, i, j)
    for (row, column), (t, i, j) in sites.items():
        want = bias.clone()
        for dy in range(size):
            for dx in range(size):
                near = sites.get((row + dy - pad, column + dx - pad))
                if near is not None:
                    want += weight[:, 0, dy, dx] * x[near]
        torch.testing.assert_close(got[t, i, j], want)


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("size", [3, 5, 7])
def test_every_level(where, size, cell):
    backend, device = where
    plan = random_cells(3, (4, 5))
    for dtype in dtypes_of(backend):
        compare(caller(plan), inputs_for(plan, cell, 40, size), backend, device, dtype)


@pytest.mark.parametrize("where", BACKENDS)
@given(data=st.data())
@property_test
def test_odd_shapes(where, data):
    """Cells and grids that are not square, few and ragged channels, few and ragged cells, down to none."""
    backend, device = where
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    grid = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    share = data.draw(st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.1]))
    plan = random_cells(data.draw(st.integers(1, 3)), grid, data.draw(st.integers(0, 2**16)), share)
    cell = data.draw(st.tuples(st.integers(1, 19), st.integers(1, 19)))
    channels = data.draw(st.sampled_from([2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 64, 70, 80]))
    size, bias = data.draw(st.sampled_from([3, 5, 7])), data.draw(st.booleans())
    compare(caller(plan), inputs_for(plan, cell, channels, size, 1, bias), backend, device, dtype)


@pytest.mark.parametrize("where", BACKENDS)
def test_no_active_cell(where):
    backend, device = where
    plan = CellMask.from_bool(torch.ones(2, 3, 3, dtype=torch.bool)).to(device)
    leaves = [v.to(device).requires_grad_() for v in inputs_for(plan, (4, 4), 32, 7).values()]
    y = ops.depthwise_cells(leaves[0], plan, *leaves[1:], backend=backend)
    assert y.shape == (0, 4, 4, 32)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert all(not g.any() for g in grads)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_all_visible_equals_dense(where, cell):
    backend, device = where
    plan = CellMask.all_visible(2, (3, 4), device)
    x, weight, bias = (v.to(device) for v in inputs_for(plan, cell, 24, 7).values())
    dense = F.conv2d(ops.unpack_cells(x, plan).double(), weight.double(), bias.double(), padding=3, groups=24)
    got = ops.unpack_cells(ops.depthwise_cells(x, plan, weight, bias, backend=backend), plan)
    assert_close(got, dense, torch.float32)


@pytest.mark.parametrize("where", BACKENDS)
def test_only_some_gradients(where):
    backend, device = where
    plan = random_cells().to(device)
    values = {k: v.to(device) for k, v in inputs_for(plan, (2, 2), 20, 5).items()}

    def grads(*names):
        leaves = {k: v.clone().requires_grad_(k in names) for k, v in values.items()}
        y = ops.depthwise_cells(leaves["x"], plan, leaves["weight"], leaves["bias"], backend=backend)
        return torch.autograd.grad(y.square().sum(), [leaves[k] for k in names])

    every = dict(zip(values, grads(*values)))
    for names in (("x",), ("weight",), ("bias",), ("x", "bias")):
        for name, grad in zip(names, grads(*names)):
            torch.testing.assert_close(grad, every[name])


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_mixed_precision(where, low):
    """Autocast gives the low dtype, as it does for a dense convolution; float32 taps are not rounded to it."""
    backend, device = where
    plan = random_cells().to(device)
    x, weight, bias = (v.to(device).requires_grad_() for v in inputs_for(plan, (4, 4), 32, 7).values())
    with torch.autocast(device, low):
        y = ops.depthwise_cells(x, plan, weight, bias, backend=backend)
        same = ops.depthwise_cells(x, plan, weight, bias, backend="reference")
    assert y.dtype is same.dtype is low
    high = [
        x.detach().to(low).double().requires_grad_(),
        *(v.detach().double().requires_grad_() for v in (weight, bias)),
    ]
    want = ops.depthwise_cells(high[0], plan, *high[1:], backend="reference")
    assert_close(y, want, low)
    seed = torch.randn_like(y)
    got, wanted = torch.autograd.grad(y, [x, weight, bias], seed), torch.autograd.grad(want, high, seed.double())
    for grad, ref, leaf in zip(got, wanted, (x, weight, bias)):
        assert grad.dtype is leaf.dtype
        assert_close(grad, ref, low)


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("cell", [*CELLS, (3, 6)], ids=str)
def test_runs_agree_bit_for_bit(where, cell):
    """Whatever the number of threads."""
    backend, device = where
    plan = random_cells(6, (5, 5)).to(device)
    leaves = [v.to(device).requires_grad_() for v in inputs_for(plan, cell, 72, 7).values()]
    runs, before = [], torch.get_num_threads()
    for threads in (1, 2, 3, 5, before):
        torch.set_num_threads(threads)
        y = ops.depthwise_cells(leaves[0], plan, *leaves[1:], backend=backend)
        runs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert torch.get_num_threads() == before
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


PLAN = CellMask.from_bool(torch.tensor([[[False, True], [True, False]]]))
X, W, B = torch.randn(2, 4, 4, 6), torch.randn(6, 1, 3, 3), torch.randn(6)
BAD = [
    (lambda: ops.depthwise_cells(X, PLAN, torch.randn(6, 1, 4, 4)), ValueError, "3 x 3, 5 x 5 or 7 x 7"),
    (lambda: ops.depthwise_cells(X, PLAN, torch.randn(6, 1, 9, 9)), ValueError, "3 x 3, 5 x 5 or 7 x 7"),
    (lambda: ops.depthwise_cells(X, PLAN, torch.randn(6, 1, 3, 5)), ValueError, "3 x 3, 5 x 5 or 7 x 7"),
    (lambda: ops.depthwise_cells(X, PLAN, W[:5]), ValueError, r"weight must be \[6, 1, k, k\]"),
    (lambda: ops.depthwise_cells(X, PLAN, torch.randn(6, 6, 3, 3)), ValueError, r"weight must be \[6, 1, k, k\]"),
    (lambda: ops.depthwise_cells(X, PLAN, W[0]), ValueError, "weight must have 4 dimensions"),
    (lambda: ops.depthwise_cells(X, PLAN, W, B[:5]), ValueError, "bias must hold 6"),
    (lambda: ops.depthwise_cells(X[:1], PLAN, W), ValueError, "packed cells"),
    (lambda: ops.depthwise_cells(X[0], PLAN, W), ValueError, "x must have 4 dimensions"),
    (lambda: ops.depthwise_cells(X, PLAN.tokens, W), TypeError, "CellMask"),
    (lambda: ops.depthwise_cells(X.int(), PLAN, W), TypeError, "float32"),
    (lambda: ops.depthwise_cells(X, PLAN, W.double()), TypeError, "must not be float64"),
    (lambda: ops.depthwise_cells(X, PLAN, W, B.double()), TypeError, "must not be float64"),
    (lambda: ops.depthwise_cells(X, PLAN, W.to("meta")), ValueError, "one device"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@needs_cpu_ops
def test_bad_raw_input():
    """A table that does not fit its cells raises on a CPU; nothing outside of x is read."""
    run, taps = _registry.raw("depthwise", "cpu"), W.flatten(1).t().contiguous()
    table = PLAN.neighbours(1)
    wrong = table.clone()
    wrong[0, 0] = 2
    with pytest.raises(RuntimeError, match="out of range"):
        run(X, wrong, taps, None, False)
    with pytest.raises(RuntimeError, match="does not reach"):
        run(X, PLAN.neighbours(0), taps, None, False)
    with pytest.raises(RuntimeError, match="neighbours must be"):
        run(X, table[:1], taps, None, False)


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("channels", [6, 40])
def test_opcheck(where, channels):
    backend, device = where
    x, grad = (torch.rand(2, 4, 4, channels, device=device) for _ in range(2))
    taps, bias = torch.rand(9, channels, device=device), torch.rand(channels, device=device)
    table = PLAN.to(device).neighbours(1)
    for added, flip in ((None, True), (bias, False)):
        torch.library.opcheck(_registry.raw("depthwise", backend), (x, table, taps, added, flip))
    torch.library.opcheck(_registry.raw("depthwise_grad_weight", backend), (x, grad, table, 3))


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(where, dynamic):
    backend, device = where

    def step(x, weight, bias, plan):
        return ops.depthwise_cells(x, plan, weight, bias, backend=backend).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seed in (0, 1):
        plan = random_cells(seed=seed).to(device)
        plan.neighbours(1)
        leaves = [v.to(device).requires_grad_() for v in inputs_for(plan, (4, 4), 8, 7).values()]
        got = torch.autograd.grad(compiled(*leaves, plan), leaves)
        want = torch.autograd.grad(step(*leaves, plan), leaves)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
