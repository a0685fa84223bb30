"""attention with a bias of pairs and with a rotation, and `relative_bias`; forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import masking, ops
from maefast.ops import _registry

from .common import assert_close, backends, compare, property_test
from .test_attention import DTYPES, WIDTHS, joined, randn, starts
from .test_transformer_block import make_weights, to

BACKENDS = backends("attention", cuda=False)
KERNELS = backends("attention", reference=False, cuda=False)
INF = float("inf")


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [B, S, H, D] rotated, by a matrix: turn(x) = x @ turn."""
    width = x.shape[-1]
    turn = torch.zeros(width, width, dtype=x.dtype)
    for i in range(width // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
        turn[b, a], turn[a, b] = -1, 1
    return x * cos.unsqueeze(-2) + (x @ turn) * sin.unsqueeze(-2)


def by_hand(q, k, v, bias, scale):
    """[S, H, D] each, bias [H, Sq, Sk]."""
    scores = torch.stack([q[:, h] @ k[:, h].T for h in range(q.shape[1])]) * scale + bias
    return torch.stack([w @ v[:, h] for h, w in enumerate(scores.softmax(-1))], 1)


@given(data=st.data())
@property_test
def test_reference_by_hand(data):
    groups, more, length = (data.draw(st.integers(1, n)) for n in (3, 2, 6))
    heads, width = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([2, 4, 20]))
    batch = groups * more
    qkv = torch.randn(batch, length, 3, heads, width).double().requires_grad_()
    bias = torch.randn(groups, data.draw(st.sampled_from([1, heads])), length, length).double().requires_grad_()
    rows = data.draw(st.sampled_from([(length, width), (batch, length, width)]))
    cos, sin = torch.randn(2, *rows).double()  # not the cosine and sine of anything: any numbers will do
    interleaved = data.draw(st.booleans())
    out = ops.attention(qkv, bias=bias, rope=ops.Rope(cos, sin, interleaved), backend="reference")
    q, k, v = qkv.unbind(2)
    q, k = (turned(t, cos, sin, interleaved) for t in (q, k))
    want = torch.stack([by_hand(q[b], k[b], v[b], bias[b % groups], width**-0.5) for b in range(batch)])
    assert_close(out, want, torch.float64)
    weights = torch.randn_like(want)
    for got, grad in zip(*(torch.autograd.grad(t, (qkv, bias), weights) for t in (out, want))):
        assert_close(got, grad, torch.float64)


# --- every backend against the reference in float64 ---------------------------------------------------------------


@st.composite
def cases(draw):
    """Inputs, constants and options of a dense call."""
    cross, seed = draw(st.booleans()), draw(st.integers(0, 1000))
    queries, keys = draw(st.integers(1, 20)), draw(st.integers(2, 20))
    queries = queries if cross else keys
    groups, more = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch, heads, width = groups * more, draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from(WIDTHS))
    inputs = {"q": randn(batch, queries, heads, width, seed=seed)}
    if cross:
        inputs["kv"] = randn(batch, keys, 2, heads, width, seed=seed + 1)
    else:
        inputs["q"] = randn(batch, keys, 3, heads, width, seed=seed)
    rope = None
    if not cross and draw(st.booleans()):
        rows = draw(st.sampled_from([(keys, width), (batch, keys, width)]))
        rope = ops.Rope(*randn(2, *rows, seed=seed + 3), draw(st.booleans()))
    if rope is None or draw(st.booleans()):
        heads_of_bias = draw(st.sampled_from([1, heads]))
        bias = randn(groups, heads_of_bias, queries, keys, seed=seed + 2)
        if draw(st.booleans()):
            bias[randn(*bias.shape, seed=seed + 4) > 0.8] = -INF
        inputs["bias"] = bias
    if draw(st.booleans()):
        inputs["key_bias"] = randn(batch, keys, heads, seed=seed + 5)
    options = {"scale": draw(st.sampled_from([None, 0.25, -0.1])), "causal": not cross and draw(st.booleans())}
    options["stats"] = draw(st.booleans())
    marked = randn(batch, keys, seed=seed) > 0 if options["stats"] and draw(st.booleans()) else None
    return inputs, rope, options, marked


def caller(rope, options, marked=None):
    """(backend, device, q, kv, bias, key_bias) -> one tensor, zero where a query sees no key."""

    def call(backend, device, q, **inputs):
        rotation = rope if rope is None else ops.Rope(rope.cos.to(device), rope.sin.to(device), rope.interleaved)
        mark = None if marked is None else marked.to(device)
        result = ops.attention(q, **inputs, rope=rotation, marked=mark, **options, backend=backend)
        out = joined(result, slice(None))
        return out.masked_fill(out.detach() == -INF, 0)

    return call


