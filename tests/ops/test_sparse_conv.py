"""conv_cells: every route against the dense convolution of the masked map in float64, forward and all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import maefast
from maefast import ops
from maefast.ops import CellMask, _conv_table, _dispatch, _registry, sparse_conv

from .common import assert_close, backends, dtypes_of

HAVE = backends("halo_cells", reference=False, cuda=False)
# (kernel, stride, padding, dilation): the convolutions of ResNet, ConvNeXt, MobileNet, and odd ones.
WINDOWS = {
    "1x1": (1, 1, 0, 1),
    "1x1 s2": (1, 2, 0, 1),
    "2x2 s2": (2, 2, 0, 1),
    "4x4 s4": (4, 4, 0, 1),
    "3x3": (3, 1, 1, 1),
    "3x3 d2": (3, 1, 2, 2),
    "3x3 s2": (3, 2, 1, 1),
    "3x3 s2 d2": (3, 2, 2, 2),
    "5x5": (5, 1, 2, 1),
    "7x7 s2": (7, 2, 3, 1),
    "4x4 s2": (4, 2, 1, 1),
    "5x5 s4": (5, 4, 1, 1),
    "1x3": ((1, 3), 1, (0, 1), 1),
    "3x1 s(1,2)": ((3, 1), (1, 2), (2, 0), 2),
}
SIZES = [(8, 8), (4, 4), (2, 2), (1, 1), (4, 2), (1, 8)]


def ragged_plan(rows: int = 3, columns: int = 4) -> CellMask:
    """Five samples: some cells, all, none, the border alone, one."""
    masked = torch.rand(5, rows, columns, generator=torch.Generator().manual_seed(3)) > 0.5
    masked[1], masked[2] = False, True
    masked[3] = False
    masked[3, 1:-1, 1:-1] = True
    masked[4] = True
    masked[4, 0, -1] = False
    return CellMask.from_bool(masked)


def pair(value):
    return (value, value) if isinstance(value, int) else value


def tensors(plan, size, window, groups, dtype, channels=12, out=18, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(plan.total, *size, channels, generator=generator)
    weight = torch.randn(out, channels // groups, *pair(window[0]), generator=generator)
    return [t.to(dtype) for t in (x, weight, torch.randn(out, generator=generator))]


def check(plan, values, args, dtype, device="cpu", **options):
    """Output and gradients of conv_cells against the definition in float64."""
    low = [v.to(device).requires_grad_() for v in values]
    high = [v.double().requires_grad_() for v in values]
    out = ops.conv_cells(low[0], plan.to(device), *low[1:], *args, **options)
    want = ops.conv_cells(high[0], plan, *high[1:], *args, backend="reference")
    assert out.dtype is dtype
    assert out.is_contiguous()
    assert_close(out, want, dtype)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(out, low, grad.to(device))
    for name, got, ref in zip(("x", "weight", "bias"), grads, torch.autograd.grad(want, high, grad.double())):
        assert got.dtype is dtype
        assert_close(got, ref, dtype, f"gradient of {name}")


def routes_of(size, window, groups, backend="cpu"):
    kernel, stride, padding, dilation = map(pair, window)
    if size[0] % stride[0] or size[1] % stride[1]:
        return []
    call = _conv_table.Call(
        "cpu", torch.float32, size, _conv_table.Window(kernel, stride, padding, dilation), groups, 12, 18, False
    )
    found = [route for route in _conv_table.ROUTES if _conv_table.unavailable(route, call) is None]
    return [None, *(route for route in found if route != "implicit" or backend == "triton")]


CASES = [
    pytest.param(size, window, groups, id=f"{size[0]}x{size[1]}-{name}-g{groups}")
    for name, window in WINDOWS.items()
    for size in SIZES
    for groups in (1, 2, 6)
    if routes_of(size, window, groups) and (groups == 1 or name in ("1x1", "2x2 s2", "3x3", "3x3 s2 d2", "7x7 s2"))
]


@pytest.mark.parametrize("where", HAVE)
@pytest.mark.parametrize(("size", "window", "groups"), CASES)
def test_every_route_and_gradient(where, size, window, groups):
    backend, device = where
    plan = ragged_plan()
    for dtype in dtypes_of(backend):
        values = tensors(plan, size, window, groups, dtype)
        for route in routes_of(size, window, groups, backend):
            check(plan, values, (*window[1:], groups), dtype, device, route=route, backend=backend)


def test_definition_is_dense_times_mask():
    plan = ragged_plan()
    x, weight, bias = tensors(plan, (4, 4), WINDOWS["3x3 s2"], 1, torch.float64)
    out = ops.conv_cells(x, plan, weight, bias, 2, 1, backend="reference")
    for b in range(plan.batch):
        full = torch.zeros(12, 12, 16, dtype=torch.float64)
        cells = [(t, divmod(int(c) % 12, 4)) for t, c in enumerate(plan.cells) if int(c) // 12 == b]
        for t, (y, z) in cells:
            full[:, 4 * y : 4 * y + 4, 4 * z : 4 * z + 4] = x[t].permute(2, 0, 1)
        dense = F.conv2d(full[None], weight, bias, 2, 1)[0]
        for t, (y, z) in cells:
            want = dense[:, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2].permute(1, 2, 0)
            torch.testing.assert_close(out[t], want)


@pytest.mark.parametrize("where", HAVE)
@pytest.mark.parametrize("route", ["halo", "taps", "dense", None])
@pytest.mark.parametrize("name", ["3x3", "7x7 s2", "3x3 d2"])
def test_all_visible_is_the_dense_convolution(where, route, name):
    backend, device = where
    plan = CellMask.all_visible(2, (3, 2), device)
    _, stride, padding, dilation = window = WINDOWS[name]
    dtype = torch.float64 if backend == "cpu" else torch.float32
    x, weight, bias = (t.to(device) for t in tensors(plan, (4, 4), window, 1, dtype))
    want = F.conv2d(ops.unpack_cells(x, plan), weight, bias, stride, padding, dilation)
    out = ops.conv_cells(x, plan, weight, bias, stride, padding, dilation, route=route, backend=backend)
    torch.testing.assert_close(ops.unpack_cells(out, plan), want)


@pytest.mark.parametrize("where", HAVE)
@pytest.mark.parametrize("name", ["1x1", "2x2 s2", "3x3", "7x7 s2"])
def test_nothing_active(where, name):
    backend, device = where
    plan = CellMask.from_bool(torch.ones(2, 3, 3, dtype=torch.bool)).to(device)
    window = WINDOWS[name]
    for route in routes_of((4, 4), window, 1, backend):
        values = [t.to(device).requires_grad_() for t in tensors(plan, (4, 4), window, 1, torch.float32)]
        out = ops.conv_cells(values[0], plan, *values[1:], *window[1:], route=route, backend=backend)
        assert out.shape[0] == 0
        assert out.shape[3] == 18
        for grad in torch.autograd.grad(out, values, torch.zeros_like(out)):
            assert not grad.any()


@pytest.mark.parametrize("where", HAVE)
@pytest.mark.parametrize("route", ["halo", "taps"])
def test_masked_cells_do_not_leak(where, route):
    """An active cell sees zeros where its neighbours are masked, whatever else is in memory."""
    backend, device = where
    masked = torch.ones(1, 3, 3, dtype=torch.bool)
    masked[0, 1, 1] = False
    plan = CellMask.from_bool(masked).to(device)
    x, weight = torch.ones(1, 4, 4, 1, device=device), torch.ones(1, 1, 3, 3, device=device)
    out = ops.conv_cells(x, plan, weight, None, 1, 1, route=route, backend=backend)
    side = torch.tensor([2.0, 3, 3, 2], device=device)
    assert torch.equal(out[0, :, :, 0], side[:, None] * side)


@pytest.mark.parametrize("where", HAVE)
@pytest.mark.parametrize("stride", [1, 2])
def test_raw_gradients_are_the_transposes(where, stride):
    """<halo(x), g> = <x, halo_backward(g)> with whole numbers: exact."""
    backend, device = where
    plan = ragged_plan().to(device)
    for h, w, k in ((4, 2, 3), (2, 2, 7), (2, 4, 5)):
        window = _conv_table.Window((k, k), (stride, stride), (k // 2,) * 2, (1, 1))
        table = plan.neighbours(window.radius((h, w)))
        whole = lambda *shape: torch.randint(-3, 4, shape, device=device).float()  # noqa: E731
        x = whole(plan.total, h, w, 20)
        for op, args, back in (("halo_cells", (window.halo(),), ()), ("gather_taps", tuple(window), (x.shape[1:],))):
            y = _registry.raw(op, backend)(x, table, *args)
            g = whole(*y.shape)
            grad = _registry.raw(op + "_backward", backend)(g, table, *back, *args)
            assert grad.shape == x.shape
            assert (y * g).sum() == (x * grad).sum()


@pytest.mark.parametrize("where", HAVE)
@pytest.mark.parametrize("route", ["halo", "taps"])
@pytest.mark.parametrize("stride", [1, 2])
def test_runs_agree_bit_for_bit(where, route, stride):
    backend, device = where
    plan = ragged_plan().to(device)
    values = [t.to(device).requires_grad_() for t in tensors(plan, (4, 4), WINDOWS["3x3"], 1, torch.float32)]
    runs = []
    for _ in range(2):
        out = ops.conv_cells(values[0], plan, *values[1:], stride, 1, route=route, backend=backend)
        runs.append([out, *torch.autograd.grad(out.square().sum(), values)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ["halo", "dense"])
@pytest.mark.parametrize("stride", [1, 2])
def test_dilated_groups_of_16_bits(route, stride, dtype):
    """Sizes at which oneDNN's own weight gradient is wrong."""
    plan = CellMask.from_bool(torch.tensor([[[False, True, False]]] * 2))
    window = (3, stride, 2, 2)
    values = tensors(plan, (32, 32), window, 8, dtype, channels=16, out=8)
    check(plan, values, (*window[1:], 8), dtype, route=route)


