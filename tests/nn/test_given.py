from __future__ import annotations

import pytest
import torch

from maefast import masking
from maefast.nn import GivenTokens


@pytest.mark.parametrize("width", [None, 6])
@pytest.mark.parametrize("kind", ["all", "uniform", "ragged"])
def test_tokens_are_gathered_mapped_and_placed(width, kind):
    torch.manual_seed(0)
    module = GivenTokens(4, width).double()
    dim = width or 4
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    pos, prefix = torch.randn(1, 5, dim, dtype=torch.float64), torch.randn(1, 2, dim, dtype=torch.float64)
    pos.requires_grad_(True)
    prefix.requires_grad_(True)
    plan = {
        "all": None,
        "uniform": masking.random(3, 5, keep=2, noise=torch.rand(3, 5)),
        "ragged": masking.ragged([5, 2, 3], 5, 0.5, noise=torch.rand(3, 5)),
    }[kind]
    out = module(x, plan, pos=pos, prefix=prefix)
    mapped = x if width is None else x @ module.proj.weight.T + module.proj.bias
    index = torch.arange(15) if plan is None else plan.visible.long()
    want = []
    for b in range(3):
        mine = index[(index // 5) == b] % 5
        want.append(torch.cat([prefix[0], mapped[b, mine] + pos[0, mine]]))
    want = torch.cat(want)
    assert out.shape == ((len(want), dim) if kind == "ragged" else (3, len(want) // 3, dim))
    torch.testing.assert_close(out.reshape(want.shape), want, rtol=0, atol=1e-12)
    inputs = [pos, prefix, *module.parameters()]
    weight = torch.randn_like(want)
    got, expected = (torch.autograd.grad((t.reshape(want.shape) * weight).sum(), inputs) for t in (out, want))
    for mine, other in zip(got, expected):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    bare = module(x, plan).reshape(-1, dim)
    torch.testing.assert_close(bare, mapped.reshape(-1, dim)[index], rtol=0, atol=1e-12)


def test_what_is_not_visible_is_not_read():
    plan = masking.ragged([5, 2, 3], 5, 0.5, noise=torch.rand(3, 5))
    x = torch.randn(3, 5, 4)
    other = torch.where((plan.slot >= 0).view(3, 5, 1), x, float("nan"))
    for module in (GivenTokens(4), GivenTokens(4, 6)):
        assert torch.equal(module(x, plan), module(other, plan))


def test_refusals():
    with pytest.raises(ValueError, match=r"embeddings must be \[B, N, 4\], got \(2, 5, 3\)"):
        GivenTokens(4)(torch.zeros(2, 5, 3))
