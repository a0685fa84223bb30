"""The Triton kernels of implicit_conv, and conv_cells' route "implicit", against dense-times-mask in float64."""

from __future__ import annotations

import pytest
import torch

from maefast import ops
from maefast.kernels import implicit_conv
from maefast.ops import CellMask, _registry
from maefast.ops._conv_table import Window
from tests.kernels.support import assert_close, random_plan, random_tensor

# kernel, stride, padding, dilation
WINDOWS = {
    "1x1": (1, 1, 0, 1),
    "1x1 s2": (1, 2, 0, 1),
    "3x3": (3, 1, 1, 1),
    "3x3 s2": (3, 2, 1, 1),
    "3x3 d2": (3, 1, 2, 2),
    "3x3 s2 d2": (3, 2, 2, 2),
    "5x5 s2": (5, 2, 2, 1),
    "5x5 d2": (5, 1, 4, 2),
    "7x7": (7, 1, 3, 1),
    "7x7 s2": (7, 2, 3, 1),
    "3x5 s(2,1)": ((3, 5), (2, 1), (2, 2), (2, 1)),
}
# Cell and channels: less than a tile, odd, more than a step of the inner loop, more than a tile of outputs.
SIZES = [((8, 8), (3, 20)), ((4, 4), (20, 18)), ((2, 2), (33, 70)), ((1, 1), (40, 140)), ((4, 2), (16, 16))]


def pair(value):
    return (value, value) if isinstance(value, int) else value


CASES = [
    pytest.param(
        size, channels, window, id=f"{size[0]}x{size[1]} {name}", marks=[] if size == (4, 2) else pytest.mark.blocks
    )
    for size, channels in SIZES
    for name, window in WINDOWS.items()
    if size[0] % pair(window[1])[0] == size[1] % pair(window[1])[1] == 0
]


