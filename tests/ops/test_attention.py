"""attention: dense and packed, self and cross, causal, key bias, statistics; forward and every gradient."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from maefast import ops
from maefast.ops import _registry

from .common import assert_close, backends, compare, property_test

BACKENDS = backends("attention", cuda=False)
KERNELS = backends("attention", reference=False, cuda=False)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = list(range(16, 129, 8))


def starts(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def joined(result, rows: torch.Tensor) -> torch.Tensor:
    """Output and statistics of the given rows side by side [rows, H, D + 2 or 3]; one tensor to compare."""
    out, stats = result if isinstance(result, tuple) else (result, ())
    out = torch.cat([out, *(s[..., None] for s in stats if s is not None)], -1)
    return (out.flatten(0, 1) if out.ndim == 4 else out)[rows]


# --- the reference ------------------------------------------------------------------------------------------------


def by_hand(q, k, v, scale):
    """[S, H, D] each, one head at a time."""
    heads = []
    for h in range(q.shape[1]):
        weights = (q[:, h] @ k[:, h].T * scale).softmax(-1)
        heads.append(weights @ v[:, h])
    return torch.stack(heads, 1)


@given(data=st.data())
@property_test
def test_reference_self_attention_by_hand(data):
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    heads, width = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([4, 8, 20]))
    scale = data.draw(st.sampled_from([None, 0.3]))
    qkv = torch.randn(batch, length, 3, heads, width, dtype=torch.float64, requires_grad=True)
    want = torch.stack([by_hand(*x.unbind(1), scale or width**-0.5) for x in qkv])
    dense = ops.attention(qkv, scale=scale)
    assert_close(dense, want, torch.float64)
    packed = ops.attention(qkv.flatten(0, 1), cu_seqlens_q=starts([length] * batch), scale=scale)
    assert_close(packed, want.flatten(0, 1), torch.float64)
    weights = torch.randn_like(want)
    grads = [torch.autograd.grad(out, qkv, weights, retain_graph=True)[0] for out in (dense, want)]
    assert_close(grads[0], grads[1], torch.float64)


@given(data=st.data())
@property_test
def test_reference_cross_attention_by_hand(data):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=4))
    cu_q, cu_k = starts([a for a, _ in pairs]), starts([b for _, b in pairs])
    q = torch.randn(int(cu_q[-1]), 2, 8, dtype=torch.float64)
    kv = torch.randn(int(cu_k[-1]), 2, 2, 8, dtype=torch.float64)
    out = ops.attention(q, kv, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert out.shape == q.shape
    for i in range(len(pairs)):
        keys = kv[cu_k[i] : cu_k[i + 1]]
        rows = slice(int(cu_q[i]), int(cu_q[i + 1]))
        assert_close(out[rows], by_hand(q[rows], keys[:, 0], keys[:, 1], 8**-0.5), torch.float64)


@pytest.mark.parametrize("causal", [False, True])
def test_reference_statistics_by_hand(causal):
    qkv, bias, marked = randn(7, 3, 2, 8).double(), randn(7, 2, seed=1).double(), randn(7, seed=2) > 0
    _, stats = ops.attention(
        qkv, cu_seqlens_q=starts([7]), causal=causal, key_bias=bias, marked=marked, stats=True, backend="reference"
    )
    for h in range(2):
        for i in range(7):
            seen = slice(0, i + 1) if causal else slice(None)
            scores = (qkv[i, 0, h] * qkv[:, 1, h]).sum(-1) * 8**-0.5 + bias[:, h]
            p = scores[seen].softmax(-1)
            assert_close(stats.lse[i, h], scores[seen].exp().sum().log(), torch.float64)
            assert_close(stats.entropy[i, h], -(p * p.log()).sum(), torch.float64)
            assert_close(stats.mass[i, h], p[marked[seen]].sum(), torch.float64)


@pytest.mark.parametrize("cross", [False, True])
def test_reference_gradcheck(cross):
    cu, cu_k = starts([3, 0, 2]), starts([2, 1, 4])
    shapes = [(5, 2, 3), (7, 2, 2, 3)] if cross else [(5, 3, 2, 3)]
    leaves = [randn(*shape).double().requires_grad_() for shape in shapes]
    bias = randn(7 if cross else 5, 2).double().requires_grad_()
    marked = torch.arange(len(bias)) % 2 == 0

    def call(bias, *tensors):
        result = ops.attention(
            *tensors,
            cu_seqlens_q=cu,
            cu_seqlens_k=cu_k if cross else None,
            key_bias=bias,
            marked=marked,
            stats=True,
            causal=not cross,
            backend="reference",
        )
        return joined(result, torch.arange(5))

    assert torch.autograd.gradcheck(call, (bias, *leaves))


# --- every backend against the reference in float64 ---------------------------------------------------------------


@st.composite
def cases(draw):
    """Inputs and options. One sequence always has several keys: the gradients of scores are zero without."""
    cross, lengths = draw(st.booleans()), st.integers(0, 20)
    pairs = [(draw(st.integers(1, 9)), draw(st.integers(2, 9)))]
    if draw(st.booleans()):  # equal lengths
        pairs = pairs * draw(st.integers(1, 3))
    else:
        pairs = draw(st.permutations(pairs + draw(st.lists(st.tuples(lengths, lengths), max_size=4))))
    if not cross:
        pairs = [(k, k) for _, k in pairs]
    heads, width = draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from(WIDTHS))
    seed = draw(st.integers(0, 1000))
    queries, keys = (sum(column) for column in zip(*pairs))
    inputs = {"q": randn(queries, heads, width, seed=seed), "kv": randn(keys, 2, heads, width, seed=seed + 1)}
    if not cross:
        inputs = {"q": randn(queries, 3, heads, width, seed=seed)}
    options = {"scale": draw(st.sampled_from([None, 0.25, -0.1])), "causal": not cross and draw(st.booleans())}
    if draw(st.booleans()):
        inputs["key_bias"] = randn(keys, heads, seed=seed + 2)
    options["stats"] = draw(st.booleans())
    marked = None
    if options["stats"] and draw(st.booleans()):
        marked = torch.rand(keys, generator=torch.Generator().manual_seed(seed)) < 0.5
    return pairs, inputs, options, marked


def caller(pairs, options, marked, dense: bool = False):
    """(backend, device, q, kv, key_bias) -> one tensor, of the queries that have keys."""
    lengths_q, lengths_k = zip(*pairs)
    rows = torch.tensor([k > 0 for _, k in pairs]).repeat_interleave(torch.tensor(lengths_q))

    def call(backend, device, q, kv=None, key_bias=None):
        mark = None if marked is None else marked.to(device)
        args = {"q": q, "kv": kv, "key_bias": key_bias, "marked": mark}
        if dense:
            args = {k: v if v is None else v.unflatten(0, (len(pairs), -1)) for k, v in args.items()}
        else:
            args["cu_seqlens_q"] = starts(lengths_q, device)
            args["cu_seqlens_k"] = None if kv is None else starts(lengths_k, device)
        result = ops.attention(**args, **options, backend=backend)
        assert (result[0] if options["stats"] else result).dtype is q.dtype
        return joined(result, rows.to(device))

    return call


@pytest.mark.parametrize("where", BACKENDS)
@given(case=cases(), data=st.data())
@property_test
def test_attention_and_every_gradient(where, case, data):
    backend, device = where
    pairs, inputs, options, marked = case
    dense = len(set(pairs)) == 1 and min(pairs[0]) > 0 and data.draw(st.booleans())
    compare(caller(pairs, options, marked, dense), inputs, backend, device, data.draw(st.sampled_from(DTYPES)))


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_head_width(where, width, dtype):
    backend, device = where
    options = {"stats": True, "causal": False}
    marked = torch.arange(2 * 19) % 3 == 0
    inputs = {"q": randn(38, 3, 2, width), "key_bias": randn(38, 2, seed=1)}
    compare(caller([(19, 19)] * 2, options, marked), inputs, backend, device, dtype)


# Around the blocks of 64 queries and 256 keys, the vectors of 4, 8 and 16 lanes, and beyond.
LENGTHS = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 129, 197, 255, 257, 520]


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(where, length, dtype):
    backend, device = where
    inputs = {"q": randn(length + 3, 3, 2, 32)}
    for causal in (False, True):
        options = {"stats": False, "causal": causal}
        compare(caller([(length, length), (3, 3)], options, None), inputs, backend, device, dtype)


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pair", [(1, 600), (600, 2), (300, 290), (70, 513)], ids=str)
def test_long_cross_attention_with_everything(where, pair, dtype):
    backend, device = where
    pairs = [pair, (0, 3), (2, 0), (5, 7)]
    queries, keys = (sum(column) for column in zip(*pairs))
    marked = torch.arange(keys) % 5 == 0
    inputs = {"q": randn(queries, 2, 24), "kv": randn(keys, 2, 2, 24, seed=1), "key_bias": randn(keys, 2, seed=2)}
    compare(caller(pairs, {"stats": True, "causal": False}, marked), inputs, backend, device, dtype)


@pytest.mark.parametrize("where", KERNELS)
def test_long_causal_with_everything(where):
    backend, device = where
    inputs = {"q": randn(610, 3, 1, 40), "key_bias": randn(610, 1, seed=2)}
    options = {"stats": True, "causal": True}
    compare(caller([(600, 600), (10, 10)], options, torch.arange(610) % 4 == 0), inputs, backend, device, torch.float32)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("name", ["lse", "entropy", "mass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_one_statistic(where, name, dtype):
    """The output itself unused; scores of a wide range, so that some entropies are next to nothing."""
    backend, device = where
    marked = torch.arange(30) % 2 == 0

    def call(backend, device, q, key_bias):
        options = {"cu_seqlens_q": starts([18, 0, 12], device), "key_bias": key_bias, "marked": marked.to(device)}
        return getattr(ops.attention(q, **options, scale=1.0, stats=True, backend=backend)[1], name)

    inputs = {"q": randn(30, 3, 2, 16), "key_bias": randn(30, 2, seed=1)}
    compare(call, inputs, backend, device, dtype)


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_sdpa(where, dtype):
    backend, device = where
    qkv = randn(2, 50, 3, 4, 64).to(device, dtype)
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2).double() for x in qkv.unbind(2)))
    assert_close(ops.attention(qkv, backend=backend), want.transpose(1, 2), dtype)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sdpa_takes_any_scale(scale, dtype):
    """It masks with -inf, which a scale of zero or below must not touch."""
    leaves = [t.requires_grad_() for t in (randn(2, 3, 3, 1, 8).to(dtype), randn(2, 3, 3, 1, 8).double())]
    outs = [ops.attention(t, scale=scale, causal=True, backend=b) for t, b in zip(leaves, ("sdpa", "reference"))]
    assert_close(*outs, dtype)
    assert_close(*(torch.autograd.grad(o.square().sum(), t)[0] for o, t in zip(outs, leaves)), dtype)
    packed = ops.attention(leaves[0].flatten(0, 1), cu_seqlens_q=starts([3, 3]), scale=scale, causal=True)
    assert_close(packed, outs[1].flatten(0, 1), dtype)


@pytest.mark.parametrize("where", BACKENDS)
def test_minus_infinity_rules_a_key_out(where):
    backend, device = where
    keep = torch.tensor([0, 2, 3, 6], device=device)
    q, kv = randn(5, 2, 16).to(device), randn(7, 2, 2, 16, seed=1).to(device)
    bias = torch.full((7, 2), float("-inf"), device=device)
    bias[keep] = 0
    results = []
    for tensors, options in (((q, kv), {"key_bias": bias}), ((q, kv[keep]), {})):
        leaves = [t.clone().requires_grad_() for t in tensors]
        cu = {"cu_seqlens_q": starts([5], device), "cu_seqlens_k": starts([len(leaves[1])], device)}
        out, stats = ops.attention(*leaves, **cu, **options, stats=True, backend=backend)
        total = out.square().sum() + stats.lse.sum() + stats.entropy.square().sum()
        results.append([out, stats.lse, stats.entropy, *torch.autograd.grad(total, leaves)])
    got, want = results
    assert torch.equal(got[4][[1, 4, 5]], torch.zeros_like(got[4][[1, 4, 5]]))
    got[4] = got[4][keep]
    for a, b in zip(got, want):
        assert_close(a, b, torch.float32)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_without_keys(where, dtype):
    backend, device = where
    q, kv = (randn(*shape).to(device, dtype).requires_grad_() for shape in ((3, 2, 16), (4, 2, 2, 16)))
    cu = {"cu_seqlens_q": starts([2, 0, 1], device), "cu_seqlens_k": starts([0, 3, 1], device)}
    marked = torch.ones(4, dtype=torch.bool, device=device)
    out, stats = ops.attention(q, kv, **cu, stats=True, marked=marked, backend=backend)
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))
    assert bool((stats.lse[:2] == -torch.inf).all())
    assert torch.equal(stats.entropy, torch.zeros_like(stats.entropy))
    assert_close(stats.mass[2], torch.ones(2), torch.float32)
    assert torch.equal(out[2], kv[3, 1])
    grad_q, grad_kv = torch.autograd.grad(out.sum(), [q, kv])
    # One key: its probability is 1 whatever the query is. Keys without queries get nothing.
    assert float(grad_q.norm()) < 1e-6
    assert torch.equal(grad_q[:2], torch.zeros_like(grad_q[:2]))
    want = torch.zeros_like(kv)
    want[3, 1] = 1
    assert float((grad_kv - want).norm()) < 1e-6


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=["no sequences", "no tokens"])
def test_nothing(where, shape):
    backend, device = where
    qkv = torch.randn(*shape, 3, 2, 16, device=device, requires_grad=True)
    out = ops.attention(qkv, backend=backend)
    assert out.shape == (*shape, 2, 16)
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


# --- properties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_equals_one_by_one(where, dtype):
    """A sequence's result does not depend on its neighbours; not a bit of it on the CPU."""
    backend, device = where
    lengths = [5, 0, 70, 1, 17, 257, 50, 256, 200, 300]
    qkv = randn(sum(lengths), 3, 2, 40).to(device, dtype).requires_grad_()
    weights = randn(sum(lengths), 2, 40, seed=1).to(device, dtype)

    def run(x, w, lengths):
        out = ops.attention(x, cu_seqlens_q=starts(lengths, device), backend=backend)
        return out, torch.autograd.grad(out, x, w)[0]

    together = run(qkv, weights, lengths)
    alone = [run(x, w, [n]) for x, w, n in zip(qkv.split(lengths), weights.split(lengths), lengths)]
    for whole, parts in zip(together, zip(*alone)):
        if backend == "cpu":
            assert torch.equal(whole, torch.cat(parts))
        else:
            assert_close(whole, torch.cat(parts), dtype)


