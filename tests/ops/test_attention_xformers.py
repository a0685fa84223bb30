"""The call that xformers gets, on a stand-in that records it and computes what xformers documents."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from maefast import ops
from maefast.ops import _attention_table as table

from .common import assert_close

CALL = table.Call("cuda", torch.float32, 16, 7, 7, packed=True, cross=False, causal=False, extras=False)


class Mask:
    """Of q and kv lengths: which keys a query sees in a packed batch."""

    causal = False

    def __init__(self, lengths=None, lengths_k=None):
        self.lengths, self.lengths_k = lengths, lengths_k

    def allowed(self, rows: int, keys: int) -> torch.Tensor:
        if self.lengths is None:
            return torch.ones(rows, keys, dtype=torch.bool).tril()
        blocks = [torch.ones(n, m, dtype=torch.bool) for n, m in zip(self.lengths, self.lengths_k, strict=True)]
        return torch.block_diag(*(b.tril() if self.causal else b for b in blocks)).bool()


class BlockDiagonalMask(Mask):
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert device == torch.device("cpu")
        return cls(q_seqlen, kv_seqlen or q_seqlen)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    causal = True


class OlderMask(Mask):
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None):
        return cls(q_seqlen, kv_seqlen or q_seqlen)


class LowerTriangularMask(Mask):
    pass


@pytest.fixture
def fake(monkeypatch):
    """xformers' modules; `calls` holds (q's shape, mask, scale)."""
    calls = []

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        calls.append((tuple(query.shape), attn_bias, scale))
        mask = None if attn_bias is None else attn_bias.allowed(query.shape[1], key.shape[1])
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, dropout_p=p).transpose(1, 2)

    modules = {name: ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha.attn_bias")}
    modules["xformers.ops"].memory_efficient_attention = memory_efficient_attention
    for kind in (BlockDiagonalMask, BlockDiagonalCausalMask, LowerTriangularMask):
        setattr(modules["xformers.ops.fmha.attn_bias"], kind.__name__, kind)
    modules["xformers.ops.fmha"] = ModuleType("xformers.ops.fmha")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(table, "unavailable", lambda name, call: None)  # here there is only a CPU
    table._xformers.cache_clear()
    yield modules["xformers.ops.fmha.attn_bias"], calls
    table._xformers.cache_clear()


def starts(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True)


def check(found, want, *inputs):
    """Output and gradients against the reference's."""
    assert_close(found, want, torch.float32)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(found, inputs, weight), torch.autograd.grad(want, inputs, weight), strict=True):
        assert_close(a, b, torch.float32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_packed(fake, causal, scale):
    qkv, cu = randn(12, 3, 2, 16), starts(4, 0, 1, 7)
    options = {"cu_seqlens_q": cu, "causal": causal, "scale": scale}
    check(ops.attention(qkv, backend="xformers", **options), ops.attention(qkv, **options, backend="reference"), qkv)
    ((shape, mask, used),) = fake[1]
    assert shape == (1, 12, 2, 16)
    assert type(mask) is (BlockDiagonalCausalMask if causal else BlockDiagonalMask)
    assert mask.lengths == mask.lengths_k == [4, 0, 1, 7]
    assert used == (0.25 if scale is None else scale)


def test_packed_cross(fake):
    q, kv = randn(6, 2, 16), randn(11, 2, 2, 16)
    options = {"cu_seqlens_q": starts(1, 5, 0), "cu_seqlens_k": starts(3, 6, 2), "scale": 0.3}
    check(
        ops.attention(q, kv, backend="xformers", **options), ops.attention(q, kv, **options, backend="reference"), q, kv
    )
    ((shape, mask, scale),) = fake[1]
    assert shape == (1, 6, 2, 16)
    assert type(mask) is BlockDiagonalMask
    assert (mask.lengths, mask.lengths_k, scale) == ([1, 5, 0], [3, 6, 2], 0.3)


def test_packed_with_an_older_one(fake):
    fake[0].BlockDiagonalMask = OlderMask
    qkv, cu = randn(5, 3, 1, 16), starts(2, 3)
    want = ops.attention(qkv, cu_seqlens_q=cu, backend="reference")
    check(ops.attention(qkv, cu_seqlens_q=cu, backend="xformers"), want, qkv)
    assert type(fake[1][0][1]) is OlderMask


@pytest.mark.parametrize("causal", [False, True])
def test_dense(fake, causal):
    qkv = randn(2, 5, 3, 2, 16)
    want = ops.attention(qkv, causal=causal, backend="reference")
    check(ops.attention(qkv, causal=causal, backend="xformers"), want, qkv)
    ((shape, mask, _),) = fake[1]
    assert shape == (2, 5, 2, 16)
    assert type(mask) is (LowerTriangularMask if causal else type(None))


def test_dense_cross(fake):
    q, kv = randn(2, 3, 2, 16), randn(2, 6, 2, 2, 16)
    check(ops.attention(q, kv, backend="xformers"), ops.attention(q, kv, backend="reference"), q, kv)
    assert fake[1][0][1] is None


def test_queries_without_keys_are_refused(fake):
    with pytest.raises(ValueError, match="queries without keys"):
        ops.attention(
            randn(3, 1, 16),
            randn(2, 2, 1, 16),
            cu_seqlens_q=starts(2, 1),
            cu_seqlens_k=starts(2, 0),
            backend="xformers",
        )
    with pytest.raises(ValueError, match="queries without keys"):
        ops.attention(randn(2, 3, 1, 16), randn(2, 0, 2, 1, 16), backend="xformers")
    assert not fake[1]


# --- where it is not to be had ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "CUDA only"),
        ({"dtype": torch.float64}, "float32, float16 and bfloat16"),
        ({"head_dim": 20}, "steps of 8"),
        ({"extras": True}, "no biases by head"),
    ],
)
def test_calls_it_cannot_take(change, reason):
    assert reason in table.unavailable("xformers", CALL._replace(**change))


@pytest.fixture
def module(monkeypatch):
    """Put something in place of xformers.ops."""
    table._xformers.cache_clear()
    yield lambda name, value: monkeypatch.setitem(sys.modules, name, value)
    table._xformers.cache_clear()


def test_installed(module):
    module("xformers", ModuleType("xformers"))
    module("xformers.ops", ModuleType("xformers.ops"))
    assert table.unavailable("xformers", CALL) is None


def test_does_not_import(module, monkeypatch):
    def fail(name):
        raise OSError("undefined symbol")

    monkeypatch.setattr(table.importlib, "import_module", fail)
    assert table.unavailable("xformers", CALL) == "xformers does not import: OSError: undefined symbol"


def test_not_installed(monkeypatch, module):
    def missing(name):
        raise ModuleNotFoundError("No module named 'xformers'", name="xformers")

    monkeypatch.setattr(table.importlib, "import_module", missing)
    assert table.unavailable("xformers", CALL) == "xformers is not installed"
    with pytest.raises(RuntimeError, match="xformers has attention on CUDA only"):
        ops.attention(torch.zeros(1, 3, 3, 1, 16), backend="xformers")


def test_never_chosen_unasked():
    assert "xformers" in table.LIBRARIES
    assert "xformers" not in {rule.backend for rule in table.TABLE}
