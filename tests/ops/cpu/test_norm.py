"""add_norm of the C++ CPU kernels: what a transformer block has it do beside the public op."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cpu.common import needs_cpu_ops, randn, raw

pytestmark = needs_cpu_ops

TYPES = [  # stream, delta, y
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64, torch.float64),
]


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("size", [(1, 8), (70, 83), (300, 40)], ids=str)
def test_shift_and_side_outputs(types, size):
    """The shift is added in the arithmetic type; y comes out of the backward bit for bit as out of the forward; the
    gradient in delta's dtype is that of x rounded, and its sum over the rows the gradient of the shift."""
    stream, narrow, out = types
    width, wide = size[1], torch.float64 if stream is torch.float64 else torch.float32
    x, delta, grad_y = randn(*size, dtype=stream), randn(*size, dtype=narrow, seed=1), randn(*size, dtype=out, seed=2)
    weight, bias, shift = (randn(width, dtype=wide, seed=n) for n in (3, 4, 5))
    residual, y, mean, rstd = raw("add_norm", x, delta, weight, bias, 1e-6, out, shift)
    assert torch.equal(residual, (x.to(wide) + (delta.to(wide) + shift)).to(stream))

    plain = raw("add_norm_backward", grad_y, x, residual, mean, rstd, weight, True)
    full = raw("add_norm_backward", grad_y, x, residual, mean, rstd, weight, True, bias, narrow, True)
    assert torch.equal(full[0], plain[0])
    assert torch.equal(full[1][:2], plain[1])
    assert torch.equal(full[3], y)
    assert plain[2].shape == plain[3].shape == (0, width)
    if narrow is stream:
        assert full[2].shape == (0, width)
    else:
        torch.testing.assert_close(full[2], full[0].to(narrow))  # of a sum that was not rounded to float32 before
    high = [t.double() for t in (grad_y, x, residual, mean, rstd, weight)]
    want = raw("add_norm_backward", *high, False)[0].sum(0)  # of gradients that were not rounded
    assert (full[1][2] - want).norm() <= 1e-5 * want.norm()