@pytest.mark.parametrize("where", KERNELS)
def test_equal_lengths_need_no_starts(where):
    backend, device = where
    q, kv = randn(3, 9, 2, 24).to(device), randn(3, 13, 2, 2, 24).to(device)
    dense = ops.attention(q, kv, backend=backend)
    cu = {"cu_seqlens_q": starts([9] * 3, device), "cu_seqlens_k": starts([13] * 3, device)}
    packed = ops.attention(q.flatten(0, 1), kv.flatten(0, 1), **cu, backend=backend)
    assert torch.equal(dense.flatten(0, 1), packed)


@pytest.mark.parametrize("where", BACKENDS)
def test_subset_of_queries(where):
    """The masked tail of a decoder: the same rows as full self-attention gives."""
    backend, device = where
    qkv = randn(2, 30, 3, 2, 32).to(device)
    full = ops.attention(qkv, backend=backend)
    some = ops.attention(qkv[:, 8:, 0], qkv[:, :, 1:], backend=backend)
    assert_close(some, full[:, 8:], torch.float32)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_agree_bit_for_bit(where, dtype):
    backend, device = where
    lengths = [40, 3, 0, 111, 64]
    qkv = randn(sum(lengths), 3, 3, 48).to(device, dtype).requires_grad_()
    bias = randn(sum(lengths), 3, seed=1).to(device).requires_grad_()
    runs = []
    for _ in range(3):
        out, stats = ops.attention(
            qkv, cu_seqlens_q=starts(lengths, device), key_bias=bias, stats=True, backend=backend
        )
        total = out.float().square().sum() + stats.entropy.sum()
        runs.append([out, *stats[:2], *torch.autograd.grad(total, [qkv, bias])])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@pytest.mark.parametrize("where", BACKENDS)