@pytest.mark.parametrize("where", BACKENDS)
@given(case=cases(), data=st.data())
@property_test
def test_every_gradient(where, case, data):
    backend, device = where
    inputs, rope, options, marked = case
    compare(caller(rope, options, marked), inputs, backend, device, data.draw(st.sampled_from(DTYPES)))


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_head_width(where, width, dtype, interleaved):
    backend, device = where
    inputs = {"q": randn(6, 19, 3, 2, width), "bias": randn(3, 2, 19, 19, seed=1)}
    rope = ops.Rope(*randn(2, 19, width, seed=2), interleaved)
    compare(caller(rope, {"stats": False}), inputs, backend, device, dtype)


# Around the blocks of 64 queries and 256 keys, the vectors of 4, 8 and 16 lanes, and beyond.
LENGTHS = [1, 2, 15, 16, 17, 33, 49, 64, 65, 129, 197, 257, 520]


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(where, length, causal, dtype):
    backend, device = where
    inputs = {"q": randn(2, length, 3, 2, 32), "bias": randn(1, 2, length, length, seed=1)}
    rope = ops.Rope(*randn(2, 2, length, 32, seed=2), True)
    compare(caller(rope, {"stats": False, "causal": causal}), inputs, backend, device, dtype)


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("pair", [(1, 600), (600, 2), (300, 290), (70, 513)], ids=str)
def test_long_cross_attention_with_everything(where, pair):
    backend, device = where
    inputs = {"q": randn(2, pair[0], 2, 24), "kv": randn(2, pair[1], 2, 2, 24, seed=1)}
    inputs |= {"bias": randn(2, 2, *pair, seed=2), "key_bias": randn(2, pair[1], 2, seed=3)}
    marked = torch.arange(2 * pair[1]).view(2, -1) % 5 == 0
    compare(caller(None, {"stats": True}, marked), inputs, backend, device, torch.float32)


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_rotation(where, interleaved, dtype):
    """Each row by its own angle, whatever its sequence."""
    backend, device = where
    lengths = [5, 0, 70, 1, 300]
    rope = ops.Rope(*randn(2, sum(lengths), 40, seed=1), interleaved)

    def call(backend, device, q):
        rotation = ops.Rope(rope.cos.to(device), rope.sin.to(device), interleaved)
        return ops.attention(q, cu_seqlens_q=starts(lengths, device), rope=rotation, backend=backend)

    compare(call, {"q": randn(sum(lengths), 3, 2, 40)}, backend, device, dtype)


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_minus_infinity_rules_a_pair_out(where, dtype):
    """As a mask does; a query that sees no key gets zeros, and nothing flows back through it."""
    backend, device = where
    length, lowest = 70, torch.finfo(torch.float32).min
    bias = randn(2, 1, length, length).to(device)
    never = randn(2, 1, length, length, seed=1).to(device) > 0.5
    never[0, 0, 3], never[1, 0, 60:] = True, True
    blind = never.all(-1).transpose(1, 2).repeat(2, 1, 2)  # [B, S, H]
    bias = bias.masked_fill(never, -INF).masked_fill(never & (bias > 0), lowest).requires_grad_()
    qkv = randn(4, length, 3, 2, 16, seed=2).to(device, dtype).requires_grad_()
    out, stats = ops.attention(qkv, bias=bias, stats=True, backend=backend)
    assert torch.equal(stats.lse == -INF, blind)
    assert not out[blind].any()
    grad_lse = torch.ones_like(stats.lse).masked_fill(blind, INF)
    grad, grad_bias = torch.autograd.grad((out, stats.lse), (qkv, bias), (torch.ones_like(out), grad_lse))
    assert bool(grad.isfinite().all())
    assert not grad[:, :, 0][blind].any()
    assert not grad_bias[never].any()
    assert float(grad_bias[~never].abs().min()) > 0


