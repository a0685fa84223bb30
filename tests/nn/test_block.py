"""The block: part runs equal the same part of a whole run, packed sequences equal each sequence alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from maefast import masking
from maefast.bench.peers.plain_mae import TransformerBlock
from maefast.nn import Block, Packing


@pytest.fixture
def block():
    torch.manual_seed(0)
    built = Block(16, 2).double()
    for parameter in built.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return built


def run(block, fn, x, seed=1):
    """Output, gradient of x and of every parameter under a random cotangent."""
    block.zero_grad()
    leaf = x.clone().requires_grad_()
    out = fn(leaf)
    torch.manual_seed(seed)
    out.backward(torch.randn_like(out))
    return [out.detach(), leaf.grad, *(p.grad for p in block.parameters())]


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_whole_against_plain(block):
    plain = TransformerBlock(16, 2, 4.0, 1e-6).double()
    plain.load_state_dict(block.state_dict(), strict=True)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    assert_same(run(block, block, x), run(plain, plain, x))


def test_pending_sums(block):
    """(x, delta) in and out stand for x + delta."""
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    want = run(block, block, x)
    assert_same(run(block, lambda y: sum(block(y, pending=True)), x), want)
    assert_same(run(block, lambda y: block(0.25 * y, delta=0.75 * y), x), want)
    tail = run(block, lambda y: block(y)[:, -3:], x)
    assert_same(run(block, lambda y: sum(block.forward_tail(0.25 * y, 3, 0.75 * y, pending=True)), x), tail)


def test_epsilon_matters(block):
    assert block.norm1.eps == block.norm2.eps == 1e-6
    x = torch.randn(1, 3, 16, dtype=torch.float64) * 1e-3
    assert not torch.allclose(block.norm1(x), nn.functional.layer_norm(x, (16,)), rtol=1e-3)


@pytest.mark.parametrize("count", [1, 4, 6, 7])
def test_tail(block, count):
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    want = run(block, lambda y: block(y)[:, -count:], x)
    assert_same(run(block, lambda y: block.forward_tail(y, count), x), want)


@pytest.mark.parametrize("count", [0, 8, -1])
def test_tail_refuses(block, count):
    with pytest.raises(ValueError, match=r"count must lie in \[1, 7\]"):
        block.forward_tail(torch.randn(2, 7, 16, dtype=torch.float64), count)


@pytest.mark.parametrize("keep", [2, [0, 3, 5]])
def test_masked(block, keep):
    """Ragged and uniform plans, with prefix tokens."""
    plan = masking.random(3, 5, keep=keep, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 2 + 5, 16, dtype=torch.float64)
    want = run(block, lambda y: block(y)[:, 2:].reshape(-1, 16)[plan.masked.long()], x)
    assert_same(run(block, lambda y: block.forward_masked(y, plan, prefix=2), x), want)


def test_packed_equals_each_alone(block):
    starts = [0, 3, 4, 9]
    x = torch.randn(9, 16, dtype=torch.float64)
    packing = Packing(torch.tensor(starts, dtype=torch.int32), 5)
    want = run(block, lambda y: torch.cat([block(y[None, a:b])[0] for a, b in itertools.pairwise(starts)]), x)
    assert_same(run(block, lambda y: block(y, packing), x), want)


def test_heads_must_divide():
    with pytest.raises(ValueError, match="multiple of the number of heads"):
        Block(16, 3)