def test_non_contiguous_input(where):
    backend, device = where
    qkv = randn(3, 2, 16, 2, 9).to(device).permute(1, 4, 0, 3, 2)  # [2, 9, 3, 2, 16]
    assert not qkv.is_contiguous()
    leaf = qkv.clone(memory_format=torch.preserve_format).requires_grad_()
    out = ops.attention(leaf, backend=backend)
    want = ops.attention(qkv.double().contiguous(), backend="reference")
    assert_close(out, want, torch.float32)
    weights = randn(*out.shape).to(device).transpose(0, 1).contiguous().transpose(0, 1)
    grad = torch.autograd.grad(out, leaf, weights)[0]
    exact = qkv.double().requires_grad_()
    assert_close(
        grad,
        torch.autograd.grad(ops.attention(exact, backend="reference"), exact, weights.double())[0],
        torch.float32,
    )


@pytest.mark.parametrize("where", BACKENDS)
def test_starts_with_strides(where):
    backend, device = where
    q, kv = randn(9, 2, 16).to(device), randn(12, 2, 2, 16, seed=1).to(device)
    results = []
    for step in (1, 2):
        cu_q, cu_k = (starts(n, device).repeat_interleave(step)[::step] for n in ([3, 6], [7, 5]))
        results.append(ops.attention(q, kv, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, backend=backend))
    assert torch.equal(*results)


