"""pack_cells and unpack_cells: maps of both layouts, every cell size, ragged plans; CellMask's neighbour table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import masking, ops
from maefast.ops import CellMask, _registry
from maefast.ops.cells import pack_cells_reference

from .common import assert_close, backends, compare, dtypes_of, property_test

BACKENDS = backends("pack_cells")
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@st.composite
def cell_masks(draw, max_batch: int = 3, max_side: int = 4) -> CellMask:
    """Plans of odd sizes: one cell, non-square grids, ragged counts, samples without any active cell, both orders."""
    batch, rows, columns = draw(st.integers(1, max_batch)), *(draw(st.integers(1, max_side)) for _ in range(2))
    counts = st.integers(0, rows * columns)
    keep = draw(st.one_of(counts, st.lists(counts, min_size=batch, max_size=batch)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    order = draw(st.sampled_from(["score", "position"]))
    tokens = masking.random(batch, rows * columns, keep=keep, generator=generator, order=order, backend="reference")
    return CellMask(tokens, (rows, columns))


@st.composite
def cases(draw):
    """(plan, x packed, generator); cells of 8, 4, 2, 1 or odd numbers of sites."""
    plan = draw(cell_masks())
    h = draw(st.sampled_from([8, 4, 2, 1, 3]))
    w = draw(st.sampled_from([h, h, 1, 5]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return plan, (h, w, draw(st.integers(1, 37))), generator


def ragged(device="cpu") -> CellMask:
    return CellMask(masking.random(3, 12, keep=[5, 0, 12]).to(device), (3, 4))


@given(case=cases())
@property_test
def test_reference_equals_a_loop(case):
    plan, (h, w, channels), generator = case
    (rows, columns), batch = plan.grid, plan.batch
    full = torch.randn(batch, channels, rows * h, columns * w, generator=generator)
    fill = torch.randn(channels, generator=generator)
    packed = ops.pack_cells(full, plan, backend="reference")
    assert tuple(packed.shape) == (plan.total, h, w, channels)
    want = fill[None, :, None, None].expand_as(full).clone()
    for t, cell in enumerate(plan.cells.tolist()):
        b, y, x = cell // (rows * columns), cell // columns % rows, cell % columns
        block = full[b, :, y * h : (y + 1) * h, x * w : (x + 1) * w]
        assert torch.equal(packed[t], block.permute(1, 2, 0))
        want[b, :, y * h : (y + 1) * h, x * w : (x + 1) * w] = block
    assert torch.equal(ops.unpack_cells(packed, plan, fill, backend="reference"), want)
    active = plan.upsampled_mask((rows * h, columns * w))
    assert torch.equal(ops.unpack_cells(packed, plan, backend="reference"), full * active)


@pytest.mark.parametrize("where", BACKENDS)
@given(case=cases(), data=st.data())
@property_test
def test_pack_and_its_gradient(where, case, data):
    backend, device = where
    plan, (h, w, channels), generator = case
    full = torch.randn(plan.batch, channels, plan.grid[0] * h, plan.grid[1] * w, generator=generator)
    layout = data.draw(st.sampled_from(LAYOUTS))

    def call(backend, device, x):
        return ops.pack_cells(x.contiguous(memory_format=layout), plan.to(device), backend=backend)

    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    compare(call, {"x": full}, backend, device, dtype)
    x = full.to(dtype)
    assert torch.equal(call(backend, device, x.to(device)).cpu(), pack_cells_reference(x, plan))


@pytest.mark.parametrize("where", BACKENDS)
@given(case=cases(), data=st.data())
@property_test
def test_unpack_and_every_gradient(where, case, data):
    backend, device = where
    plan, (h, w, channels), generator = case
    inputs = {"x": torch.randn(plan.total, h, w, channels, generator=generator)}
    if data.draw(st.booleans()):
        inputs["fill"] = torch.randn(channels, generator=generator)

    def call(backend, device, x, fill=None):
        return ops.unpack_cells(x, plan.to(device), fill, backend=backend)

    compare(call, inputs, backend, device, data.draw(st.sampled_from(dtypes_of(backend))))


@pytest.mark.parametrize("where", BACKENDS)
def test_layouts(where):
    """The map comes out channels last; pack reads any strides, and its gradient has the layout of x."""
    backend, device = where
    plan = ragged(device)
    full = torch.randn(3, 5, 12, 8, device=device)
    want = pack_cells_reference(full, plan)
    wide = torch.randn(3, 5, 12, 16, device=device)
    wide[..., ::2] = full
    for x in (full, full.contiguous(memory_format=torch.channels_last), full.transpose(2, 3).contiguous().mT):
        assert torch.equal(ops.pack_cells(x, plan, backend=backend), want)
    assert torch.equal(ops.pack_cells(wide[..., ::2], plan, backend=backend), want)
    out = ops.unpack_cells(want, plan, backend=backend)
    assert out.is_contiguous(memory_format=torch.channels_last)
    if backend != "reference":
        x = full.contiguous(memory_format=torch.channels_last).requires_grad_()
        (grad,) = torch.autograd.grad(ops.pack_cells(x, plan, backend=backend).square().sum(), x)
        assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("where", BACKENDS)
def test_many_masked_sites_sum_well(where):
    """The gradient of a mask token: a sum over many sites, the same for every run; a 16-bit x, a float32 token."""
    backend, device = where
    plan = CellMask(masking.random(4, 49, keep=[20, 20, 3, 0]).to(device), (7, 7))
    x = torch.randn(plan.total, 8, 8, 24, device=device, dtype=torch.bfloat16, requires_grad=True)
    token = torch.randn(1, 24, 1, 1, device=device)[:, :, 0, 0].requires_grad_()
    grad = (torch.rand(4, 24, 56, 56, device=device) + 1).bfloat16().contiguous(memory_format=torch.channels_last)
    runs = []
    for _ in range(2):
        out = ops.unpack_cells(x, plan, token, backend=backend)
        assert out.dtype is torch.bfloat16
        runs.append([out, *torch.autograd.grad(out, [x, token], grad)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    masked = ~plan.upsampled_mask((56, 56))
    want = (grad.double() * masked).sum((0, 2, 3))
    assert runs[0][2].shape == token.shape
    assert_close(runs[0][2][0], want, torch.float32 if backend != "reference" else torch.bfloat16)


def test_neighbours_by_hand():
    plan = ragged()
    slot = {cell: t for t, cell in enumerate(plan.cells.tolist())}
    for radius in (0, 1, 2):
        table = plan.neighbours(radius)
        assert table.dtype is torch.int32
        assert plan.neighbours(radius) is table
        for cell, t in slot.items():
            b, y, x = cell // 12, cell // 4 % 3, cell % 4
            want = []
            for dy in range(-radius, radius + 1):
                for dx in range(-radius, radius + 1):
                    inside = 0 <= y + dy < 3 and 0 <= x + dx < 4
                    want.append(slot.get(b * 12 + (y + dy) * 4 + x + dx, -1) if inside else -2)
            assert table[t].tolist() == want
    with pytest.raises(ValueError, match="radius"):
        plan.neighbours(-1)


def test_tables_made_in_inference_mode_are_made_again():
    """The gradient of what reads them keeps them, which an inference tensor does not allow."""
    plan, x = ragged(), torch.randn(ragged().total, 4, 4, 8)
    weight = torch.randn(8, 8, 3, 3, requires_grad=True)
    with torch.inference_mode():
        first = ops.conv_cells(x, plan, weight, padding=1)
        table, coarse = plan.neighbours(), plan.coarser((2, 2))
        assert plan.neighbours() is table
        assert plan.coarser((2, 2)) is coarse
    out = ops.conv_cells(x, plan, weight, padding=1)
    out.sum().backward()
    assert torch.equal(out, first)
    assert torch.equal(plan.neighbours(), table)
    assert not plan.neighbours().is_inference()
    assert not plan.coarser((2, 2)).cells.is_inference()
    with torch.inference_mode():
        assert not plan.neighbours().is_inference()


def test_cell_mask():
    masked = torch.rand(2, 3, 4) < 0.5
    plan = CellMask.from_bool(masked)
    assert torch.equal(plan.mask, masked)
    assert plan.total == int((~masked).sum())
    assert plan.cu_cells.tolist() == [0, int((~masked[0]).sum()), plan.total]
    assert torch.equal(CellMask.all_visible(2, (3, 4)).mask, torch.zeros(2, 3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="does not fit a grid"):
        CellMask(masking.random(2, 12, 0.5), (3, 5))


X, MAP = torch.randn(17, 2, 2, 3), torch.randn(3, 3, 6, 8)
BAD = [
    (lambda: ops.pack_cells(MAP, ragged().tokens), TypeError, "CellMask"),
    (lambda: ops.pack_cells(MAP[0], ragged()), ValueError, "4 dimensions"),
    (lambda: ops.pack_cells(MAP[:2], ragged()), ValueError, "must be a map"),
    (lambda: ops.pack_cells(MAP[:, :, :5], ragged()), ValueError, "multiple of the grid"),
    (lambda: ops.pack_cells(MAP[:, :, :, :2], ragged()), ValueError, "multiple of the grid"),
    (lambda: ops.pack_cells(MAP.int(), ragged()), TypeError, "float32"),
    (lambda: ops.pack_cells(MAP.to("meta"), ragged()), ValueError, "one device"),
    (lambda: ops.unpack_cells(X[:5], ragged()), ValueError, "packed cells"),
    (lambda: ops.unpack_cells(X[0], ragged()), ValueError, "4 dimensions"),
    (lambda: ops.unpack_cells(X, ragged(), torch.ones(4)), ValueError, "fill must hold 3"),
    (lambda: ops.unpack_cells(X, ragged(), torch.ones(3, device="meta")), ValueError, "one device"),
    (lambda: ops.unpack_cells(X, ragged(), 0.0), TypeError, "fill must be"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("where", backends("pack_cells", reference=False))
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(where, channels_last):
    backend, device = where
    plan = ragged(device)
    full = torch.rand(3, 6, 8, 5, device=device) if channels_last else torch.rand(3, 5, 6, 8, device=device)
    torch.library.opcheck(_registry.raw("pack_cells", backend), (full, plan.cells, [3, 4], channels_last))
    x = torch.rand(17, 2, 2, 5, device=device)
    for fill in (None, torch.rand(5, device=device)):
        args = (x, plan.slot, [3, 3, 4], fill, channels_last)
        torch.library.opcheck(_registry.raw("unpack_cells", backend), args)
    if channels_last:
        torch.library.opcheck(_registry.raw("fill_sum", backend), (full, plan.slot, [3, 3, 4]))


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(where, dynamic):
    backend, device = where

    def step(x, fill, noise):
        plan = CellMask(masking.random(x.shape[0], 12, keep=5, noise=noise, backend=backend), (3, 4))
        packed = ops.pack_cells(x, plan, backend=backend)
        return ops.unpack_cells(packed.square(), plan, fill, backend=backend).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        inputs = [torch.randn(s, device=device, requires_grad=True) for s in ((batch, 5, 6, 8), (5,))]
        noise = torch.rand(batch, 12, device=device)
        got = torch.autograd.grad(compiled(*inputs, noise), inputs)
        want = torch.autograd.grad(step(*inputs, noise), inputs)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("where", backends("pack_cells", reference=False))
def test_a_broken_plan_is_refused(where):
    backend, device = where
    if device != "cpu":
        pytest.skip("only the CPU kernels check the content of a plan")
    bad = torch.tensor([0, 36], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="out of range"):
        _registry.raw("pack_cells", backend)(torch.rand(3, 6, 8, 2), bad, [3, 4], True)
    with pytest.raises(RuntimeError, match="out of range"):
        _registry.raw("unpack_cells", backend)(X[:5], ragged().slot, [3, 3, 4], None, True)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("w", [5, 8, 16, 19, 32, 35])
def test_images_of_three_channels(where, w):
    """Their rows go through registers a few sites at a time: whole registers, and what is left of one."""
    backend, device = where
    plan = ragged(device)
    for dtype in dtypes_of(backend):
        for layout in LAYOUTS:
            full = torch.randn(3, 3, 3 * 6, 4 * w).to(device, dtype).contiguous(memory_format=layout)
            packed = ops.pack_cells(full, plan, backend=backend)
            assert torch.equal(packed, pack_cells_reference(full, plan))
            out = ops.unpack_cells(packed, plan, backend=backend)
            assert torch.equal(out, full * plan.upsampled_mask(full.shape[2:]).to(dtype))
            grad = torch.autograd.grad(ops.pack_cells(full.requires_grad_(), plan, backend=backend), full, packed)[0]
            assert torch.equal(grad, out)
