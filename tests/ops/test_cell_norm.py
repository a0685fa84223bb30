"""Norms over active sites: BatchNorm with activation and residual, GroupNorm, InstanceNorm, GRN, segment sums."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from maefast import ops
from maefast.ops import CellMask, _registry
from maefast.ops.cell_norm import GRN_SCOPES

from .common import assert_close, backends, compare, dtypes_of, property_test

BACKENDS = backends("norm_act")
WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from([96, 100, 512, 520, 768, 1030]))


def random_cells(batch: int, seed: int, grid: tuple[int, int] = (2, 3), device: str = "cpu") -> CellMask:
    """Ragged; the second sample, if there is one, has no active cell."""
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(batch, *grid, generator=generator) < 0.5
    masked[0, 0, 0] = False
    if batch > 1:
        masked[1] = True
    return CellMask.from_bool(masked).to(device)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
@given(data=st.data())
@property_test
def test_batch_norm_and_every_gradient(where, training, act, data):
    backend, device = where
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    channels = data.draw(WIDTHS)
    shape = [*data.draw(st.lists(st.integers(1, 4), max_size=2)), data.draw(st.integers(12, 300)), channels]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    new = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    inputs = {"x": new(*shape) + 2 * new(channels)}
    if data.draw(st.booleans()):
        inputs["residual"] = new(*shape)
    affine = data.draw(st.booleans())
    if affine:
        inputs["weight"], inputs["bias"] = new(channels) + 0.5, new(channels)
    mean, var = 2 * new(channels), new(channels).square() + 0.5
    buffers = {}

    def call(backend, device, x, residual=None, weight=None, bias=None):
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        running = [t.to(device, wide).clone() for t in (mean, var)]
        # Parameters and buffers stay float32 beside 16-bit rows; `compare` rounds them with everything else.
        weight, bias = (t if t is None else t.to(wide) for t in (weight, bias))
        y = ops.batch_norm_act(x, weight, bias, *running, training, 0.3, 1e-5, act, residual, backend=backend)
        buffers[backend == "reference" and x.dtype is torch.float64] = running
        if act != "none":  # a rounding error at a kink of the activation is a whole gradient
            y = y * away_from_kinks(x, residual, weight, bias).to(y)
        return y

    def away_from_kinks(x, residual, weight, bias):
        parts = [None if t is None else t.detach().double().cpu() for t in (x, residual, weight, bias)]
        z = ops.batch_norm_act(
            parts[0], *parts[2:], mean.double(), var.double(), training, residual=parts[1], backend="reference"
        )
        return (z.abs() > 1e-3) & ((z - 6).abs() > 1e-3)

    # Not x's own seed: a norm passes nothing back of a gradient along x.
    compare(call, inputs, backend, device, dtype, seed=2**20)
    if len(buffers) == 2:
        for got, want in zip(buffers[False], buffers[True]):
            assert_close(got, want, torch.float32, "running statistics")
            assert training or torch.equal(got.double().cpu(), want)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels", [1, 24, 33, 768])
def test_is_batch_norm_over_active_sites(where, training, channels):
    """The public emulation: nn.BatchNorm1d over the gathered active sites; buffers as nn.BatchNorm2d keeps them."""
    backend, device = where
    torch.manual_seed(0)
    plan = random_cells(3, 1)
    dense = torch.randn(3, channels, 4, 6)
    active = plan.upsampled_mask((4, 6))
    norm = nn.BatchNorm1d(channels, momentum=0.2).double().train(training)
    with torch.no_grad():
        for t in (norm.weight, norm.bias, norm.running_mean):
            t.normal_()
    state = {k: v.detach().clone().float().to(device) for k, v in norm.state_dict().items() if v.is_floating_point()}
    leaf = dense.double().requires_grad_()
    sites = leaf.permute(0, 2, 3, 1)[active[:, 0]]
    want = torch.zeros(3, 4, 6, channels, dtype=torch.double)
    want[active[:, 0]] = norm(sites).relu()
    x = ops.pack_cells(dense, plan).to(device).requires_grad_()
    weight, bias = state["weight"].requires_grad_(), state["bias"].requires_grad_()
    buffers = state["running_mean"], state["running_var"]
    y = ops.batch_norm_act(x, weight, bias, *buffers, training, 0.2, norm.eps, "relu", backend=backend)
    assert_close(y, ops.pack_cells(want.permute(0, 3, 1, 2), plan), torch.float32)
    for got, buffer in zip(buffers, (norm.running_mean, norm.running_var)):
        assert_close(got, buffer, torch.float32)
    seed = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, weight, bias], seed)
    full = ops.unpack_cells(seed.cpu().double(), plan).permute(0, 2, 3, 1)
    wanted = torch.autograd.grad(want, [leaf, norm.weight, norm.bias], full)
    assert_close(got[0], ops.pack_cells(wanted[0], plan), torch.float32, "gradient of x")
    assert_close(got[1], wanted[1], torch.float32, "gradient of weight")
    assert_close(got[2], wanted[2], torch.float32, "gradient of bias")


@pytest.mark.parametrize("where", BACKENDS)
def test_mean_far_from_zero(where):
    """Mean 1000 deviations away, and a first row that is an outlier: the variance keeps its digits."""
    backend, device = where
    torch.manual_seed(0)
    x = torch.randn(20000, 24) + 1000 * torch.randn(24)
    x[0] += 500
    mean, var = torch.zeros(24, device=device), torch.zeros(24, device=device)
    y = ops.batch_norm_act(x.to(device), None, None, mean, var, momentum=1.0, backend=backend)
    assert_close(mean, x.double().mean(0), torch.float32)
    assert_close(var, x.double().var(0), torch.float32)
    want = F.batch_norm(x.double(), None, None, training=True)
    assert float((y.double().cpu() - want).abs().max()) < 1e-3  # half a unit in the last place of the mean is 6e-5


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_frozen_parameters(where, training):
    """Only what asks for a gradient gets one, and x's is the same."""
    backend, device = where
    torch.manual_seed(0)
    x, residual = (torch.randn(40, 12, device=device, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(12, device=device, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(12, device=device), torch.rand(12, device=device) + 0.5
    leaves = [x, weight, bias, residual]

    def grads(which, act):
        given = [t if any(t is w for w in which) else t.detach() for t in leaves]
        y = ops.batch_norm_act(*given[:3], mean, var, training, 0.0, 1e-5, act, given[3], backend=backend)
        return torch.autograd.grad(y.square().sum(), which)

    for act in ("none", "relu", "relu6"):
        every = dict(zip(map(id, leaves), grads(leaves, act)))
        for which in ([x], [weight], [bias], [residual], [x, residual], [weight, bias]):
            for leaf, grad in zip(which, grads(which, act)):
                assert torch.equal(grad, every[id(leaf)])


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("kind", ["group", "instance", "sample", "batch", "dense", "sum"])
@given(data=st.data())
@property_test
def test_norms_of_each_sample(where, kind, data):
    backend, device = where
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    groups, per_group = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([1, 3, 8, 60]))
    channels = groups * per_group
    h, w = data.draw(st.integers(2, 5)), data.draw(st.integers(4, 6))
    batch, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2**16))
    plan = None if data.draw(st.booleans()) else random_cells(batch, seed)
    plans = {"cpu": plan, device: None if plan is None else plan.to(device)}
    torch.manual_seed(seed)
    size = (batch if plan is None else plan.total, h, w, channels)
    inputs = {"x": torch.randn(size) + torch.randn(channels)}
    if kind != "sum":
        inputs |= {"weight": torch.randn(channels) + 0.5, "bias": torch.randn(channels)}

    def call(backend, device, x, weight=None, bias=None):
        where = plans["cpu" if backend == "reference" else device]
        if kind == "sum":
            return ops.segment_sum(x, where, backend=backend)
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        weight, bias = weight.to(wide), bias.to(wide)
        if kind == "group":
            return ops.group_norm_cells(x, where, groups, weight, bias, backend=backend)
        if kind == "instance":
            return ops.instance_norm_cells(x, where, weight, bias, backend=backend)
        return ops.grn(x, where, weight.view(1, 1, -1), bias, 1e-6, kind, backend=backend)

    compare(call, inputs, backend, device, dtype, seed=2**20)


