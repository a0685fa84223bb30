"""attention where scores are so large that their rounding shows in every exponent: outputs and gradients stay exact."""

from __future__ import annotations

import pytest
import torch

from maefast import ops

from .common import assert_close
from .test_attention import BACKENDS, DTYPES, randn, starts

GRADIENTS = BACKENDS[:2]


@pytest.mark.parametrize("where", BACKENDS)
def test_large_scores(where):
    """Scores up to a few thousand: the maximum is taken out before the exponentials, and lse keeps it."""
    backend, device = where
    qkv = randn(1, 20, 3, 1, 32).mul(20).to(device)
    out, stats = ops.attention(qkv, stats=True, backend=backend)
    want, exact = ops.attention(qkv.double(), stats=True, backend="reference")
    # Rounding of a score, 2^-24 of some thousands, is what is left in the exponent.
    assert float((out.double() - want).abs().max()) < 0.02
    assert_close(stats.lse, exact.lse, torch.float32)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize(("size", "dtype"), [(1e6, torch.float32), (1e15, torch.float32), (6e4, torch.float16)])
@pytest.mark.parametrize("length", [2, 300])
def test_scores_whose_rounding_exceeds_every_exponent(where, size, dtype, length):
    """Half a unit in the last place of a score is 2^127 and more."""
    backend, device = where
    qkv = torch.linspace(size / 2, size, 16 * length).view(1, length, 1, 1, 16).repeat(1, 1, 3, 1, 1).to(device, dtype)
    qkv[:, :, 2] = randn(1, length, 1, 16)
    out, want = (ops.attention(t, backend=b) for t, b in ((qkv, backend), (qkv.double(), "reference")))
    assert_close(out, want, dtype)


# The largest scores of these, some 30 to 3e11, are each query's product with itself.
LARGE = [1, 10, 1e3, 1e5]


@pytest.mark.parametrize("where", GRADIENTS)
@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"bias": True}, {"stats": True}], ids=str)
def test_gradients_of_large_scores(where, size, options):
    """P comes from a rounded log-sum-exp; of up to 256 keys it is made to sum to 1."""
    backend, device = where
    x = randn(1, 37, 1, 2, 64)
    qkv = torch.cat([size * x, size * x, randn(1, 37, 1, 2, 64, seed=1)], 2)
    bias = 30 * randn(2, 37, 37, seed=2) if options.get("bias") else None
    seed = randn(1, 37, 2, 64, seed=3)

    def grads(t, backend):
        t = t.clone().requires_grad_()
        extra = {} if bias is None else {"bias": bias.to(t.dtype)}
        found = ops.attention(t, **{**options, **extra}, backend=backend)
        out, stats = found if options.get("stats") else (found, None)
        total = (out * seed.to(t.dtype)).sum()
        if stats is not None:
            total = total + 3 * stats.entropy.sum() + stats.lse.sum()
        return torch.autograd.grad(total, t)[0]

    got, want = grads(qkv.to(device), backend), grads(qkv.double(), "reference")
    assert_close(got[:, :, 2], want[:, :, 2], torch.float32)
    assert_close(got, want, torch.float32)


@pytest.mark.parametrize("where", GRADIENTS)
@pytest.mark.parametrize("size", [64, 1024, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_scores_far_from_zero(where, size, dtype):
    """Products are integers of up to 24 bits and differ by little: every digit of P must come out."""
    backend, device = where
    qkv = torch.randint(-2, 3, (1, 37, 3, 1, 64), generator=torch.Generator().manual_seed(0)).float()
    qkv[:, :, :2, :, 0] = torch.tensor([size, 2048.0])[:, None]
    seed = randn(1, 37, 1, 64).to(dtype)
    found = []
    for t, b in ((qkv.to(device, dtype), backend), (qkv.double(), "reference")):
        out = ops.attention(t.requires_grad_(), backend=b)
        found.append((out, torch.autograd.grad(out, t, seed.to(t))[0][:, :, 2]))
    for got, want in zip(*found):
        assert_close(got, want, dtype)


@pytest.mark.parametrize("where", GRADIENTS)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [1, 3])
def test_equal_keys_share_the_gradient(where, size, dtype, keys):
    """However large their scores are; with one key P is 1."""
    backend, device = where
    q = size * randn(5, 1, 16)
    kv = (size * randn(1, 2, 1, 16, seed=1)).repeat(keys, 1, 1, 1)
    q, kv = q.to(device, dtype).requires_grad_(), kv.to(device, dtype).requires_grad_()
    cu = {"cu_seqlens_q": starts([5], device), "cu_seqlens_k": starts([keys], device)}
    (grad,) = torch.autograd.grad(ops.attention(q, kv, **cu, backend=backend).sum(), kv)
    assert_close(grad[:, 1], torch.full((keys, 1, 16), 5 / keys), torch.float32 if keys == 1 else dtype)


@pytest.mark.parametrize("where", GRADIENTS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_many_keys_stay_finite(where, causal):
    backend, device = where
    qkv = (1e6 * randn(1, 300, 3, 1, 16)).to(device).requires_grad_()
    (grad,) = torch.autograd.grad(ops.attention(qkv, causal=causal, backend=backend).sum(), qkv)
    assert grad.isfinite().all()
    assert grad[:, :, 2].abs().max() <= 300