@pytest.mark.parametrize("window", [(3, 2, 1, 1), ((3, 2), (1, 2), (1, 0), 1)], ids=["3x3 s2", "3x2 s1x2"])
@pytest.mark.parametrize("route", ["halo", "dense"])
@pytest.mark.parametrize(("channels", "groups"), [(16, 1), (16, 4), (4, 1)])
def test_one_site_wide_at_a_stride(route, window, channels, groups):
    """Where oneDNN leaves the output as it found it, in bfloat16 by AMX: frames, and maps, of two sites by one."""
    plan = CellMask.from_bool(torch.tensor([[[True], [False]], [[False], [False]]] * 3))
    for seed in range(2):  # the memory that is found differs
        values = tensors(plan, (4, 2), window, groups, torch.bfloat16, channels, out=8, seed=seed)
        check(plan, values, (*window[1:], groups), torch.bfloat16, route=route)


def test_rows_of_taps_in_parts(monkeypatch):
    """Few cells at a time must give the same result."""
    plan = ragged_plan()
    for groups in (1, 2):
        for window in (WINDOWS["3x3"], WINDOWS["7x7 s2"]):
            values = tensors(plan, (4, 4), window, groups, torch.float64)
            monkeypatch.setattr(sparse_conv, "CHUNK", {"cpu": 30000})
            parts = sparse_conv._some_cells(plan.neighbours(1), values[0], _conv_table.Window(*map(pair, window)))
            assert len(parts) > 2
            check(plan, values, (*window[1:], groups), torch.float64, route="taps")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 4])