def test_references_are_the_published_formulas():
    torch.manual_seed(0)
    plan = random_cells(3, 5)
    x = torch.randn(plan.total, 2, 2, 6, dtype=torch.double)
    weight, bias = torch.randn(6, dtype=torch.double), torch.randn(6, dtype=torch.double)
    sample = torch.div(plan.cells.long(), 6, rounding_mode="floor")
    for scope in GRN_SCOPES:
        got = ops.grn(x, plan, weight, bias, 1e-6, scope, backend="reference")
        for cell in range(plan.total):
            mine = x[(sample == sample[cell]) | (scope == "batch")].reshape(-1, 6)
            response = [(mine[:, c].pow(2).sum() + (1e-6 if scope == "sample" else 0)).sqrt() for c in range(6)]
            norm = torch.stack(response) / (sum(response) / 6 + 1e-6)
            torch.testing.assert_close(got[cell], weight * (x[cell] * norm) + bias + x[cell])
    group = ops.group_norm_cells(x, plan, 2, weight, bias, backend="reference")
    total = ops.segment_sum(x, plan, backend="reference")
    for b in range(3):
        mine = x[sample == b]
        torch.testing.assert_close(total[b], mine.reshape(-1, 6).sum(0))
        if len(mine):
            want = nn.GroupNorm(2, 6).double()(mine.reshape(1, -1, 6).mT).mT.reshape(mine.shape) * weight + bias
            torch.testing.assert_close(group[sample == b], want)
    dense = torch.randn(2, 4, 5, 6, dtype=torch.double)
    norm = dense.norm(p=2, dim=(1, 2), keepdim=True)
    want = weight * (dense * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + bias + dense
    torch.testing.assert_close(ops.grn(dense, None, weight, bias, scope="dense", backend="reference"), want)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_samples_of_one_site(groups, backend):
    """A group of several channels is a norm of these; a group of one value is its own mean."""
    x = torch.randn(2, 1, 1, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plan = CellMask.from_bool(torch.zeros(2, 1, 1, dtype=torch.bool))
    grouped = x.detach().unflatten(-1, (groups, -1))
    want = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    for where in (plan, None):
        got = ops.group_norm_cells(x, where, groups, backend=backend)
        torch.testing.assert_close(got, want.view(x.shape))
        got.square().sum().backward()
        assert x.grad.isfinite().all()
    torch.testing.assert_close(ops.instance_norm_cells(x, plan, backend=backend), torch.zeros_like(x))


@pytest.mark.parametrize("where", BACKENDS)
def test_nan_and_zero(where):
    """NaN reaches the output, as in torch; a channel of zeros has finite gradients under every GRN."""
    backend, device = where
    x = torch.randn(8, 5, device=device)
    x[3, 2] = float("nan")
    y = ops.batch_norm_act(x, None, None, act="relu6", backend=backend)
    assert torch.equal(y.isnan().any(0).cpu(), torch.tensor([False, False, True, False, False]))
    for scope in GRN_SCOPES:
        cells = torch.randn(2, 3, 3, 4, device=device)
        cells[..., 1] = 0
        cells.requires_grad_()
        weight = torch.ones(4, device=device, requires_grad=True)
        y = ops.grn(cells, None, weight, torch.zeros(4, device=device), scope=scope, backend=backend)
        for grad in torch.autograd.grad(y.square().sum(), [cells, weight]):
            assert grad.isfinite().all()


@pytest.mark.parametrize("where", BACKENDS)
def test_runs_agree_bit_for_bit(where):
    backend, device = where
    plan = random_cells(5, 0, (7, 7), device)
    leaves = [torch.randn(s, device=device, requires_grad=True) for s in ((plan.total, 8, 8, 24), (24,), (24,))]
    runs = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 2):
            torch.set_num_threads(count if device == "cpu" and backend == "cpu" else threads)
            out = [ops.batch_norm_act(*leaves, act="relu", backend=backend)]
            out += [ops.grn(leaves[0], plan, *leaves[1:], scope=scope, backend=backend) for scope in GRN_SCOPES]
            out += [ops.group_norm_cells(leaves[0], plan, 6, *leaves[1:], backend=backend)]
            grads = [torch.autograd.grad(y.square().sum(), leaves) for y in out]
            runs.append([*out, *(g for each in grads for g in each), ops.segment_sum(leaves[0], plan, backend=backend)])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run))