@pytest.mark.parametrize("where", BACKENDS)
def test_frozen_parts(where):
    """Gradients for what asks for them only."""
    backend, device = where
    q, kv, bias = (randn(*s).to(device) for s in ((1, 4, 2, 16), (1, 6, 2, 2, 16), (1, 6, 2)))
    want = None
    for needed in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        leaves = [t.clone().requires_grad_(bool(n)) for t, n in zip((q, kv, bias), needed)]
        out = ops.attention(leaves[0], leaves[1], key_bias=leaves[2], backend=backend)
        out.square().sum().backward()
        want = want or [leaf.grad for leaf in leaves]
        for leaf, full, n in zip(leaves, want, needed):
            if n:
                assert torch.equal(leaf.grad, full)
            else:
                assert leaf.grad is None


# --- integration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_opcheck(where, cross, extras):
    backend, device = where
    cu_q, cu_k = starts([3, 0, 4], device), starts([2, 5, 1], device) if cross else None
    q, kv = (randn(7, 2, 16), randn(8, 2, 2, 16)) if cross else (randn(7, 3, 2, 16), None)
    q, kv = q.to(device), kv if kv is None else kv.to(device)
    keys = 8 if cross else 7
    bias = randn(keys, 2).to(device) if extras else None
    marked = torch.arange(keys, device=device) % 2 == 0 if extras else None
    sizes = (3, 4, 5 if cross else 4, 0.25, not cross)
    run, backward = (_registry.raw(op, backend) for op in ("attention", "attention_backward"))
    torch.library.opcheck(run, (q, kv, cu_q, cu_k, *sizes, bias, marked, extras))
    out, *found = run(q, kv, cu_q, cu_k, *sizes, bias, marked, extras)
    row = randn(7, 2).to(device) if extras else None
    args = (torch.ones_like(out), row, row, row, q, kv, out, *found, cu_q, cu_k, *sizes, bias, marked, extras)
    torch.library.opcheck(backward, args)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(where, dynamic):
    backend, device = where
    packed = backend != "reference"  # which loops over sequences and so reads their lengths

    def step(qkv, bias, lengths, longest):
        options = {"key_bias": bias, "stats": True, "backend": backend}
        if packed:
            cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
            out, stats = ops.attention(qkv, cu_seqlens_q=cu, max_seqlen_q=longest, **options)
        else:
            out, stats = ops.attention(qkv[None], **{**options, "key_bias": bias[None]})
        return out.square().sum() + stats.entropy.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ([3, 5], [7, 1, 9], [2, 2, 4, 30]):
        rows = sum(lengths)
        inputs = [randn(rows, 3, 2, 16).to(device), randn(rows, 2, seed=1).to(device)]
        inputs = [x.requires_grad_() for x in inputs]
        plan = torch.tensor(lengths, dtype=torch.int32, device=device), max(lengths)
        got = torch.autograd.grad(compiled(*inputs, *plan), inputs)
        for a, b in zip(got, torch.autograd.grad(step(*inputs, *plan), inputs)):
            torch.testing.assert_close(a, b)