@pytest.mark.parametrize("where", BACKENDS)
def test_ones_and_zeros_leave_a_token_as_it_is(where):
    backend, device = where
    qkv = randn(2, 30, 3, 2, 32).to(device)
    cos, sin = torch.ones(30, 32, device=device), torch.zeros(30, 32, device=device)
    for interleaved in (False, True):
        out = ops.attention(qkv, rope=ops.Rope(cos, sin, interleaved), backend=backend)
        want = ops.attention(qkv, backend=backend)
        assert torch.equal(out, want)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_agree_bit_for_bit(where, dtype):
    backend, device = where
    qkv = randn(12, 49, 3, 3, 48).to(device, dtype).requires_grad_()
    bias = randn(2, 3, 49, 49, seed=1).to(device).requires_grad_()
    rope = ops.Rope(*randn(2, 49, 48, seed=2).to(device), False)
    runs = []
    for _ in range(3):
        out = ops.attention(qkv, bias=bias, rope=rope, backend=backend)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), [qkv, bias])])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@pytest.mark.parametrize("where", BACKENDS)
def test_frozen_parts_and_other_strides(where):
    backend, device = where
    qkv, bias = randn(4, 9, 3, 2, 16).to(device), randn(9, 2, 9, 2, seed=1).to(device).permute(3, 1, 2, 0)
    cos, sin = randn(2, 16, 9, seed=2).to(device).mT
    want = None
    for needed in ((1, 1), (1, 0), (0, 1)):
        leaves = [t.detach().requires_grad_(bool(n)) for t, n in zip((qkv, bias), needed)]
        out = ops.attention(leaves[0], bias=leaves[1], rope=ops.Rope(cos, sin, True), backend=backend)
        out.square().sum().backward()
        want = want or [leaf.grad for leaf in leaves]
        for leaf, full, n in zip(leaves, want, needed):
            assert (leaf.grad is not None) == bool(n)
            assert not n or torch.equal(leaf.grad, full)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["no sequences", "no tokens"])
def test_nothing(where, shape):
    backend, device = where
    qkv = torch.randn(*shape, 3, 2, 16, device=device, requires_grad=True)
    bias = torch.randn(2, 2, shape[1], shape[1], device=device, requires_grad=True)
    out = ops.attention(qkv, bias=bias, backend=backend)
    assert out.shape == (*shape, 2, 16)
    grads = torch.autograd.grad(out.sum(), (qkv, bias))
    assert grads[0].shape == qkv.shape
    assert grads[1].shape == bias.shape
    assert not grads[1].any()


@pytest.mark.parametrize("where", BACKENDS)
def test_bias_in_16_bits(where):
    backend, device = where
    qkv = randn(2, 9, 3, 2, 16).to(device, torch.bfloat16)
    bias = randn(2, 9, 9, seed=1).to(device, torch.bfloat16).requires_grad_()
    wide = bias.detach().float().requires_grad_()
    outs = [ops.attention(qkv, bias=b, backend=backend) for b in (bias, wide)]
    assert torch.equal(*outs)
    grads = [torch.autograd.grad(out.float().square().sum(), b)[0] for out, b in zip(outs, (bias, wide))]
    assert torch.equal(grads[0], grads[1].bfloat16())


# --- integration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(where, shared):
    backend, device = where
    qkv, bias = randn(8, 3, 2, 16).to(device), randn(2, 2, 4, 4, seed=1).to(device)
    cos, sin = randn(2, 4 if shared else 8, 16, seed=2).to(device)
    options = (2, 4, 4, 0.25, False, None, None, False), (bias, cos, sin, True)
    run, backward = (_registry.raw(op, backend) for op in ("attention", "attention_backward"))
    torch.library.opcheck(run, (qkv, None, None, None, *options[0], *options[1]))
    out, *found = run(qkv, None, None, None, *options[0], *options[1])
    args = (torch.ones_like(out), None, None, None, qkv, None, out, *found, None, None, *options[0], *options[1])
    torch.library.opcheck(backward, (*args, True))


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(where, dynamic):
    backend, device = where

    def step(qkv, table, index, cos, sin):
        bias = ops.relative_bias(table, index)
        out = ops.attention(qkv, bias=bias, rope=ops.Rope(cos, sin, True), backend=backend)
        return out.square().sum()

    torch.compiler.reset()  # backends and kinds of shapes count towards one limit
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, length in ((2, 5), (3, 7), (2, 30)):
        qkv, table = randn(batch, length, 3, 2, 16).to(device), randn(9, 2, seed=1).to(device)
        leaves = [qkv.requires_grad_(), table.requires_grad_()]
        index = torch.arange(length * length, device=device).view(length, length) % 9
        more = index, *randn(2, length, 16, seed=2).to(device)
        got = torch.autograd.grad(compiled(*leaves, *more), leaves)
        for a, b in zip(got, torch.autograd.grad(step(*leaves, *more), leaves)):
            torch.testing.assert_close(a, b)