def test_many_parts_sum_well(monkeypatch, dtype, groups):
    """Gradients with a mean, which a running sum in 16 bits would stop to see."""
    plan = CellMask.from_bool(torch.zeros(512, 2, 2, dtype=torch.bool))
    values = tensors(plan, (2, 2), WINDOWS["3x3"], groups, dtype, channels=8, out=8)
    values[0] += 1
    grads = []
    for size in (1, 2**30):
        monkeypatch.setattr(sparse_conv, "CHUNK", {"cpu": size})
        leaves = [v.clone().requires_grad_() for v in values]
        ops.conv_cells(leaves[0], plan, *leaves[1:], 1, 1, groups=groups, route="taps").float().sum().backward()
        grads.append([t.grad for t in leaves[1:]])
    for many, one in zip(*grads):
        assert many.dtype is dtype
        assert_close(many, one.double(), dtype)


def test_gradients_of_1x1_lie_as_their_weights():
    """DDP's buckets want that."""
    plan = CellMask.from_bool(torch.zeros(2, 2, 2, dtype=torch.bool))
    values = [v.requires_grad_() for v in tensors(plan, (2, 2), WINDOWS["1x1"], 1, torch.float32)]
    ops.conv_cells(values[0], plan, *values[1:], route="taps").sum().backward()
    assert values[1].grad.stride() == values[1].stride()


