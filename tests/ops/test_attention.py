"""The attention seam: softmax(q k^T scale) v, dense and packed, self and cross."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import ops

from .common import assert_close, property_test


def by_hand(q, k, v, scale):
    """[S, H, D] each, one head at a time."""
    heads = []
    for h in range(q.shape[1]):
        weights = (q[:, h] @ k[:, h].T * scale).softmax(-1)
        heads.append(weights @ v[:, h])
    return torch.stack(heads, 1)


@given(data=st.data())
@property_test
def test_packed_and_dense_self_attention(data):
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    heads, width = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([4, 8, 20]))
    scale = data.draw(st.sampled_from([None, 0.3]))
    qkv = torch.randn(batch, length, 3, heads, width, dtype=torch.float64, requires_grad=True)
    want = torch.stack([by_hand(*x.unbind(1), scale or width**-0.5) for x in qkv])
    dense = ops.attention(qkv, scale=scale)
    assert_close(dense, want, torch.float64)
    cu = torch.arange(batch + 1, dtype=torch.int32) * length
    packed = ops.attention(qkv.flatten(0, 1), cu_seqlens_q=cu, scale=scale)
    assert_close(packed, want.flatten(0, 1), torch.float64)
    weights = torch.randn_like(want)
    grads = [torch.autograd.grad(out, qkv, weights, retain_graph=True)[0] for out in (dense, want)]
    assert_close(grads[0], grads[1], torch.float64)


@given(data=st.data())
@property_test
def test_ragged_cross_attention(data):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=4))
    cu_q = torch.tensor([0, *(a for a, _ in pairs)]).cumsum(0).int()
    cu_k = torch.tensor([0, *(b for _, b in pairs)]).cumsum(0).int()
    q = torch.randn(int(cu_q[-1]), 2, 8, dtype=torch.float64)
    kv = torch.randn(int(cu_k[-1]), 2, 2, 8, dtype=torch.float64)
    out = ops.attention(q, kv, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert out.shape == q.shape
    for i in range(len(pairs)):
        keys = kv[cu_k[i] : cu_k[i + 1]]
        rows = slice(int(cu_q[i]), int(cu_q[i + 1]))
        assert_close(out[rows], by_hand(q[rows], keys[:, 0], keys[:, 1], 8**-0.5), torch.float64)


def cu(*starts):
    return torch.tensor(starts, dtype=torch.int32)


QKV, Q, KV = torch.randn(2, 5, 3, 2, 8), torch.randn(2, 4, 2, 8), torch.randn(2, 5, 2, 2, 8)
BAD = [
    (lambda: ops.attention(Q), ValueError, "interleaved qkv"),
    (lambda: ops.attention(Q, QKV), ValueError, "kv must be interleaved"),
    (lambda: ops.attention(Q, KV[..., :4]), ValueError, "kv must be interleaved"),
    (lambda: ops.attention(Q, KV[0]), ValueError, "5 dimensions"),
    (lambda: ops.attention(QKV, cu_seqlens_q=cu(0, 5, 10)), ValueError, "packed input"),
    (lambda: ops.attention(QKV[0]), ValueError, "needs cu_seqlens_q"),
    (lambda: ops.attention(QKV[0], cu_seqlens_q=cu(0, 4)), ValueError, "must rise from 0"),
    (lambda: ops.attention(QKV[0], cu_seqlens_q=cu(0, 4, 3, 5)), ValueError, "must rise from 0"),
    (lambda: ops.attention(QKV.int()), TypeError, "float32"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
