from __future__ import annotations

import pytest
import torch

from maefast.nn.reversal import reverse_gradient


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_forward_is_the_identity_and_the_gradient_is_reversed(scale):
    x = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    weight = torch.randn(3, 2, dtype=torch.double, requires_grad=True)
    found = torch.autograd.grad((reverse_gradient(x, scale) @ weight).square().sum(), (x, weight))
    want = torch.autograd.grad((x @ weight).square().sum(), (x, weight))
    assert torch.equal(reverse_gradient(x, scale), x)
    assert torch.equal(found[0], -scale * want[0])
    assert torch.equal(found[1], want[1])


def test_it_traces():
    x = torch.randn(3, requires_grad=True)
    compiled = torch.compile(lambda x: reverse_gradient(x, 2.0).sin(), backend="eager", fullgraph=True)
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, -2 * x.detach().cos())


def test_refusals():
    with pytest.raises(ValueError, match="scale must be finite and not negative, got -1"):
        reverse_gradient(torch.zeros(1), -1)
    with pytest.raises(TypeError, match="x must be a floating tensor"):
        reverse_gradient(torch.zeros(1, dtype=torch.long))