def test_compiles_with_tables_of_its_own():
    def step(qkv):
        angles = torch.arange(80.0).view(5, 16)
        return ops.attention(qkv, rope=ops.Rope(angles.cos(), angles.sin(), True))

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="eager")
    qkv = randn(2, 5, 3, 2, 16)
    torch.testing.assert_close(compiled(qkv), step(qkv))


# --- inside transformer_block -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("keep", ["lean", "all", "nothing"])
@pytest.mark.parametrize("form", ["all", "tail", "packed", "windows"])
def test_block(where, form, keep):
    backend, device = where
    weights, options = make_weights(scales=form == "all"), {"keep": keep}
    inputs = {"x": randn(4, 10, 32), "qkv_weight": weights.qkv_weight, "bias": randn(2, 10, 10, seed=1)}
    rope = ops.Rope(*randn(2, 10, 16, seed=2), form == "windows")
    if form == "tail":
        inputs["bias"], options["count"], rope = inputs["bias"][:, 6:], 4, None
    if form == "packed":
        del inputs["bias"]
        inputs["x"], rope = inputs["x"].flatten(0, 1), ops.Rope(*randn(2, 40, 16, seed=2), False)
    if form == "windows":
        inputs["bias"] = randn(2, 2, 10, 10, seed=1)

    def call(backend, device, x, qkv_weight, bias=None):
        w = to(weights, device, x.dtype, False)._replace(qkv_weight=qkv_weight)
        rotation = rope and ops.Rope(rope.cos.to(device), rope.sin.to(device), rope.interleaved)
        more = {"cu_seqlens": starts([7, 0, 33], device)} if form == "packed" else {}
        outs = ops.transformer_block(x, None, w, 2, bias=bias, rope=rotation, **options, **more, backend=backend)
        assert backend == "reference" or "TransformerBlock" in type(outs[0].grad_fn).__name__
        return torch.cat(outs, -1)

    compare(call, inputs, backend, device, torch.float32)


@pytest.mark.parametrize("where", KERNELS)
def test_block_under_autocast(where):
    backend, device = where
    weights, bias = to(make_weights(), device, torch.float32), randn(2, 9, 9, seed=1).to(device).requires_grad_()
    x = randn(4, 9, 32).to(device).requires_grad_()
    rope = ops.Rope(*randn(2, 9, 16, seed=2).to(device), False)
    found = []
    for name in (backend, "reference"):
        with torch.autocast(device, torch.bfloat16):
            outs = ops.transformer_block(x, None, weights, 2, bias=bias, rope=rope, backend=name)
        grads = torch.autograd.grad(sum(t.float().square().sum() for t in outs), [x, bias, weights.qkv_weight])
        assert all(t.dtype is torch.float32 for t in grads)
        found.append([*outs, *grads])
    for got, want in zip(*found):
        assert_close(got, want, torch.bfloat16)