@pytest.mark.parametrize("batch", [4, 64])
def test_float16_frames_sum_well(batch):
    """oneDNN adds the weight gradients of images one by one in float16, and frames are many small images."""
    plan = CellMask.from_bool(torch.zeros(batch, 3, 3, dtype=torch.bool))
    values = tensors(plan, (8, 8), WINDOWS["3x3"], 1, torch.float16, channels=8, out=8)
    check(plan, values, WINDOWS["3x3"][1:], torch.float16, route="halo")


def test_only_the_wanted_gradients():
    plan = ragged_plan()
    for route in ("halo", "taps"):
        for stride in (1, 2):
            values = tensors(plan, (4, 4), WINDOWS["3x3"], 1, torch.float64)
            every = [v.clone().requires_grad_() for v in values]
            want = torch.autograd.grad(ops.conv_cells(every[0], plan, *every[1:], stride, 1).square().sum(), every)
            for i in range(3):
                some = [v.clone().requires_grad_(j == i) for j, v in enumerate(values)]
                out = ops.conv_cells(some[0], plan, *some[1:], stride, 1, route=route)
                torch.testing.assert_close(torch.autograd.grad(out.square().sum(), some[i])[0], want[i])


@pytest.mark.parametrize("route", ["halo", "taps", "dense"])
def test_outputs_may_be_written_into(route):
    plan = ragged_plan()
    x, weight, bias = (t.requires_grad_() for t in tensors(plan, (4, 4), WINDOWS["3x3"], 1, torch.float64))
    want = torch.autograd.grad(ops.conv_cells(x, plan, weight, bias, 1, 1, route=route).relu().sum(), (x, weight, bias))
    out = torch.relu_(ops.conv_cells(x, plan, weight, bias, 1, 1, route=route))
    for a, b in zip(torch.autograd.grad(out.sum(), (x, weight, bias)), want, strict=True):
        torch.testing.assert_close(a, b)


def test_layouts_that_are_not_contiguous():
    plan = ragged_plan()
    x, weight, bias = tensors(plan, (4, 4), WINDOWS["3x3"], 1, torch.float64)
    strange = x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    for route in ("halo", "taps", "dense"):
        want = ops.conv_cells(x, plan, weight, bias, 1, 1, route=route)
        weights = weight.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ops.conv_cells(strange, plan, weights, bias, 1, 1, route=route), want)
    for stride in (1, 2):
        want = ops.conv_cells(x, plan, weight[:, :, :stride, :stride], bias, stride)
        torch.testing.assert_close(ops.conv_cells(strange, plan, weight[:, :, :stride, :stride], bias, stride), want)


def test_autocast():
    plan = ragged_plan()
    for name in ("1x1", "2x2 s2", "3x3", "7x7 s2"):
        window = WINDOWS[name]
        values = [v.requires_grad_() for v in tensors(plan, (4, 4), window, 1, torch.float32)]
        for route in routes_of((4, 4), window, 1):
            with torch.autocast("cpu", torch.bfloat16):
                out = ops.conv_cells(values[0], plan, *values[1:], *window[1:], route=route)
            high = [v.double() for v in values]
            want = ops.conv_cells(high[0], plan, *high[1:], *window[1:], backend="reference")
            assert out.dtype is torch.bfloat16
            assert_close(out, want, torch.bfloat16)
            assert all(g.dtype is torch.float32 for g in torch.autograd.grad(out.sum(), values))


def test_depthwise_goes_to_its_own_op():
    plan = ragged_plan()
    x, weight, bias = tensors(plan, (4, 4), WINDOWS["3x3"], 12, torch.float64, out=12)
    for stride in (1, 2):
        want = ops.conv_cells(x, plan, weight, bias, stride, 1, groups=12, backend="reference")
        out = ops.conv_cells(x, plan, weight, bias, stride, 1, groups=12, route="depthwise")
        assert_close(out, want, torch.float64)
        assert out.is_contiguous()


