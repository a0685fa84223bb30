"""Cells of volumes: packing, convolutions, pools and norms with a third side, against the dense ops times the mask."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maefast import masking, ops
from maefast.ops import CellMask, _conv_table, _dispatch, _registry
from tests.budget import examples

from .common import assert_close, backends, compare, dtypes_of, property_test

CPU = [where for where in backends("pack_cells") if where.id in ("reference", "cpu")]
KERNELS = [where for where in CPU if where.id == "cpu"]


@st.composite
def cell_masks(draw) -> CellMask:
    """Plans of odd sizes: one cell, grids that are no cubes, ragged counts, samples without any active cell."""
    batch, grid = draw(st.integers(1, 3)), tuple(draw(st.integers(1, 3)) for _ in range(3))
    counts = st.integers(0, grid[0] * grid[1] * grid[2])
    keep = draw(st.one_of(counts, st.lists(counts, min_size=batch, max_size=batch)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return masking.cells(batch, grid, keep=keep, generator=generator)


@st.composite
def cases(draw):
    """(plan, [d, h, w, C], generator)."""
    plan = draw(cell_masks())
    sites = tuple(draw(st.sampled_from([4, 2, 1, 3])) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return plan, (*sites, draw(st.integers(1, 19))), generator


def ragged_plan() -> CellMask:
    """Four samples: some cells, all, none, one."""
    masked = torch.rand(4, 2, 3, 2, generator=torch.Generator().manual_seed(3)) > 0.5
    masked[1], masked[2], masked[3] = False, True, True
    masked[3, 1, 0, 1] = False
    return CellMask.from_bool(masked)


PLAN = ragged_plan()


def blocks(plan, sites):
    """(packed index, sample, where in the map) of every active cell, by counting."""
    cells = list(itertools.product(range(plan.batch), *map(range, plan.grid)))
    for t, flat in enumerate(plan.cells.tolist()):
        b, *at = cells[flat]
        yield t, b, tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, sites))


def map_by_hand(x, plan):
    full = torch.zeros(plan.batch, x.shape[-1], *(g * n for g, n in zip(plan.grid, x.shape[1:-1])), dtype=x.dtype)
    for t, b, where in blocks(plan, x.shape[1:-1]):
        full[(b, slice(None), *where)] = x[t].movedim(-1, 0)
    return full


def pack_by_hand(full, plan):
    sites = [n // g for n, g in zip(full.shape[2:], plan.grid)]
    parts = [full[(b, slice(None), *where)].movedim(0, -1) for _, b, where in blocks(plan, sites)]
    return torch.stack(parts) if parts else full.new_zeros(0, *sites, full.shape[1])


# --- cells ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", CPU)
@given(case=cases(), filled=st.booleans())
@property_test
def test_packing_equals_a_loop(where, case, filled):
    backend, _ = where
    plan, (*sites, channels), generator = case
    size = [g * n for g, n in zip(plan.grid, sites)]
    full = torch.randn(plan.batch, channels, *size, generator=generator)
    want = pack_by_hand(full, plan)
    wide = torch.randn(plan.batch, channels, *size[:2], 2 * size[2])
    wide[..., ::2] = full
    for x in (full, full.contiguous(memory_format=torch.channels_last_3d), wide[..., ::2]):
        assert torch.equal(ops.pack_cells(x, plan, backend=backend), want)
        assert torch.equal(ops.pack_cells(x.bfloat16(), plan, backend=backend), want.bfloat16())
    fill = torch.randn(channels, generator=generator) if filled else None
    back = ops.unpack_cells(want, plan, fill, backend=backend)
    assert backend == "reference" or back.is_contiguous(memory_format=torch.channels_last_3d)
    keep = plan.upsampled_mask(size)
    assert torch.equal(back, torch.where(keep, full, 0.0 if fill is None else fill[:, None, None, None]))
    assert torch.equal(keep[:, 0], map_by_hand(torch.ones_like(want[..., :1]), plan)[:, 0].bool())


@pytest.mark.parametrize("where", KERNELS)
@given(case=cases(), data=st.data())
@property_test
def test_gradients_of_packing(where, case, data):
    backend, device = where
    plan, (*sites, channels), generator = case
    full = torch.randn(plan.batch, channels, *(g * n for g, n in zip(plan.grid, sites)), generator=generator)
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    if data.draw(st.booleans()):
        full = full.contiguous(memory_format=torch.channels_last_3d)
    compare(lambda b, d, x: ops.pack_cells(x, plan, backend=b), {"x": full}, backend, device, dtype)
    inputs = {"x": pack_by_hand(full, plan), "fill": torch.randn(channels, generator=generator)}
    compare(lambda b, d, x, fill: ops.unpack_cells(x, plan, fill, backend=b), inputs, backend, device, dtype)


def test_neighbours_by_hand():
    slot = {cell: t for t, cell in enumerate(PLAN.cells.tolist())}
    cells = list(itertools.product(range(PLAN.batch), *map(range, PLAN.grid)))
    for radius in (0, 1, 2):
        table, steps = PLAN.neighbours(radius), range(-radius, radius + 1)
        assert table.dtype is torch.int32
        for cell, t in slot.items():
            b, *at = cells[cell]
            want = []
            for step in itertools.product(steps, steps, steps):
                there = [a + s for a, s in zip(at, step)]
                inside = all(0 <= a < n for a, n in zip(there, PLAN.grid))
                want.append(slot.get(cells.index((b, *there)), -1) if inside else -2)
            assert table[t].tolist() == want


def test_plans():
    masked = torch.rand(2, 3, 4, 2) < 0.5
    plan = CellMask.from_bool(masked)
    assert torch.equal(plan.mask, masked)
    assert plan.sides == 3
    assert plan.cell_size((6, 4, 8)) == (2, 1, 4)
    assert "grid=3x4x2" in repr(plan)
    assert CellMask.all_visible(2, (3, 4, 2)).total == 48
    assert masking.cells(2, (3, 4, 2), 0.75).total == 12


# --- convolutions --------------------------------------------------------------------------------------------------

# (kernel, stride, padding, dilation): those of 3-D ResNets and U-Nets, flat and deep ones, odd ones.
WINDOWS = {
    "1": (1, 1, 0, 1),
    "1 s2": (1, 2, 0, 1),
    "2 s2": (2, 2, 0, 1),
    "3": (3, 1, 1, 1),
    "3 s2": (3, 2, 1, 1),
    "3 d2": (3, 1, 2, 2),
    "5 s2": (5, 2, 2, 1),
    "1x3x3 s(1,2,2)": ((1, 3, 3), (1, 2, 2), (0, 1, 1), 1),
    "3x1x2 s(1,1,2)": ((3, 1, 2), (1, 1, 2), (1, 0, 0), 1),
}
SITES = [(4, 4, 4), (2, 2, 2), (1, 1, 1), (2, 4, 2)]


def three(value):
    return (value,) * 3 if isinstance(value, int) else value


def window_of(window):
    return _conv_table.Window(*map(three, window))


def routes_of(sites, window, groups):
    if any(n % s for n, s in zip(sites, three(window[1]))):
        return []
    call = _conv_table.Call("cpu", torch.float32, sites, window_of(window), groups, 8, 12, False)
    found = [r for r in ("rows", "halo", "taps", "dense") if _conv_table.unavailable(r, call) is None]
    return [None, *found]


def tensors(sites, window, groups, dtype=torch.float64, channels=8, out=12, plan=PLAN):
    generator = torch.Generator().manual_seed(0)
    shapes = (plan.total, *sites, channels), (out, channels // groups, *three(window[0])), (out,)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("name", WINDOWS)
def test_definition_is_dense_times_mask(name):
    _, stride, padding, dilation = window = WINDOWS[name]
    x, weight, bias = tensors((4, 2, 4), window, 2)
    out = ops.conv_cells(x, PLAN, weight, bias, stride, padding, dilation, 2, backend="reference")
    dense = F.conv3d(map_by_hand(x, PLAN), weight, bias, stride, padding, dilation, 2)
    torch.testing.assert_close(out, pack_by_hand(dense, PLAN), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", WINDOWS)
def test_every_route_and_gradient(where, name, groups):
    backend, _ = where
    window = WINDOWS[name]
    args = (*window[1:], groups)
    for sites, dtype in itertools.product(SITES, dtypes_of(backend)):
        values = tensors(sites, window, groups, dtype)
        for route in routes_of(sites, window, groups):
            low = [v.clone().requires_grad_() for v in values]
            high = [v.double().requires_grad_() for v in values]
            out = ops.conv_cells(low[0], PLAN, *low[1:], *args, route=route, backend=backend)
            want = ops.conv_cells(high[0], PLAN, *high[1:], *args, backend="reference")
            assert out.dtype is dtype
            assert out.is_contiguous()
            assert_close(out, want, dtype)
            grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            grads = torch.autograd.grad(out, low, grad)
            for what, got, ref in zip(("x", "weight", "bias"), grads, torch.autograd.grad(want, high, grad.double())):
                assert_close(got, ref, dtype, f"gradient of {what}, route {route}")


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("stride", [1, 2])
def test_raw_gradients_are_the_transposes(where, stride):
    """<halo(x), g> = <x, halo_backward(g)> with whole numbers: exact."""
    backend, _ = where
    for sites, k in (((4, 2, 2), 3), ((2, 2, 2), 5), ((2, 4, 2), 7)):
        window = window_of((k, stride, k // 2, 1))
        table = PLAN.neighbours(window.radius(sites))
        x = torch.randint(-3, 4, (PLAN.total, *sites, 20)).float()
        for op, args, back in (("halo_cells", (window.halo(),), ()), ("gather_taps", tuple(window), (x.shape[1:],))):
            y = _registry.raw(op, backend)(x, table, *args)
            g = torch.randint(-3, 4, y.shape).float()
            grad = _registry.raw(op + "_backward", backend)(g, table, *back, *args)
            assert grad.shape == x.shape
            assert (y * g).sum() == (x * grad).sum()


# (kernel, stride, padding, output_padding, dilation)
TRANSPOSED = {
    "2 s2": (2, 2, 0, 0, 1),
    "3 s2": (3, 2, 1, 1, 1),
    "4 s2": (4, 2, 1, 0, 1),
    "1x2x2 s(1,2,2)": ((1, 2, 2), (1, 2, 2), 0, 0, 1),
    "3 s(1,2,1) d2": (3, (1, 2, 1), (2, 2, 2), (0, 1, 0), 2),
}


@pytest.mark.parametrize("where", [*KERNELS, ("chosen", "cpu"), ("reference", "cpu")])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("window", TRANSPOSED.values(), ids=TRANSPOSED)
def test_transposed(where, window, groups):
    backend = None if where[0] == "chosen" else where[0]
    x, kernel, bias = tensors((2, 1, 3), window, 1)
    weight = torch.randn(8, 12 // groups, *kernel.shape[2:], generator=torch.Generator().manual_seed(2)).double()
    args = (*window[1:4], groups, window[4])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out = ops.conv_transpose_cells(x, PLAN, weight, bias, *args, backend=backend)
    dense = pack_by_hand(F.conv_transpose3d(map_by_hand(x, PLAN), weight, bias, *args), PLAN)
    torch.testing.assert_close(out, dense, rtol=1e-11, atol=1e-11)
    grad = torch.randn_like(out)
    for got, want in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(dense, leaves, grad)):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_runs_agree_bit_for_bit_and_without_active_cells():
    nothing = CellMask.from_bool(torch.ones(2, 2, 1, 2, dtype=torch.bool))
    for name, route in (("3", "halo"), ("3", "taps"), ("3 s2", "halo"), ("3 s2", "taps"), ("2 s2", "rows")):
        window = WINDOWS[name]
        for plan in (PLAN, nothing):
            runs = []
            for _ in range(2):
                values = [t.requires_grad_() for t in tensors((4, 4, 4), window, 1, torch.float32, plan=plan)]
                out = ops.conv_cells(values[0], plan, *values[1:], *window[1:], route=route)
                runs.append([out, *torch.autograd.grad(out.square().sum(), values)])
            assert all(torch.equal(a, b) for a, b in zip(*runs))
        assert out.shape[0] == 0
        assert not any(g.any() for g in runs[0][1:])


def test_autocast():
    values = [v.requires_grad_() for v in tensors((4, 4, 4), WINDOWS["3"], 1, torch.float32)]
    for route in ("halo", "taps", "dense"):
        with torch.autocast("cpu", torch.bfloat16):
            out = ops.conv_cells(values[0], PLAN, *values[1:], 1, 1, route=route)
        want = ops.conv_cells(*(v.double() if v is not PLAN else v for v in (values[0], PLAN, *values[1:])), 1, 1)
        assert out.dtype is torch.bfloat16
        assert_close(out, want, torch.bfloat16)
        assert all(g.dtype is torch.float32 for g in torch.autograd.grad(out.sum(), values))


# --- what oneDNN gets wrong ----------------------------------------------------------------------------------------


@st.composite
def narrow_maps(draw, transposed: bool):
    """(plan, sites of a cell, kernel, stride, padding, dilation): few sites, under kernels of up to 8."""
    sides = draw(st.integers(2, 3))
    each = lambda *values: tuple(draw(st.sampled_from(values)) for _ in range(sides))  # noqa: E731
    masked = torch.ones(3, *each(1, 1, 2), dtype=torch.bool)
    masked[0], masked[2].view(-1)[0] = False, False
    sites, kernel, dilation = each(1, 2, 3, 4), each(1, 2, 3, 4, 5, 7), each(1, 1, 1, 2, 3, 40)
    stride = tuple(draw(st.sampled_from([s for s in (1, 2, 3) if transposed or n % s == 0])) for n in sites)
    odd = [s == 1 and d * (k - 1) % 2 for k, s, d in zip(kernel, stride, dilation)]  # no padding keeps their number
    kernel = tuple(k + o for k, o in zip(kernel, odd))
    padding = tuple(max(0, (d * (k - 1) + 2 - s) // 2) for k, s, d in zip(kernel, stride, dilation))
    return CellMask.from_bool(masked), sites, kernel, stride, padding, dilation


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("transposed", [False, True])
@given(data=st.data())
@settings(property_test, max_examples=examples(50, 200))
def test_kernels_longer_than_their_maps(where, transposed, data):
    """oneDNN's weight gradients are wrong there, or it crashes. Small whole numbers: only the result is rounded."""
    backend, _ = where
    plan, sites, kernel, stride, padding, dilation = data.draw(narrow_maps(transposed))
    added = tuple(s - 1 - d * (k - 1) + 2 * p for k, s, p, d in zip(kernel, stride, padding, dilation))
    dtype, groups = data.draw(st.sampled_from(dtypes_of(backend))), data.draw(st.sampled_from([1, 1, 2]))
    ci, co = (data.draw(st.sampled_from([2, 8, 16])) for _ in range(2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    ones = lambda *shape: torch.randint(-1, 2, shape, generator=generator).to(dtype)  # noqa: E731
    values = ones(plan.total, *sites, ci), ones(*((ci, co // groups) if transposed else (co, ci // groups)), *kernel)
    values = *values, ones(co)
    sides = len(sites)
    if transposed:
        call, how = ops.conv_transpose_cells, (stride, padding, added, groups, dilation)
        dense = F.conv_transpose2d if sides == 2 else F.conv_transpose3d
    else:
        call, how, dense = ops.conv_cells, (stride, padding, dilation, groups), F.conv2d if sides == 2 else F.conv3d
    high = [v.double().requires_grad_() for v in values]
    want = pack_by_hand(dense(map_by_hand(high[0], plan), *high[1:], *how), plan)
    grad = ones(*want.shape)
    wanted = torch.autograd.grad(want, high, grad.double())
    for chosen in ({"route": "dense", "backend": backend}, {"backend": backend}, {"backend": "reference"}):
        low = [v.clone().requires_grad_() for v in values]
        out = call(low[0], plan, *low[1:], *how, **chosen)
        assert_close(out, want, dtype)
        for what, got, ref in zip(("x", "weight", "bias"), torch.autograd.grad(out, low, grad), wanted):
            assert_close(got, ref, dtype, f"gradient of {what}, {chosen}")


# --- pools and norms -----------------------------------------------------------------------------------------------

POOLS = [(2, 2, 0), (3, 2, 1), (3, 1, 1), ((1, 3, 2), (1, 1, 2), (0, 1, 0)), ((4, 1, 3), (4, 1, 1), (0, 0, 1))]


@pytest.mark.parametrize("where", CPU)
@pytest.mark.parametrize("window", POOLS, ids=str)
def test_pools(where, window):
    backend, _ = where
    for sites, dtype in itertools.product([(4, 4, 4), (4, 2, 2)], dtypes_of(backend)):
        x = torch.randn(PLAN.total, *sites, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
        x = torch.where(x < -0.5, 0, x)  # ties with masked sites
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        low, high = (x.clone().requires_grad_(), x.to(wide).requires_grad_())
        out = ops.max_pool_cells(low, PLAN, *window, backend=backend)
        want = pack_by_hand(F.max_pool3d(map_by_hand(high, PLAN), *window), PLAN)
        assert torch.equal(out, want.to(dtype))
        grad = torch.randint(-3, 4, out.shape).to(dtype)
        got, ref = torch.autograd.grad(out, low, grad)[0], torch.autograd.grad(want, high, grad.to(wide))[0]
        assert torch.equal(got, ref.to(dtype))
        for include in (True, False):
            low, high = (x.clone().requires_grad_(), x.double().requires_grad_())
            out = ops.avg_pool_cells(low, PLAN, *window, include, backend=backend)
            dense = F.avg_pool3d(map_by_hand(high, PLAN), *window, count_include_pad=include)
            want = pack_by_hand(dense, PLAN)
            assert_close(out, want, dtype)
            got, ref = torch.autograd.grad(out, low, grad)[0], torch.autograd.grad(want, high, grad.double())[0]
            assert_close(got, ref, dtype, "gradient")


NORMS = {
    "batch": lambda x, plan, w, b, **kw: ops.batch_norm_act(x, w, b, act="relu", **kw),
    "group": lambda x, plan, w, b, **kw: ops.group_norm_cells(x, plan, 2, w, b, **kw),
    "instance": lambda x, plan, w, b, **kw: ops.instance_norm_cells(x, plan, w, b, **kw),
    "grn": lambda x, plan, w, b, **kw: ops.grn(x, plan, w, b, **kw),
    "sum": lambda x, plan, w, b, **kw: ops.segment_sum(x, plan, **kw) * w + b,
    "mean": lambda x, plan, w, b, backend: ops.global_pool_cells(x, plan, backend=backend) * w + b,
}


@pytest.mark.parametrize("where", CPU)
@pytest.mark.parametrize("name", NORMS)
def test_norms_are_those_of_the_sites_in_two_sides(where, name):
    """The same sites in a map of two sides have the same statistics."""
    backend, _ = where
    flat = CellMask(PLAN.tokens, (1, PLAN.tokens.num_tokens))
    x = torch.randn(PLAN.total, 2, 3, 2, 8, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    weight, bias = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    results = []
    for plan, cells in ((PLAN, x), (flat, x.flatten(1, 2))):
        out = NORMS[name](cells, plan, weight, bias, backend=backend)
        results.append([out.flatten(), *torch.autograd.grad(out.square().sum(), (x, weight, bias))])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# --- whole networks' needs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", KERNELS)
def test_opcheck(where):
    backend, _ = where
    check = lambda op, *args: torch.library.opcheck(_registry.raw(op, backend), args)  # noqa: E731
    table, x = PLAN.neighbours(1), torch.randn(PLAN.total, 2, 4, 2, 3)
    full = torch.rand(4, 4, 12, 4, 3)
    check("pack_cells", full, PLAN.cells, [2, 3, 2], True)
    check("unpack_cells", x, PLAN.slot, [4, 2, 3, 2], torch.rand(3), False)
    check("fill_sum", full, PLAN.slot, [4, 2, 3, 2])
    check("halo_cells", x, table, (1, 1, 0, 0, 1, 1))
    check("halo_cells_backward", torch.randn(PLAN.total, 3, 6, 3, 3), table, (1, 1, 0, 0, 1, 1))
    window = ((3, 3, 1), (2, 1, 1), (1, 1, 0), (1, 1, 1))
    check("gather_taps", x, table, *window)
    check("gather_taps_backward", torch.randn(PLAN.total * 8, 27), table, (2, 4, 2, 3), *window)
    pool = ((3, 3, 2), (2, 1, 2), (1, 1, 0))
    check("max_pool_cells", x, table, *pool)
    y = torch.randn(PLAN.total, 1, 4, 1, 3)
    check("max_pool_cells_backward", y, torch.zeros(y.shape, dtype=torch.uint8), table, *pool)
    check("avg_pool_cells", x, table, *pool, False)
    check("avg_pool_cells_backward", y, table, *pool, False)


def test_compiles_whole():
    def step(volumes, weight, fill, noise):
        plan = masking.cells(volumes.shape[0], (2, 1, 2), keep=2, noise=noise)
        x = ops.pack_cells(volumes, plan)
        x = ops.conv_cells(x, plan, weight, None, 1, 1, route="halo")
        x = ops.max_pool_cells(ops.conv_cells(x, plan, weight, None, 1, 1, route="taps"), plan, 3, 2, 1)
        return ops.unpack_cells(x, plan, fill).square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        inputs = [torch.randn(s, requires_grad=True) for s in ((batch, 4, 8, 4, 8), (4, 4, 3, 3, 3), (4,))]
        noise = torch.rand(batch, 4)
        got = torch.autograd.grad(compiled(*inputs, noise), inputs)
        for a, b in zip(got, torch.autograd.grad(step(*inputs, noise), inputs)):
            torch.testing.assert_close(a, b)


def test_gpu_kernels_of_two_sides_are_never_chosen():
    for op in ("pack_cells", "unpack_cells", "max_pool_cells", "halo_cells", "gather_taps"):
        assert _dispatch.choose(op, "cuda", torch.float32, solid=True) in ("reference", _dispatch.forced())
        with pytest.raises(RuntimeError, match="maps of two sides, not of three"):
            _dispatch.choose(op, "cuda", torch.float32, "triton", solid=True)
    call = _conv_table.Call("cuda", torch.float32, (8, 8, 8), window_of(WINDOWS["3"]), 1, 8, 8, False)
    if _dispatch.forced() is None:
        assert _conv_table.choose(call, None, None) == ("reference", "dense")
    assert "two sides" in _conv_table.unavailable("implicit", call)


X = torch.randn(PLAN.total, 4, 4, 4, 6)
FLAT = CellMask.all_visible(1, (2, 2))


def conv(*shape, x=X, plan=PLAN, **options):
    return lambda: ops.conv_cells(x, plan, torch.randn(*shape), **options)


BAD = [
    (conv(8, 6, 3, 3, padding=1), ValueError, "weight must have 5 dimensions"),
    (conv(8, 5, 3, 3, 3, padding=1), ValueError, r"takes 5 channels, but x has 6 \(packed cells are \[T, d, h, w, C\]"),
    (conv(8, 6, 3, 3, 3), ValueError, "a 3x3x3 convolution.*padding 1 does"),
    (conv(8, 6, 3, 3, 3, padding=1, stride=(3, 1, 1)), ValueError, "stride 3 does not divide the depth 4 of a cell"),
    (conv(8, 6, 3, 3, 3, padding=(1, 1)), ValueError, "padding must be an int or three ints"),
    (conv(8, 6, 3, 3, 3, padding=1, route="rows"), ValueError, "front, top, left, back"),
    (conv(8, 6, 3, 3, 3, padding=1, route="implicit"), ValueError, "two sides"),
    (conv(8, 6, 3, 3, padding=1, plan=FLAT), ValueError, "x must have 4 dimensions"),
    (conv(8, 6, 3, 3, padding=1, x=X[:, 0]), ValueError, "x must have 5 dimensions"),
    (conv(8, 6, 9, 9, 9, padding=4, x=X[:, :1, :1, :1], route="taps"), ValueError, "more than 3 cells away"),
    (lambda: ops.pack_cells(torch.randn(4, 3, 6, 4), PLAN), ValueError, "x must have 5 dimensions"),
    (lambda: ops.pack_cells(torch.randn(4, 3, 4, 6, 5), PLAN), ValueError, "4 x 6 x 5 sites are no multiple"),
    (lambda: ops.pack_cells(torch.randn(3, 3, 4, 6, 4), PLAN), ValueError, r"must be a map \[4, C, D, H, W\]"),
    (lambda: ops.unpack_cells(X[:2], PLAN), ValueError, r"packed cells \[\d+, d, h, w, C\]"),
    (lambda: ops.depthwise_cells(X, PLAN, torch.randn(6, 1, 3, 3)), ValueError, "takes maps of two sides"),
    (lambda: ops.max_pool_cells(X, PLAN, 3, 3, 1), ValueError, "cells of 4 x 4 x 4 sites cannot be pooled"),
    (lambda: ops.max_pool_cells(X, PLAN, (7, 7, 7), 1, 3), ValueError, "at most 255 sites here, got 7 x 7 x 7"),
    (lambda: ops.avg_pool_cells(X, PLAN, (2, 2)), ValueError, "kernel must be an int or three ints"),
    (lambda: ops.conv_transpose_cells(X, PLAN, torch.randn(6, 4, 2, 2), None, 2), ValueError, "5 dimensions"),
    (lambda: ops.conv_transpose_cells(X, PLAN, torch.randn(6, 4, 3, 3, 3), None, 2), ValueError, "lies on no cells"),
    (lambda: ops.conv_transpose_cells(X, PLAN, torch.randn(5, 4, 2, 2, 2), None, 2), ValueError, "kd, kh, kw"),
    (lambda: masking.cells(2, (2, 2, 2, 2), 0.5), TypeError, "grid_size must be two ints.*or three"),
    (lambda: CellMask.all_visible(2, (2,)), TypeError, "or three"),
    (lambda: CellMask(PLAN.tokens, (3, 2, 3)), ValueError, "does not fit a grid of 3 x 2 x 3"),
    (lambda: CellMask(PLAN.tokens, (3, 2, 2, 1)), ValueError, "two or three sides"),
    (lambda: PLAN.cell_size((4, 6)), ValueError, "does not fit a grid"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("where", KERNELS)
def test_broken_tables_raise(where):
    backend, _ = where
    table = PLAN.neighbours(1).clone()
    table[0] = PLAN.total
    for op, args in (("halo_cells", ((1,) * 6,)), ("max_pool_cells", ((3,) * 3, (1,) * 3, (1,) * 3))):
        with pytest.raises(RuntimeError, match="out of range"):
            _registry.raw(op, backend)(X, table, *args)
    with pytest.raises(RuntimeError, match="beyond the neighbour table"):
        _registry.raw("halo_cells", backend)(X, PLAN.neighbours(1), (5, 1, 1, 1, 1, 1))
    with pytest.raises(RuntimeError, match="beyond the table of neighbours"):
        _registry.raw("avg_pool_cells", backend)(X, PLAN.neighbours(0), (3,) * 3, (1,) * 3, (1,) * 3, True)
    with pytest.raises(RuntimeError, match="neighbours must be"):
        _registry.raw("halo_cells", backend)(X, table[:, :9].contiguous(), (1,) * 6)
    with pytest.raises(RuntimeError, match="out of range"):
        _registry.raw("pack_cells", backend)(torch.rand(4, 4, 6, 4, 2), PLAN.cells + 999, [2, 3, 2], True)
