"""White-box blocks: attention of one projection is that of three equal ones; the sparse code is its formula, a descent,
and not negative."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maefast.bench.peers.plain import parameters
from maefast.bench.peers.recipes.crate_mae import compress, expand, mssa
from maefast.nn import ISTA, MSSA, CompressBlock, ExpandBlock, Packing


def scattered(module: nn.Module) -> nn.Module:
    """In float64, every parameter with a value of its own."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def assert_equal(module, x, fn, want_fn, tolerance=1e-11):
    """Outputs and gradients of x and of every parameter, under a random cotangent."""
    found, cotangent = [], None
    for run in (fn, want_fn):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        cotangent = torch.randn_like(out) if cotangent is None else cotangent
        out.backward(cotangent.to(out.dtype))
        found.append([out.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters())])
    for got, want in zip(*found):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("length", "heads"), [(1, 1), (5, 2), (37, 4)])
def test_attention_is_that_of_three_equal_tensors(length, heads):
    attention = scattered(MSSA(32, heads))
    x = torch.randn(3, length, 32, dtype=torch.float64)
    assert_equal(attention, x, attention, lambda x: mssa(x, parameters(attention), heads))

    def copies(x):
        """Ordinary attention whose three projections are equal: their gradients add up in the one."""
        q, k, v = F.linear(x, attention.subspaces.weight.repeat(3, 1)).unflatten(2, (3, heads, -1)).unbind(2)
        out = torch.einsum("bqhd,bkhd->bhqk", q, k).mul((32 // heads) ** -0.5).softmax(3)
        return attention.proj(torch.einsum("bhqk,bkhd->bqhd", out, v).flatten(2))

    assert_equal(attention, x, attention, copies)


def test_attention_in_float32():
    """Whichever kernel takes it, and reads one tensor three times."""
    exact = scattered(MSSA(32, 2))
    low = MSSA(32, 2)
    low.load_state_dict(exact.state_dict())
    x = torch.randn(2, 19, 32)
    assert_equal(low, x, low, lambda x: mssa(x, parameters(low), 2), 1e-4)
    torch.testing.assert_close(low(x).double(), exact(x.double()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [MSSA, CompressBlock, ExpandBlock])
def test_packed_equals_each_alone(kind):
    module, lengths = scattered(kind(16, 2)), [4, 1, 9]
    cu_seqlens = torch.tensor([0, 4, 5, 14], dtype=torch.int32)
    x = torch.randn(14, 16, dtype=torch.float64)
    apart = lambda x: torch.cat([module(part[None])[0] for part in x.split(lengths)])  # noqa: E731
    assert_equal(module, x, lambda x: module(x, Packing(cu_seqlens, 9)), apart)


@pytest.mark.parametrize(("step", "threshold"), [(0.1, 0.5), (0.3, 0), (1, 0.01)])
def test_ista_is_its_formula(step, threshold):
    module = scattered(ISTA(12, step, threshold))
    u = torch.randn(4, 7, 12, dtype=torch.float64)

    def published(u):
        d = module.weight
        columns = u.transpose(1, 2)
        found = columns + step * (d.T @ columns - d.T @ d @ columns) - step * threshold
        return found.clamp(min=0).transpose(1, 2)

    assert_equal(module, u, module, published)
    assert module(u).min() == 0
    assert f"step={float(step)}, threshold={float(threshold)}" in repr(module)


def test_ista_descends():
    """From a first guess that is allowed, z = u >= 0, with a step below 1 / |D|^2."""
    u = torch.randn(50, 12, dtype=torch.float64).abs()
    module = ISTA(12).double()
    module.step = float(0.9 / torch.linalg.matrix_norm(module.weight.detach(), 2) ** 2)

    def objective(z):
        return (u - F.linear(z, module.weight)).square().sum(1) / 2 + module.threshold * z.sum(1)

    z = module(u)
    assert (objective(z) < objective(u)).all()
    assert (z == 0).any()


def test_blocks_are_their_formulas():
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    block = scattered(CompressBlock(16, 2, 0.2, 0.3))
    assert_equal(block, x, block, lambda x: compress(x, parameters(block), 2, 0.2, 0.3))
    block = scattered(ExpandBlock(16, 2))
    assert_equal(block, x, block, lambda x: expand(x, parameters(block), 2))


def test_the_stream_stays_in_float32_under_autocast():
    block, x = CompressBlock(16, 2), torch.randn(2, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = block(x)
    assert low.dtype is torch.float32
    torch.testing.assert_close(low, block(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MSSA(16, 3), ValueError, "multiple of the number of heads"),
        (lambda: MSSA(16, 0), ValueError, "multiple of the number of heads"),
        (lambda: ISTA(16, step=0), ValueError, "step must be positive"),
        (lambda: ISTA(16, step="0.1"), TypeError, "step must be a number"),
        (lambda: ISTA(16, threshold=-1), ValueError, "threshold must not be negative"),
        (lambda: ISTA(16, threshold=float("nan")), ValueError, "threshold must not be negative"),
        (lambda: CompressBlock(16, 5), ValueError, "multiple of the number of heads"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