def test_table():
    window = _conv_table.Window((3, 3), (1, 1), (1, 1), (1, 1))
    call = _conv_table.Call("cpu", torch.float32, (8, 8), window, 1, 64, 64, False)
    if "halo_cells" in _dispatch.CPU_OPS:
        assert _conv_table.choose(call, None, None) == ("cpu", "halo")
        assert _conv_table.choose(call._replace(cell=(2, 2)), None, None) == ("cpu", "taps")
        assert _conv_table.choose(call._replace(cell=(2, 2)), None, "halo") == ("cpu", "halo")
    far = window._replace(dilation=(9, 9), padding=(9, 9))
    assert _conv_table.choose(call._replace(window=far, cell=(1, 1)), None, None)[1] == "dense"
    assert _conv_table.choose(call, "reference", None) == ("reference", "reference")
    with maefast.backend("reference"):
        assert _conv_table.choose(call, None, None) == ("reference", "reference")
        assert _conv_table.why("cpu") == [("reference", "forced")]
    implicit = [rule for rule in _conv_table.TABLE if rule.route == "implicit"]
    assert all("measured on" in rule.why for rule in implicit)  # never chosen otherwise
    if not implicit and _dispatch.HAS_TRITON and _dispatch.forced() is None:
        assert "never chosen" in dict(_conv_table.why("cuda"))["implicit"]
    assert "implicit" not in dict(_conv_table.why("cpu"))
    one = window._replace(kernel=(1, 1), padding=(0, 0))
    assert _conv_table.choose(call._replace(window=one), None, None)[1] == "rows"
    assert _conv_table.why("cpu")[-1][0] == "dense"


PLAN = CellMask.from_bool(torch.tensor([[[True, False], [False, False]]]))
X = torch.randn(3, 4, 4, 6)


def conv(*shape, x=X, **options):
    return lambda: ops.conv_cells(x, PLAN, torch.randn(*shape), **options)


