"""conv_transpose_cells against the dense transposed convolution of the masked map, forward and all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import maefast
from maefast import ops
from maefast.ops import CellMask

from .common import assert_close, backends, dtypes_of
from .test_sparse_conv import ragged_plan

HAVE = backends("halo_cells", reference=False, cuda=False)
# (kernel, stride, padding, output_padding, dilation): those of U-Nets and of SparK's decoder, and odd ones.
WINDOWS = {
    "2x2 s2": (2, 2, 0, 0, 1),
    "4x4 s4": (4, 4, 0, 0, 1),
    "3x3 s2": (3, 2, 1, 1, 1),
    "4x4 s2": (4, 2, 1, 0, 1),
    "3x3": (3, 1, 1, 0, 1),
    "1x1": (1, 1, 0, 0, 1),
    "1x1 s2": (1, 2, 0, 1, 1),
    "6x6 s2": (6, 2, 2, 0, 1),
    "7x7 s3": (7, 3, 2, 0, 1),
    "3x3 s2 d2": (3, 2, 2, 1, 2),
    "2x4 s(2,1) d(1,2)": ((2, 4), (2, 1), (0, 3), 0, (1, 2)),
}
SIZES = [(4, 4), (1, 1), (2, 3)]
PLAN = ragged_plan()


def pair(value):
    return (value, value) if isinstance(value, int) else value


def tensors(size, window, groups, dtype, channels=12, out=18):
    generator = torch.Generator().manual_seed(0)
    shapes = (PLAN.total, *size, channels), (channels, out // groups, *pair(window[0])), (out,)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def arguments(window, groups):
    return (*window[1:4], groups, window[4])


@pytest.mark.parametrize("where", [*HAVE, ("chosen", "cpu")])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_forward_and_gradients(where, window, groups):
    backend, device = where
    backend = None if backend == "chosen" else backend  # on a CPU the dense route, where windows overlap
    for size, dtype in [(size, dtype) for size in SIZES for dtype in dtypes_of(backend)]:
        values = tensors(size, window, groups, dtype)
        low = [v.to(device).requires_grad_() for v in values]
        high = [v.double().requires_grad_() for v in values]
        args = arguments(window, groups)
        out = ops.conv_transpose_cells(low[0], PLAN.to(device), *low[1:], *args, backend=backend)
        want = ops.conv_transpose_cells(high[0], PLAN, *high[1:], *args, backend="reference")
        assert out.dtype is dtype
        assert out.is_contiguous()
        assert_close(out, want, dtype)
        grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        grads = torch.autograd.grad(out, low, grad.to(device))
        for name, got, ref in zip(("x", "weight", "bias"), grads, torch.autograd.grad(want, high, grad.double())):
            assert got.dtype is dtype
            assert_close(got, ref, dtype, f"gradient of {name}")


ONE_WIDE = [
    (3, 4, 1, 3, 1),
    (2, 2, 0, 0, 1),
    ((4, 2), 2, (1, 0), 0, 1),
    ((5, 2), 4, (1, 0), (1, 2), 1),
    (4, 4, 0, 0, 1),
]


@pytest.mark.parametrize("window", ONE_WIDE, ids=str)
@pytest.mark.parametrize("how", [{}, {"route": "dense"}, {"backend": "reference"}], ids=str)
@pytest.mark.parametrize(("channels", "groups"), [(16, 1), (3, 1), (16, 4)])
def test_maps_one_site_wide(how, window, channels, groups):
    """The gradient of x is a convolution at a stride with results one site wide, which oneDNN by AMX leaves in bfloat16
    as it found them."""
    plan = CellMask.from_bool(torch.zeros(2, 5, 1, dtype=torch.bool))
    generator = torch.Generator().manual_seed(0)
    shapes = (plan.total, 1, 1, channels), (channels, 16 // groups, *pair(window[0])), (16,)
    values = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    low, high = ([v.to(dtype).requires_grad_() for v in values] for dtype in (torch.bfloat16, torch.float64))
    want = ops.conv_transpose_cells(high[0], plan, *high[1:], *arguments(window, groups), backend="reference")
    grad = torch.randn(want.shape, generator=generator).bfloat16()
    wanted = torch.autograd.grad(want, high, grad.double())
    for _ in range(3):  # the memory that is found differs
        out = ops.conv_transpose_cells(low[0], plan, *low[1:], *arguments(window, groups), **how)
        assert_close(out, want, torch.bfloat16)
        dirty = [torch.full(values[0].shape, 1e30, dtype=torch.bfloat16) for _ in range(8)]
        del dirty
        for name, got, ref in zip(("x", "weight", "bias"), torch.autograd.grad(out, low, grad), wanted):
            assert_close(got, ref, torch.bfloat16, f"gradient of {name}")


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_definition_is_dense_times_mask(window):
    x, weight, bias = tensors((2, 3), window, 2, torch.float64)
    sides = pair(window[1])
    for backend in ("reference", None):
        out = ops.conv_transpose_cells(x, PLAN, weight, bias, *arguments(window, 2), backend=backend)
        full = F.conv_transpose2d(ops.unpack_cells(x, PLAN), weight, bias, *arguments(window, 2))
        got = ops.unpack_cells(out, PLAN)
        for b in range(PLAN.batch):
            for cell in range(12):
                r, c, h, w = cell // 4, cell % 4, 2 * sides[0], 3 * sides[1]
                where = (b, slice(None), slice(r * h, (r + 1) * h), slice(c * w, (c + 1) * w))
                want = torch.zeros_like(full[where]) if PLAN.mask[b, r, c] else full[where]
                torch.testing.assert_close(got[where], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["2x2 s2", "4x4 s4", "1x1", "1x1 s2"])
def test_kernel_up_to_the_stride_reads_no_neighbour(name):
    x, weight, bias = tensors((2, 3), WINDOWS[name], 1, torch.float64)
    args = arguments(WINDOWS[name], 1)
    out = ops.conv_transpose_cells(x, PLAN, weight, bias, *args, route="rows")
    assert torch.equal(out, ops.conv_transpose_cells(x, PLAN, weight, bias, *args))


def test_runs_are_equal_bit_for_bit():
    def gradients():
        leaves = [t.requires_grad_() for t in tensors((4, 4), WINDOWS["4x4 s2"], 1, torch.float32)]
        out = ops.conv_transpose_cells(leaves[0], PLAN, *leaves[1:], 2, 1)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients()))


def test_autocast_and_no_active_cell():
    x, weight, bias = tensors((2, 2), WINDOWS["2x2 s2"], 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.conv_transpose_cells(x, PLAN, weight, bias, 2).dtype is torch.bfloat16
    nothing = CellMask.from_bool(torch.ones(2, 2, 2, dtype=torch.bool))
    for window in (WINDOWS["2x2 s2"], WINDOWS["4x4 s2"]):
        _, weight, bias = tensors((2, 2), window, 1, torch.float32)
        leaves = [t.requires_grad_() for t in (x[:0].clone(), weight, bias)]
        out = ops.conv_transpose_cells(leaves[0], nothing, *leaves[1:], *arguments(window, 1))
        assert out.shape == (0, 4, 4, 18)
        grads = torch.autograd.grad(out.sum(), leaves)
        assert not any(g.any() for g in grads)


def test_compiles_whole():
    def step(x, plan, weight, bias):
        return ops.conv_transpose_cells(x, plan, weight, bias, 2, 1).square().mean()

    values = [t.requires_grad_() for t in tensors((4, 4), WINDOWS["4x4 s2"], 1, torch.float32)]
    PLAN.neighbours(1)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(values[0], PLAN, *values[1:]), values)
    want = torch.autograd.grad(step(values[0], PLAN, *values[1:]), values)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


X = torch.zeros(PLAN.total, 2, 2, 12)
W, B = torch.zeros(12, 18, 2, 2), torch.zeros(18)


def call(*args, **kwargs):
    return lambda: ops.conv_transpose_cells(X, PLAN, *args, **kwargs)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (call(W, B), ValueError, "lies on no cells"),
        (call(torch.zeros(12, 18, 3, 3), B, 2), ValueError, "must be the stride"),
        (call(W, B, 2, output_padding=2), ValueError, "output_padding 2 must be smaller"),
        (call(W[:6], B, 2), ValueError, "channels in 1 groups"),
        (call(W, B, 2, groups=5), ValueError, "channels in 5 groups"),
        (call(W, B, 2, groups=0), ValueError, "groups must be at least 1"),
        (call(W, B, 2, groups=2), ValueError, r"bias must be \[36\]"),
        (call(W[0], B, 2), ValueError, "weight must have 4 dimensions"),
        (call(W, B, "2"), TypeError, "stride must be an int or two ints"),
        (call(W, B, 2, -1), ValueError, "padding must be at least 0"),
        (call(W.double(), B, 2), TypeError, "weight is torch.float64"),
        (call(W, B.double(), 2), TypeError, "bias is torch.float64"),
        (call(W.to("meta"), B, 2), ValueError, "one device"),
        (call(W, B, 2, route="depthwise"), ValueError, "cannot use it"),
        (call(W, B, 2, backend="gpu"), ValueError, "backend"),
        (lambda: ops.conv_transpose_cells(X[:1], PLAN, W, B, 2), ValueError, "packed cells"),
        (lambda: ops.conv_transpose_cells(X, PLAN.tokens, W, B, 2), TypeError, "CellMask"),
    ],
)
def test_bad_input(run, error, message):
    with pytest.raises(error, match=message):
        run()


def test_the_reference_can_be_forced():
    x, weight, bias = tensors((2, 2), WINDOWS["4x4 s2"], 1, torch.float64)
    with maefast.ops.backend("reference"):
        forced = ops.conv_transpose_cells(x, PLAN, weight, bias, 2, 1)
    torch.testing.assert_close(forced, ops.conv_transpose_cells(x, PLAN, weight, bias, 2, 1), rtol=1e-12, atol=1e-12)
