from __future__ import annotations

import pytest
import torch

from maefast.nn import run_blocks, topk
from maefast.nn.encoder import make_blocks
from maefast.nn.topk import run_topk_blocks, topk_attention


def given(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=torch.double, generator=generator).requires_grad_() for _ in range(3)]


def loop(q, k, v, count, scale=None):
    """Each query by itself."""
    scale, out = q.shape[3] ** -0.5 if scale is None else scale, torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                scores = (k[b, h] @ q[b, h, i]) * scale
                kept = scores >= sorted(scores.tolist(), reverse=True)[min(count, len(scores)) - 1]
                out[b, h, i] = scores[kept].softmax(0) @ v[b, h][kept]
    return out


@pytest.mark.parametrize("threads", [0, 99])
@pytest.mark.parametrize("count", [1, 3, 7, 8])
def test_rows_are_those_of_a_loop(count, threads, monkeypatch):
    """Either way to select, and every gradient."""
    monkeypatch.setattr(topk, "FEW_THREADS", threads)
    inputs = given(2, 2, 7, 4)
    grad = torch.randn(2, 2, 7, 4, dtype=torch.double)
    mine, want = topk_attention(*inputs, count, 0.7), loop(*inputs, count, 0.7)
    torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(mine, inputs, grad), torch.autograd.grad(want, inputs, grad)):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_ties_stay_and_all_keys_are_ordinary_attention():
    q, k, v = (t.detach() for t in given(1, 1, 3, 4))
    k[:, :, 1] = k[:, :, 0]
    want = loop(q, k, v, 1)
    torch.testing.assert_close(topk_attention(q, k, v, 1), want, rtol=1e-12, atol=1e-12)
    whole = (q @ k.transpose(2, 3) / 2).softmax(3) @ v
    for count in (3, 5):
        torch.testing.assert_close(topk_attention(q, k, v, count), whole, rtol=1e-12, atol=1e-12)


def test_low_precision_selects_in_float32():
    q, k, v = (t.detach().bfloat16() for t in given(1, 2, 40, 8))
    kept = topk._largest(q, k, 10)
    exact = q.float() @ k.float().transpose(2, 3)
    assert torch.equal(kept, exact >= exact.topk(10).values[..., -1:])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(topk._largest(q.float(), k.float(), 10), kept)
    assert topk_attention(q, k, v, 10).dtype is torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"bias": "qv", "layer_scale": 0.3}])
def test_blocks(options):
    torch.manual_seed(0)
    blocks = make_blocks(16, 3, 2, 2.0, 1e-6, **options).double()
    for parameter in blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 9, 16, dtype=torch.double)
    one, two = (sum(run) for run in (run_topk_blocks(blocks, x, 9), run_blocks(blocks, x)))
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(sum(run_topk_blocks(blocks, x, 3)), two)


def test_bad_input():
    q, k, v = given(2, 2, 7, 4)
    for wrong in ((q, k, v[:, :, :3]), (q[:1], k, v), (q[..., :2], k, v)):
        with pytest.raises(ValueError, match="q must be"):
            topk_attention(*wrong, 3)
    with pytest.raises(ValueError, match="count must be at least 1"):
        topk_attention(q, k, v, 0)
    with pytest.raises(TypeError, match="k must be"):
        topk_attention(q, k.long(), v, 3)
    with pytest.raises(ValueError, match="scale must be"):
        topk_attention(q, k, v, 3, scale=-1.0)