@pytest.mark.parametrize("where", KERNELS)
def test_only_the_bias_of_a_block_is_trainable(where):
    backend, device = where
    weights, x = to(make_weights(), device, torch.float32, False), randn(2, 9, 32).to(device)
    bias = randn(2, 9, 9, seed=1).to(device).requires_grad_()
    grads = []
    for name in (backend, "reference"):
        r, delta = ops.transformer_block(x, None, weights, 2, bias=bias, backend=name)
        grads.append(torch.autograd.grad((r + delta).square().sum(), bias)[0])
    assert_close(*grads, torch.float32)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_block_refuses(backend):
    weights, x, bias = make_weights(), randn(2, 5, 32), randn(2, 5, 5, seed=1)
    rope, plan = ops.Rope(*randn(2, 5, 16), False), masking.random(2, 5, keep=2, backend="reference")
    for options, message in (
        ({"bias": bias, "masked": plan}, "bias goes with dense input"),
        ({"bias": bias, "count": 2}, r"bias must be \[G, 2, 2, 5\]"),
        ({"bias": bias[:, 1:]}, r"bias must be \[G, 2, 5, 5\]"),
        ({"rope": rope, "masked": plan}, "self-attention of all tokens only"),
        ({"rope": rope, "count": 2}, "self-attention of all tokens only"),
        ({"rope": ops.Rope(rope.cos[:4], rope.sin[:4], False)}, "rope.cos and rope.sin must both be"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.transformer_block(x, None, weights, 2, **options, backend=backend)


# --- relative_bias, and bad input ---------------------------------------------------------------------------------


@given(data=st.data())
@property_test
def test_relative_bias(data):
    rows, heads, queries, keys = (data.draw(st.integers(1, 7)) for _ in range(4))
    table = torch.randn(rows, heads, dtype=torch.float64, requires_grad=True)
    index = torch.randint(rows, (queries, keys))
    out = ops.relative_bias(table, index)
    assert torch.equal(out, table[index].permute(2, 0, 1))
    seed = torch.randn_like(out)
    want = torch.autograd.grad(table[index], table, seed.permute(1, 2, 0))
    assert_close(torch.autograd.grad(out, table, seed)[0], want[0], torch.float64)


def test_relative_bias_gradgradcheck():
    table, index = torch.randn(5, 2, dtype=torch.float64, requires_grad=True), torch.arange(6).view(2, 3) % 5
    assert torch.autograd.gradgradcheck(lambda t: ops.relative_bias(t, index).square(), table)


QKV, Q, KV = torch.randn(4, 5, 3, 2, 16), torch.randn(4, 3, 2, 16), torch.randn(4, 5, 2, 2, 16)
BIAS, ANGLE = torch.randn(2, 2, 5, 5), torch.randn(5, 16)
ROPE = ops.Rope(ANGLE.cos(), ANGLE.sin(), False)
PACKED = {"cu_seqlens_q": starts([15, 5])}
TABLE, INDEX = torch.randn(9, 2), torch.arange(25).view(5, 5) % 9
BAD = [
    (lambda: ops.attention(QKV, bias=BIAS[..., :4]), ValueError, r"bias must be \[G, 2, 5, 5\]"),
    (lambda: ops.attention(QKV, bias=BIAS[0, 0]), ValueError, "bias must have 3 or 4 dimensions"),
    (lambda: ops.attention(Q, KV, bias=BIAS), ValueError, r"bias must be \[G, 2, 3, 5\]"),
    (lambda: ops.attention(QKV, bias=BIAS.repeat(2, 2, 1, 1)), ValueError, "bias must be"),
    (lambda: ops.attention(QKV, bias=BIAS.repeat(2, 1, 1, 1)[:3]), ValueError, "3 groups, .* sequences, 4"),
    (lambda: ops.attention(QKV, bias=BIAS[:0]), ValueError, "0 groups"),
    (lambda: ops.attention(QKV, bias=BIAS.double()), TypeError, "bias must be float32"),
    (lambda: ops.attention(QKV, bias=BIAS.to("meta")), ValueError, "one device"),
    (lambda: ops.attention(QKV, bias=[1.0]), TypeError, "bias must be a torch.Tensor"),
    (lambda: ops.attention(QKV.flatten(0, 1), bias=BIAS, **PACKED), ValueError, "bias goes with dense input"),
    (lambda: ops.attention(QKV, bias=BIAS, backend="sdpa"), RuntimeError, "sdpa has no biases"),
    (lambda: ops.attention(QKV, rope=ROPE, backend="sdpa"), RuntimeError, "sdpa has no biases"),
    (lambda: ops.attention(QKV, rope=tuple(ROPE)), TypeError, "maefast.ops.Rope"),
    (lambda: ops.attention(Q, KV, rope=ROPE), ValueError, "self-attention of all tokens only"),
    (lambda: ops.attention(QKV, rope=ROPE._replace(sin=ROPE.sin[:4])), ValueError, "both be"),
    (lambda: ops.attention(QKV, rope=ROPE._replace(sin=ROPE.sin.expand(4, -1, -1))), ValueError, "both be"),
    (lambda: ops.attention(QKV, rope=ROPE._replace(cos=ROPE.cos.double())), TypeError, "rope.cos must be float32"),
    (lambda: ops.attention(QKV, rope=ROPE._replace(cos=ROPE.cos.to("meta"))), ValueError, "one device"),
    (lambda: ops.attention(QKV, rope=ROPE._replace(interleaved="no")), TypeError, "rope.interleaved"),
    (lambda: ops.attention(QKV, rope=ROPE._replace(sin=ANGLE.clone().requires_grad_())), ValueError, "requires grad"),
    (lambda: ops.attention(QKV.flatten(0, 1), rope=ROPE, **PACKED), ValueError, r"both be \[20, 16\]"),
    (lambda: ops.attention(QKV[..., :3], rope=ROPE), ValueError, "even width"),
    (lambda: ops.relative_bias(TABLE[0], INDEX), ValueError, "2 dimensions"),
    (lambda: ops.relative_bias(TABLE, INDEX.int()), TypeError, "int64"),
    (lambda: ops.relative_bias(TABLE[:8], INDEX), ValueError, r"index must lie in \[0, 8\)"),
    (lambda: ops.relative_bias(TABLE, INDEX - 1), ValueError, "index must lie in"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