BAD = [
    (conv(8, 5, 3, 3, padding=1), ValueError, "takes 5 channels, but x has 6"),
    (conv(8, 6, 3, 3, padding=1, groups=2), ValueError, "takes 12 channels"),
    (conv(7, 3, 3, 3, padding=1, groups=2), ValueError, "divide the 7 output channels"),
    (conv(8, 6, 3, 3, padding=1, groups=0), ValueError, "groups must be positive"),
    (conv(8, 6, 3, 3), ValueError, "does not map H sites to H / stride.*padding 1 does"),
    (conv(8, 6, 3, 3, padding=2), ValueError, "padding 1 does"),
    (conv(8, 6, 2, 2), ValueError, "no symmetric padding does"),
    (conv(8, 6, 3, 3, dilation=2**40), ValueError, f"padding {2**40} does"),  # found without counting up to it
    (conv(8, 6, 7, 7, stride=2, padding=2), ValueError, "padding 3 does"),
    (conv(8, 6, 3, 3, padding=1, dilation=2), ValueError, "padding 2 does"),
    (conv(8, 6, 8, 8, stride=8), ValueError, "stride 8 does not divide the height 4 of a cell"),
    (conv(8, 6, 3, 3, stride=3, padding=1), ValueError, "stride 3 does not divide"),
    (conv(8, 6, 3, 3, stride=0, padding=1), ValueError, "stride must be"),
    (conv(8, 6, 3, 3, stride=(1, 1, 1), padding=1), ValueError, "stride must be"),
    (conv(8, 6, 3, 3, padding="reflect"), ValueError, "padding must be one of"),
    (conv(8, 6, 3, 3, padding=-1), ValueError, "padding must be"),
    (conv(8, 6, 3, padding=1), ValueError, "weight must have 4 dimensions"),
    (conv(8, 6, 3, 3, padding=1, bias=torch.randn(7)), ValueError, r"bias must be \[8\]"),
    (conv(8, 6, 3, 3, padding=1, bias=torch.randn(8).double()), TypeError, "x is torch.float32 but bias is"),
    (conv(8, 6, 3, 3, padding=1, x=X.bfloat16()), TypeError, "x is torch.bfloat16 but weight is torch.float32"),
    (conv(8, 6, 3, 3, padding=1, x=X[:2]), ValueError, "packed cells"),
    (conv(8, 6, 3, 3, padding=1, x=X.int()), TypeError, "float32"),
    (conv(8, 6, 3, 3, padding=1, x=X.to("meta")), ValueError, "one device|is on"),
    (conv(8, 6, 3, 3, padding=1, route="winograd"), ValueError, "route must be one of"),
    (conv(8, 6, 3, 3, padding=1, route="rows"), ValueError, "beyond its cell"),
    (conv(8, 6, 3, 3, padding=1, route="depthwise"), ValueError, "depthwise_cells takes"),
    (conv(8, 6, 3, 3, padding=1, route="halo", backend="reference"), RuntimeError, "no kernels"),
    (conv(8, 6, 3, 3, padding=1, route="implicit"), RuntimeError, "Triton takes CUDA tensors|Triton is not installed"),
    (conv(8, 6, 3, 3, padding=1, route="implicit", backend="cpu"), RuntimeError, "'cpu' was asked for"),
    (conv(8, 3, 3, 3, padding=1, groups=2, route="implicit"), ValueError, "has no groups"),
    (conv(8, 6, 3, 3, padding=1, backend="metal"), ValueError, "unknown backend"),
    (lambda: ops.conv_cells(X, PLAN.tokens, torch.randn(8, 6, 1, 1)), TypeError, "CellMask"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_words_for_padding():
    plan = ragged_plan()
    x, weight, bias = tensors(plan, (4, 4), WINDOWS["3x3"], 1, torch.float64)
    same = ops.conv_cells(x, plan, weight, bias, 1, "same")
    assert torch.equal(same, ops.conv_cells(x, plan, weight, bias, 1, 1))
    corner = weight[:, :, :2, :2]
    assert torch.equal(ops.conv_cells(x, plan, corner, bias, 2, "valid"), ops.conv_cells(x, plan, corner, bias, 2))


@pytest.mark.parametrize("where", HAVE)
def test_broken_table_raises(where):
    backend, _ = where
    if backend != "cpu":
        pytest.skip("the C++ kernels check the plan")
    plan = ragged_plan()
    table, x = plan.neighbours(1).clone(), torch.randn(plan.total, 2, 2, 4)
    table[0] = plan.total
    with pytest.raises(RuntimeError, match="out of range"):
        _registry.raw("halo_cells", backend)(x, table, (1, 1, 1, 1))
    with pytest.raises(RuntimeError, match="beyond the neighbour table"):
        _registry.raw("halo_cells", backend)(x, plan.neighbours(1), (3, 1, 1, 1))
    with pytest.raises(RuntimeError, match="beyond the neighbour table"):
        _registry.raw("gather_taps", backend)(x, plan.neighbours(1), (7, 7), (1, 1), (3, 3), (1, 1))


@pytest.mark.parametrize("where", HAVE)
def test_opcheck(where):
    backend, device = where
    plan = ragged_plan().to(device)
    table, x = plan.neighbours(1), torch.randn(plan.total, 4, 2, 6, device=device)
    window = ((3, 3), (2, 1), (1, 1), (1, 1))
    torch.library.opcheck(_registry.raw("halo_cells", backend), (x, table, (1, 1, 0, 1)))
    grad = torch.randn(plan.total, 5, 4, 6, device=device)
    torch.library.opcheck(_registry.raw("halo_cells_backward", backend), (grad, table, (1, 1, 0, 1)))
    torch.library.opcheck(_registry.raw("gather_taps", backend), (x, table, *window))
    grad = torch.randn(plan.total * 4, 54, device=device)
    torch.library.opcheck(_registry.raw("gather_taps_backward", backend), (grad, table, (4, 2, 6), *window))


@pytest.mark.parametrize("where", HAVE)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(where, dynamic):
    backend, device = where

    def step(x, plan, wide, narrow, bias):
        first = ops.conv_cells(x, plan, wide, bias, 1, 1, route="halo", backend=backend)
        second = ops.conv_cells(first, plan, wide, bias, 2, 1, route="taps", backend=backend)
        third = ops.conv_cells(second, plan, wide, None, 1, 1, backend=backend)
        return ops.conv_cells(third, plan, narrow, bias, 2, backend=backend).square().mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        masked = torch.rand(batch, 3, 3, generator=torch.Generator().manual_seed(batch)) > 0.5
        plan = CellMask.from_bool(masked).to(device)
        plan.neighbours(1)
        shapes = (plan.total, 4, 4, 6), (6, 6, 3, 3), (6, 6, 2, 2), (6,)
        inputs = [torch.randn(s, device=device, requires_grad=True) for s in shapes]
        got = torch.autograd.grad(compiled(inputs[0], plan, *inputs[1:]), inputs)
        want = torch.autograd.grad(step(inputs[0], plan, *inputs[1:]), inputs)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)