def cu(*values):
    return torch.tensor(values, dtype=torch.int32)


QKV, Q, KV = torch.randn(2, 5, 3, 2, 16), torch.randn(2, 4, 2, 16), torch.randn(2, 5, 2, 2, 16)
PACKED = QKV.flatten(0, 1)
BIAS, MARKED = torch.randn(2, 5, 2), torch.ones(2, 5, dtype=torch.bool)
BAD = [
    (lambda: ops.attention(Q), ValueError, "interleaved qkv"),
    (lambda: ops.attention(Q, QKV), ValueError, "kv must be interleaved"),
    (lambda: ops.attention(Q, KV[..., :4]), ValueError, "kv must be interleaved"),
    (lambda: ops.attention(Q, KV[:, :, :, :1]), ValueError, "kv must be interleaved"),
    (lambda: ops.attention(Q, KV[0]), ValueError, "5 dimensions"),
    (lambda: ops.attention(Q, KV[:1]), ValueError, "q has 2 sequences and kv 1"),
    (lambda: ops.attention(Q, KV.double()), TypeError, "but kv is torch.float64"),
    (lambda: ops.attention(Q, KV.to("meta")), ValueError, "one device"),
    (lambda: ops.attention(QKV.int()), TypeError, "float32"),
    (lambda: ops.attention(QKV[..., :0]), ValueError, "at least one head of width one"),
    (lambda: ops.attention(Q, KV, causal=True), ValueError, "self-attention only"),
    (lambda: ops.attention(QKV, cu_seqlens_q=cu(0, 5, 10)), ValueError, "packed input"),
    (lambda: ops.attention(PACKED), ValueError, "needs cu_seqlens_q"),
    (lambda: ops.attention(PACKED, cu_seqlens_q=cu(0, 4)), ValueError, "must rise from 0"),
    (lambda: ops.attention(PACKED, cu_seqlens_q=cu(0, 6, 5, 10)), ValueError, "must rise from 0"),
    (lambda: ops.attention(PACKED, cu_seqlens_q=cu(1, 10)), ValueError, "must rise from 0"),
    (lambda: ops.attention(PACKED, cu_seqlens_q=cu(0, 11)), ValueError, "must rise from 0"),
    (lambda: ops.attention(PACKED, cu_seqlens_q=cu(0, 3, 10), max_seqlen_q=6), ValueError, "steps of at most 6"),
    (lambda: ops.attention(PACKED, cu_seqlens_q=cu(0)), ValueError, "at least two"),
    (lambda: ops.attention(PACKED, cu_seqlens_q=cu(0, 10).long()), TypeError, "int32"),
    (lambda: ops.attention(PACKED, cu_seqlens_q=cu(0, 10), cu_seqlens_k=cu(0, 10)), ValueError, "alone"),
    (lambda: ops.attention(Q[0], KV[0], cu_seqlens_q=cu(0, 4)), ValueError, "cu_seqlens_k"),
    (lambda: ops.attention(Q[0], KV[0], cu_seqlens_q=cu(0, 4), cu_seqlens_k=cu(0, 2, 5)), ValueError, "differ"),
    (lambda: ops.attention(QKV, key_bias=BIAS[..., :1]), ValueError, "key_bias must be"),
    (lambda: ops.attention(QKV, key_bias=BIAS.to("meta")), ValueError, "one device"),
    (lambda: ops.attention(QKV, marked=MARKED), ValueError, "give stats=True"),
    (lambda: ops.attention(QKV, marked=MARKED.int(), stats=True), ValueError, "marked must be bool"),
    (lambda: ops.attention(QKV, marked=MARKED[:1], stats=True), ValueError, "marked must be bool"),
    (lambda: ops.attention(QKV, backend="tpu"), ValueError, "unknown backend"),
    (lambda: ops.attention(torch.randn(1, 3, 3, 2, 20), backend="cpu"), RuntimeError, "16 to 128 in steps of 8"),
    (lambda: ops.attention(torch.randn(1, 3, 3, 2, 136), backend="cpu"), RuntimeError, "16 to 128 in steps of 8"),
    (lambda: ops.attention(QKV.double(), backend="cpu"), RuntimeError, "float64"),
    (lambda: ops.attention(QKV, stats=True, backend="sdpa"), RuntimeError, "no biases by head"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_automatic_choice_on_cuda(monkeypatch):
    """Packed calls never go to a loop over sequences while something else serves them."""
    table = importlib.import_module("maefast.ops._attention_table")
    if not table._dispatch.HAS_TRITON:
        pytest.skip("needs Triton")
    base = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 64, "max_q": 50, "max_k": 50}
    call = table.Call(**base, packed=True, cross=False, causal=False, extras=False)
    monkeypatch.setattr(table, "_varlen_attn", lambda: lambda q, k, v, cu_q, cu_k, max_q, max_k, scale=None: None)
    # As before any measurement; tests/bench/test_gpu_tune.py has the rules that are measured.
    monkeypatch.setattr(table, "TABLE", tuple(rule for rule in table.TABLE if "measured on" not in rule.why))
    assert table.choose(call, None) == "varlen"
    assert table.choose(call._replace(scaled=True), None) == "varlen"
    assert table.choose(call._replace(dtype=torch.float32), None) == "triton"
    assert table.choose(call._replace(extras=True), None) == "triton"
    assert table.choose(call._replace(packed=False), None) == "sdpa"
    monkeypatch.setattr(table, "_varlen_attn", lambda: lambda q, k, v, cu_q, cu_k, max_q, max_k: None)
    assert table.choose(call._replace(scaled=True), None) == "triton"
    monkeypatch.setattr(table, "_varlen_attn", lambda: None)
    assert table.choose(call, None) == "triton"


@pytest.fixture
def strict():
    """torch's switch, which the fixture of these tests sets to a warning only."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


def test_gradients_that_must_repeat_are_ours(strict, monkeypatch):
    table = importlib.import_module("maefast.ops._attention_table")
    monkeypatch.setattr(table, "unavailable", lambda name, call: "not here" if name == "cuda" else None)
    base = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 64, "max_q": 197, "max_k": 197}
    for packed in (False, True):
        call = table.Call(**base, packed=packed, cross=False, causal=False, extras=False)
        assert table.choose(call, None) in table.LIBRARIES
        assert table.choose(call._replace(repeatable=True), None) == "triton"
        assert table.choose(call._replace(repeatable=True), "sdpa") == "sdpa"  # whoever names one knows
    monkeypatch.setattr(table, "unavailable", lambda name, call: "not here" if name in table.KERNELS else None)
    assert table.choose(call._replace(repeatable=True), None) == "sdpa"
    qkv = torch.zeros(1, 2, 3, 1, 16)
    assert not table.repeatable(qkv, None)
    assert table.repeatable(qkv.requires_grad_(), None)
    with torch.no_grad():
        assert not table.repeatable(qkv, None)
    torch.use_deterministic_algorithms(True, warn_only=True)  # as torch's own kernels see it
    assert not table.repeatable(qkv, None)


def test_the_switch_can_be_traced(strict):
    qkv = randn(2, 5, 3, 2, 16).requires_grad_()
    traced = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(qkv), ops.attention(qkv))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [50, 197, 300])
def test_gradients_repeat_on_a_gpu(strict, dtype, packed, length):
    qkv = randn(16 * length, 3, 12, 64).to(dtype).cuda()
    cu = {"cu_seqlens_q": starts([length] * 16, "cuda"), "max_seqlen_q": length} if packed else {}
    qkv = (qkv if packed else qkv.unflatten(0, (16, length))).requires_grad_()
    seed = randn(*qkv.shape[:-3], 12, 64).to(qkv)
    runs = [torch.autograd.grad(ops.attention(qkv, **cu), qkv, seed)[0] for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_libraries_agree_with_the_reference_on_a_gpu(dtype):
    """Whichever serves without the switch is right, if not the same bits."""
    qkv = randn(4, 197, 3, 6, 64).to(dtype)
    low, high = qkv.cuda().requires_grad_(), qkv.double().requires_grad_()
    got, want = ops.attention(low), ops.attention(high, backend="reference")
    seed = randn(*want.shape, seed=1).to(dtype)
    assert_close(got, want, dtype)
    grads = torch.autograd.grad(got, low, seed.cuda()), torch.autograd.grad(want, high, seed.double())
    assert_close(grads[0][0], grads[1][0], dtype, "gradient")