def plan_of(seed: int = 0, grid: tuple[int, int] = (2, 3)) -> CellMask:
    """Some cells of a sample, none of the next, all of the last."""
    tokens = grid[0] * grid[1]
    return CellMask(random_plan(3, tokens, [tokens // 2 + 1, 0, tokens], seed), grid)


def tensors(plan, size, channels, window, dtype):
    kernel, (ci, co) = pair(window[0]), channels
    shapes = (plan.total, *size, ci), (co, ci, *kernel), (co,)
    return [random_tensor(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def run(plan, values, window, device):
    """The output and the gradients of x, weight and bias."""
    low = [v.to(device).requires_grad_() for v in values]
    out = ops.conv_cells(low[0], plan.to(device), *low[1:], *window[1:], route="implicit", backend="triton")
    grad = random_tensor(*out.shape, seed=9, dtype=out.dtype)
    return out, *torch.autograd.grad(out, low, grad.to(device))


@pytest.mark.parametrize(("size", "channels", "window"), CASES)
def test_against_dense_times_mask(device, dtype, size, channels, window):
    plan = plan_of(grid=(2, 2) if size == (8, 8) else (2, 3))  # large cells are reached from their neighbours alone
    values = tensors(plan, size, channels, window, dtype)
    got = run(plan, values, window, device)
    high = [v.double().requires_grad_() for v in values]
    want = ops.conv_cells(high[0], plan, *high[1:], *window[1:], backend="reference")
    grad = random_tensor(*want.shape, seed=9, dtype=dtype).double()
    for name, a, b in zip(("y", "x", "weight", "bias"), got, (want, *torch.autograd.grad(want, high, grad))):
        assert a.dtype is dtype
        assert_close(a, b, name)


def test_without_bias_and_only_the_wanted_gradients(device, dtype):
    plan, window = plan_of(1), WINDOWS["3x3 s2"]
    values = tensors(plan, (2, 4), (5, 7), window, dtype)
    values[2].zero_()
    every = run(plan, values, window, device)
    for i in range(2):
        some = [v.to(device).requires_grad_(j == i) for j, v in enumerate(values[:2])]
        out = ops.conv_cells(some[0], plan.to(device), some[1], None, 2, 1, route="implicit", backend="triton")
        assert torch.equal(out, every[0])
        grad = random_tensor(*out.shape, seed=9, dtype=dtype).to(device)
        assert torch.equal(torch.autograd.grad(out, some[i], grad)[0], every[1 + i])


def test_weight_gradient_in_parts(device):
    """640 outputs are summed in more than one part; whole numbers make every order exact."""
    plan, window = plan_of(), Window((3, 3), (1, 1), (1, 1), (1, 1))
    whole = lambda *shape: torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).float()  # noqa: E731
    x, grad, table = whole(plan.total, 8, 8, 4).to(device), whole(plan.total, 8, 8, 6).to(device), plan.neighbours(1)
    seen = []
    original = implicit_conv.sum_parts
    implicit_conv.sum_parts = lambda parts, out: (seen.append(parts.shape[0]), original(parts, out))
    try:
        got = implicit_conv.implicit_conv_grad_weight(x, grad, table.to(device), *window)
    finally:
        implicit_conv.sum_parts = original
    assert seen[0] > 1
    taps = _registry.raw("gather_taps", "triton")(x, table.to(device), *window)
    want = taps.double().t() @ grad.double().flatten(0, 2)
    assert torch.equal(got.double(), want.view(9, 4, 6))


def test_raw_gradients_are_the_transposes(device):
    """<conv(x, w), g> = <x, grad_x> = <w, grad_weight> with whole numbers: exact."""
    plan = plan_of(2)
    for (h, w), name in (((4, 2), "7x7 s2"), ((2, 2), "3x3 d2"), ((2, 4), "5x5 s2")):
        window = Window(*map(pair, WINDOWS[name]))
        table = plan.neighbours(window.radius((h, w))).to(device)
        generator = torch.Generator().manual_seed(0)
        whole = lambda *shape: torch.randint(-3, 4, shape, generator=generator).float().to(device)  # noqa: B023, E731
        x, weight = whole(plan.total, h, w, 18), whole(window.kernel[0] ** 2, 18, 5)
        y = implicit_conv.implicit_conv(x, table, weight, None, *window)
        g = whole(*y.shape)
        total = (y.double() * g).sum()
        assert total == (x.double() * implicit_conv.implicit_conv_grad_x(g, table, weight, *window)).sum()
        assert total == (weight.double() * implicit_conv.implicit_conv_grad_weight(x, g, table, *window)).sum()


def test_masked_cells_do_not_leak(device, dtype):
    masked = torch.ones(1, 3, 3, dtype=torch.bool)
    masked[0, 1, 1] = False
    plan = CellMask.from_bool(masked).to(device)
    x, weight = torch.ones(1, 4, 4, 1, device=device, dtype=dtype), torch.ones(1, 1, 3, 3, device=device, dtype=dtype)
    out = ops.conv_cells(x, plan, weight, None, 1, 1, route="implicit", backend="triton")
    side = torch.tensor([2.0, 3, 3, 2], device=device, dtype=dtype)
    assert torch.equal(out[0, :, :, 0], side[:, None] * side)


def test_runs_agree_bit_for_bit(device, dtype):
    plan, window = plan_of(), WINDOWS["3x3 s2"]
    values = tensors(plan, (8, 8), (20, 24), window, dtype)
    assert all(torch.equal(a, b) for a, b in zip(*(run(plan, values, window, device) for _ in range(2))))


@pytest.mark.parametrize("name", ["1x1", "3x3", "7x7 s2"])
def test_nothing_active(device, dtype, name):
    plan = CellMask(random_plan(2, 6, 0, 0), (2, 3))
    values = tensors(plan, (4, 4), (8, 12), WINDOWS[name], dtype)
    out, *grads = run(plan, values, WINDOWS[name], device)
    assert out.shape == (0, *([2, 2] if "s2" in name else [4, 4]), 12)
    for value, grad in zip(values, grads):
        assert grad.shape == value.shape
        assert not grad.any()


def test_strides_of_inputs_do_not_matter(device):
    plan, window = plan_of(), WINDOWS["3x3"]
    x, weight, bias = tensors(plan, (2, 4), (6, 10), window, torch.float32)
    want = run(plan, (x, weight, bias), window, device)
    strange = x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    last, spread = weight.contiguous(memory_format=torch.channels_last), bias.repeat_interleave(2)[::2]
    for a, b in zip(run(plan, (strange, last, spread), window, device), want):
        assert torch.equal(a, b)


def test_wide_row_numbers(device, monkeypatch):
    monkeypatch.setattr(implicit_conv, "INT32", 0)
    for name in ("3x3", "3x3 s2"):
        test_against_dense_times_mask(device, torch.float32, *SIZES[1], WINDOWS[name])


def test_fakes(device):
    """Shapes and dtypes under torch.compile."""
    plan, window = plan_of().to(device), Window((3, 3), (2, 1), (1, 1), (1, 1))
    x, table = torch.randn(plan.total, 4, 2, 6, device=device), plan.neighbours(1)
    weight, bias = torch.randn(9, 6, 5, device=device), torch.randn(5, device=device)
    grad = torch.randn(plan.total, 2, 2, 5, device=device)
    torch.library.opcheck(_registry.raw("implicit_conv", "triton"), (x, table, weight, bias, *window))
    torch.library.opcheck(_registry.raw("implicit_conv", "triton"), (x, table, weight, None, *window))
    torch.library.opcheck(_registry.raw("implicit_conv_grad_x", "triton"), (grad, table, weight, *window))
    torch.library.opcheck(_registry.raw("implicit_conv_grad_weight", "triton"), (x, grad, table, *window))


def test_compiles_whole(device):
    def step(x, plan, weight, bias):
        first = ops.conv_cells(x, plan, weight, bias, 1, 1, route="implicit", backend="triton")
        return ops.conv_cells(first, plan, weight, None, 2, 1, route="implicit", backend="triton").square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    plan = plan_of().to(device)
    plan.neighbours(1)
    shapes = (plan.total, 4, 4, 6), (6, 6, 3, 3), (6,)
    inputs = [random_tensor(*s, seed=i).to(device).requires_grad_() for i, s in enumerate(shapes)]
    got = torch.autograd.grad(compiled(inputs[0], plan, *inputs[1:]), inputs)
    want = torch.autograd.grad(step(inputs[0], plan, *inputs[1:]), inputs)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_refuses_float64(device):
    plan, window = plan_of(), Window((3, 3), (1, 1), (1, 1), (1, 1))
    x, table = torch.zeros(plan.total, 2, 2, 4, dtype=torch.float64, device=device), plan.neighbours(1).to(device)
    with pytest.raises(TypeError, match="float64"):
        implicit_conv.implicit_conv(x, table, torch.zeros(9, 4, 4, device=device), None, *window)
    weight = torch.zeros(4, 4, 3, 3, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="do not serve float64"):
        ops.conv_cells(x, plan.to(device), weight, None, 1, 1, route="implicit", backend="triton")
