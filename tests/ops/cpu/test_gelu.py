"""bias_gelu of the C++ CPU kernels, element by element: each format's own rounding is nearly all of its error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.ops.cpu.common import needs_cpu_ops, randn, raw

pytestmark = needs_cpu_ops

DIGITS = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}  # behind the leading bit
# Below this, units stay what they are here: of float16 by definition; elsewhere both tails end above zero.
LEAST = {torch.float32: 1e-34, torch.bfloat16: 1e-33, torch.float16: 2.0**-14}
SLOPE_ZERO = -0.7517915246935645


def value(x: Tensor) -> Tensor:
    return x * 0.5 * torch.special.erfc(-x / math.sqrt(2))


def slope(x: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(-x / math.sqrt(2)) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def run(which, x: Tensor, bias: Tensor | None = None) -> Tensor:
    if which is value:
        return raw("bias_gelu", x, bias, False)
    return raw("bias_gelu_backward", torch.ones_like(x), x, bias, False, False)[0]


def errors(out: Tensor, exact: Tensor) -> Tensor:
    """|out - exact| in units of the last place that out's format has at `exact`."""
    size = exact.abs().clamp(min=LEAST[out.dtype])
    return (out.double() - exact).abs() / torch.exp2(size.log2().floor() - DIGITS[out.dtype])


@pytest.mark.parametrize("which", [value, slope])
def test_bfloat16_is_the_rounded_float64_result(which):
    """Every finite bfloat16. Perfect rounding errs by up to 0.5 units; 2^-14 of the result is 0.016 units at most. An
    erf of absolute error 1e-7 fails (nothing would be left of the tail at -6), and so does rounding twice."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()].view(1, -1)
    out, exact = run(which, x), which(x.double())
    assert errors(out, exact).max() <= 0.516
    ours, best = (t[exact.abs() > LEAST[x.dtype]] for t in (out, exact.to(torch.bfloat16)))
    assert len(best) > 40000
    assert (ours == best).double().mean() > 0.998


@pytest.mark.parametrize("which", [value, slope])
def test_bfloat16_adds_the_bias_in_float32(which):
    """The sum keeps the digits that bfloat16 would drop."""
    x, bias = randn(300, 257, dtype=torch.bfloat16) * 3, randn(257, seed=1)
    total = (x.float() + bias).double()
    away = (total - SLOPE_ZERO).abs() > (1e-3 if which is slope else 0)  # float32 has no more digits nearer to it
    assert errors(run(which, x, bias), which(total))[away].max() <= 0.516


@pytest.mark.parametrize("which", [value, slope])
@pytest.mark.parametrize(("dtype", "units", "tail"), [(torch.float16, 0.502, 0.502), (torch.float32, 8, 48)])
def test_longer_formats_keep_float32_accuracy(which, dtype, units, tail):
    """`tail`: below -2, where an error of x^2 / 2, which is the exponent, counts as often as that is large."""
    x = torch.linspace(-9, 9, 200_001, dtype=torch.float64).to(dtype).view(1, -1)
    error = errors(run(which, x), which(x.double()))
    away = (x.double() - SLOPE_ZERO).abs() > (0.45 if which is slope else 0)  # cdf and x * phi cancel near it
    assert error[(x > -2) & away].max() <= units
    assert error[x <= -2].max() <= tail


@pytest.mark.parametrize("dtype", DIGITS, ids=str)
def test_infinity_and_nan(dtype):
    x = torch.tensor([[math.nan, -math.nan, math.inf, 1e4, -1e4]]).to(dtype)
    out, grad = run(value, x)[0], run(slope, x)[0]
    assert out[:2].isnan().all()
    assert grad[:2].isnan().all()
    assert torch.equal(out[2:4], x[0, 2:4])
    assert grad[3] == 1
    assert abs(float(out[4])) < 1e-30
    assert abs(float(grad[4])) < 1e-30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_backward_gives_the_value_once_more(dtype, tanh, biased):
    """Bit for bit what the forward gave, and the same gradients."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    x, grad = randn(70, 83, dtype=dtype) * 3, randn(70, 83, dtype=dtype, seed=1)
    bias = randn(83, dtype=wide, seed=2) if biased else None
    grad_x, grad_bias, none = raw("bias_gelu_backward", grad, x, bias, tanh, biased)
    again_x, again_bias, out = raw("bias_gelu_backward", grad, x, bias, tanh, biased, True)
    assert none.shape == (0, 83)
    assert torch.equal(out, raw("bias_gelu", x, bias, tanh))
    assert torch.equal(again_x, grad_x)
    assert torch.equal(again_bias, grad_bias)
    assert again_bias.dtype is wide