X, W = torch.randn(2, 3, 4), torch.ones(4)
PLAN = random_cells(2, 0)
CELLS = torch.randn(PLAN.total, 2, 2, 4)


@pytest.mark.parametrize("backend", ["reference", None])
def test_wider_residual(backend):
    """The arithmetic is that of the promoted dtype, weight and bias included."""
    torch.manual_seed(0)
    x, weight, residual = torch.randn(3, 5, 4), torch.randn(4), torch.randn(3, 5, 4, dtype=torch.float64)
    y = ops.batch_norm_act(x, weight, None, residual=residual, backend=backend)
    want = ops.batch_norm_act(x.double(), weight.double(), None, residual=residual, backend="reference")
    assert y.dtype is torch.float64
    assert_close(y, want, torch.float64)


BAD = [
    (lambda: ops.batch_norm_act(X[:1, :1], W, W), ValueError, "more than one row, got 1"),
    (lambda: ops.batch_norm_act(X[:0], W, W), ValueError, "more than one row, got 0"),
    (lambda: ops.batch_norm_act(X, W[:3], W), ValueError, "weight must hold 4"),
    (lambda: ops.batch_norm_act(X, W, W, W, None), ValueError, "given together"),
    (lambda: ops.batch_norm_act(X, W, W, W[:2], W), ValueError, "running_mean must hold 4"),
    (lambda: ops.batch_norm_act(X, W, W, training=False), ValueError, "are needed"),
    (lambda: ops.batch_norm_act(X, W, W, momentum=1.5), ValueError, "momentum"),
    (lambda: ops.batch_norm_act(X, W, W, eps=0.0), ValueError, "eps must be positive"),
    (lambda: ops.batch_norm_act(X, W, W, act="gelu"), ValueError, "act must be one of"),
    (lambda: ops.batch_norm_act(X, W, W, residual=X[0]), ValueError, "residual must have the shape"),
    (lambda: ops.batch_norm_act(X, W, W, residual=X.to("meta")), ValueError, "one device"),
    (lambda: ops.batch_norm_act(X.int(), W, W), TypeError, "float32"),
    (lambda: ops.batch_norm_act(W, W, W), ValueError, r"must be \[..., C\]"),
    (lambda: ops.grn(CELLS, PLAN, W, W, scope="mean"), ValueError, "scope must be one of"),
    (lambda: ops.grn(CELLS[1:], PLAN, W, W), ValueError, "packed cells"),
    (lambda: ops.grn(X, None, W, W), ValueError, "4 (or 5 )?dimensions"),
    (lambda: ops.group_norm_cells(CELLS, PLAN, 3), ValueError, "groups must divide"),
    (lambda: ops.group_norm_cells(CELLS, "plan", 2), TypeError, "CellMask"),
    (lambda: ops.instance_norm_cells(CELLS, PLAN, W[:1]), ValueError, "weight must hold 4"),
    (lambda: ops.segment_sum(CELLS[..., 0], PLAN), ValueError, "4 (or 5 )?dimensions"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("where", backends("norm_act", reference=False))
def test_opcheck(where):
    backend, device = where
    x, residual, grad = (torch.randn(12, 6, device=device) for _ in range(3))
    run = lambda op, *args: torch.library.opcheck(_registry.raw(op, backend), args)  # noqa: E731
    for cu, sites in ((None, 1), (torch.tensor([0, 2, 2, 3], dtype=torch.int32, device=device), 4)):
        mean, var = _registry.raw("segment_stats", backend)(x, cu, sites)
        bias = torch.randn(6, device=device)
        run("segment_stats", x, cu, sites)
        run("norm_act", x, residual, cu, sites, mean, var, bias, 2)
        for gate, act in ((None, 0), (residual, 1), (residual, 2)):
            run("norm_act_sums", grad, x, gate, cu, sites, mean, var, bias, act)
        for slope in (None, var):
            run("norm_act_backward", grad, x, cu, sites, mean, var, bias, slope, slope, 1)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(where, dynamic):
    backend, device = where
    mean, var = torch.zeros(6, device=device), torch.ones(6, device=device)

    def step(x, weight, bias):
        y = ops.batch_norm_act(x, weight, bias, mean, var, act="relu", residual=x, backend=backend)
        y = ops.grn(y, None, weight, bias, backend=backend)
        y = ops.group_norm_cells(y, None, 2, weight, bias, backend=backend)
        return (y * ops.segment_sum(y, None, backend=backend)[:, None, None]).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for side in (3, 5):
        inputs = [torch.randn(s, device=device, requires_grad=True) for s in ((2, side, 4, 6), (6,), (6,))]
        results = []
        for function in (compiled, step):
            mean.zero_(), var.fill_(1)
            results.append([*torch.autograd.grad(function(*inputs), inputs), mean.clone(), var.clone()])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)
