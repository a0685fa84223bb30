"""attention with keys that are ruled out: weight 0 and gradient 0, and queries that see none give 0 and -inf."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import ops
from tests.kernels.attention_case import NEVER, PATTERNS, blind_queries, hidden_keys, rule_out

from .common import TOLERANCE, property_test
from .test_attention import BACKENDS, DTYPES, KERNELS, WIDTHS, joined, randn, starts


@st.composite
def cases_with_holes(draw):
    cross = draw(st.booleans())
    pairs = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), min_size=1, max_size=4))
    if draw(st.booleans()):  # equal lengths
        pairs = [(1 + pairs[0][0], 1 + pairs[0][1])] * len(pairs)
    if not cross:
        pairs = [(k, k) for _, k in pairs]
    heads, width, seed = draw(st.integers(1, 3)), draw(st.sampled_from(WIDTHS)), draw(st.integers(0, 1000))
    queries, keys = (sum(column) for column in zip(*pairs))
    inputs = {"q": randn(queries, heads, width, seed=seed), "kv": randn(keys, 2, heads, width, seed=seed + 1)}
    if not cross:
        inputs = {"q": randn(queries, 3, heads, width, seed=seed)}
    names = st.lists(st.sampled_from(list(PATTERNS)), min_size=heads, max_size=heads)
    hidden = hidden_keys([draw(names) for _ in pairs], [k for _, k in pairs], seed)
    inputs["key_bias"] = rule_out(randn(keys, heads, seed=seed + 2), hidden, draw(st.sampled_from(NEVER)))
    options = {"scale": draw(st.sampled_from([None, 0.25, -0.1])), "causal": not cross and draw(st.booleans())}
    options["stats"] = draw(st.booleans())
    marked = None
    if options["stats"] and draw(st.booleans()):
        marked = torch.rand(keys, generator=torch.Generator().manual_seed(seed)) < 0.5
    return pairs, inputs, hidden, options, marked


def check_holes(where, dtype, pairs, inputs, hidden, options, marked, dense=False):
    """Values and gradients against the reference in float64; exactly zero where no key is seen or a key is not seen.

    The statistics of queries that see nothing get infinite gradients: those of exp(entropy) / entropy, say.
    """
    backend, device = where
    lengths_q, lengths_k = zip(*pairs)
    blind = blind_queries(hidden, pairs, options["causal"])
    rounded = {name: x if name == "key_bias" else x.to(dtype) for name, x in inputs.items()}

    def run(backend, device, wide):
        leaves = {k: (x.double() if wide else x.clone()).to(device).requires_grad_() for k, x in rounded.items()}
        args = {**leaves, "marked": marked if marked is None else marked.to(device)}
        if dense:
            args = {k: x if x is None else x.unflatten(0, (len(pairs), -1)) for k, x in args.items()}
        else:
            args["cu_seqlens_q"] = starts(lengths_q, device)
            args["cu_seqlens_k"] = starts(lengths_k, device) if "kv" in inputs else None
        result = ops.attention(**args, **options, backend=backend)
        out, stats = result if options["stats"] else (result, ())
        found = [x.flatten(0, 1) if dense else x for x in (out, *stats) if x is not None]
        weights = [randn(*x.shape, seed=i).to(x) for i, x in enumerate(found)]
        for i in range(1, len(weights)):
            weights[i] = weights[i].masked_fill(blind.to(device), float("inf") if i % 2 else float("-inf"))
        grads = torch.autograd.grad(found, list(leaves.values()), weights)
        return [x.detach().cpu() for x in found], dict(zip(leaves, (g.cpu() for g in grads)))

    found, grads = run(backend, device, False)
    want, want_grads = run("reference", "cpu", True)

    for values in (found, want):  # the definition
        assert not values[0][blind].any()
        if len(values) > 1:
            assert torch.equal(values[1] == -torch.inf, blind)
            assert not any(x[blind].any() for x in values[2:])
    for back in (grads, want_grads):
        own = back["q"] if "kv" in back else back["q"][:, 0]
        keys = back["kv"] if "kv" in back else back["q"][:, 1:]
        assert not own[blind].any()
        assert not back["key_bias"][hidden].any()
        assert not keys[hidden[:, None].expand(-1, 2, -1)].any()

    for i, (a, b) in enumerate(zip(found, want)):
        a, b = (x.masked_fill(blind, 0) if i == 1 else x for x in (a, b))
        # A sum may cancel to any small number, an entropy be next to nothing.
        close(a, b, dtype if i == 0 else torch.float32, max(float(b.norm()), float(b.numel() ** 0.5) if i else 0.0))
    # Queries that see one key have no gradient: nothing is compared on the scale of the others.
    floor = 0.05 * float(torch.cat([g.flatten() for g in want_grads.values()]).norm())
    for name, a in grads.items():
        close(a, want_grads[name], dtype, max(float(want_grads[name].norm()), floor), f"gradient of {name}")


def close(a, b, dtype, size, what="output"):
    error = float((a.detach().double() - b.detach()).norm())
    assert error <= TOLERANCE[dtype] * size, f"{what}: error {error:.3g} of {size:.3g} in {dtype}"


@pytest.mark.parametrize("where", BACKENDS)
@given(case=cases_with_holes(), data=st.data())
@property_test
def test_ruled_out_keys(where, case, data):
    pairs = case[0]
    dense = len(set(pairs)) == 1 and min(pairs[0]) > 0 and data.draw(st.booleans())
    check_holes(where, data.draw(st.sampled_from(DTYPES)), *case, dense)


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("pair", [(3, 1), (70, 256), (5, 257), (70, 600), (300, 300)], ids=str)
def test_ruled_out_blocks_of_keys(where, dtype, stats, pair):
    """One head for each pattern; with 600 keys, whole blocks before or behind those that are seen."""
    heads, cross = len(PATTERNS), pair[0] != pair[1]
    pairs = [pair, (2, 2)]
    queries, keys = (sum(column) for column in zip(*pairs))
    hidden = hidden_keys([list(PATTERNS), ["all"] * heads], [pair[1], 2], seed=pair[1])
    inputs = {"q": randn(queries, heads, 24), "kv": randn(keys, 2, heads, 24, seed=1)}
    if not cross:
        inputs = {"q": randn(queries, 3, heads, 24)}
    inputs["key_bias"] = rule_out(randn(keys, heads, seed=2), hidden, float("-inf"))
    marked = torch.arange(keys) % 3 == 0 if stats else None
    check_holes(where, dtype, pairs, inputs, hidden, {"stats": stats, "causal": not cross}, marked)


@given(data=st.data())
@property_test
def test_reference_ruled_out_keys_by_hand(data):
    """Softmax over the keys that a query sees, one query at a time, and nothing for one that sees none."""
    cross = data.draw(st.booleans())
    n, m, heads = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8)), data.draw(st.integers(1, 2))
    n, causal = (n, False) if cross else (m, data.draw(st.booleans()))
    hidden = hidden_keys([data.draw(st.lists(st.sampled_from(list(PATTERNS)), min_size=heads, max_size=heads))], [m], n)
    q, k, v = (randn(rows, heads, 5, seed=i).double().requires_grad_() for i, rows in enumerate((n, m, m)))
    free = randn(m, heads, seed=3).double().requires_grad_()
    marked = torch.arange(m) % 2 == 0
    blind = blind_queries(hidden, [(n, m)], causal)

    bias = rule_out(free, hidden, float("-inf"))
    args = (q[None], torch.stack([k, v], 1)[None]) if cross else (torch.stack([q, k, v], 1)[None],)
    options = {"causal": causal, "key_bias": bias[None], "marked": marked[None], "backend": "reference"}
    out, stats = ops.attention(*args, **options, scale=0.7, stats=True)
    got = joined((out, (stats.lse.masked_fill(blind, 0), stats.entropy, stats.mass)), torch.arange(n))
    assert torch.equal(stats.lse[0] == -torch.inf, blind)

    rows = []
    for i in range(n):
        for h in range(heads):
            seen = [j for j in range(m) if not hidden[j, h] and (j <= i or not causal)]
            if not seen:
                rows.append(torch.zeros(8, dtype=torch.float64))
                continue
            scores = torch.stack([(q[i, h] * k[j, h]).sum() * 0.7 + free[j, h] for j in seen])
            p = scores.softmax(0)
            more = scores.exp().sum().log(), -(p * p.log()).sum(), p[marked[seen]].sum()
            rows.append(torch.cat([p @ v[seen, h], torch.stack(more)]))
    want = torch.stack(rows).view(n, heads, 8)
    close(got, want, torch.float64, max(1.0, float(want.detach().norm())))
    weights = randn(*want.shape, seed=4).double()
    if want.requires_grad:
        grads = [torch.autograd.grad(x, [q, k, v, free], weights, allow_unused=True) for x in (got, want)]
        for a, b in zip(*grads):
            close(
                a,
                torch.zeros_like(a) if b is None else b,
                torch.float64,
                max(1.0, 0.0 if b is None else float(b.norm())),
            )


@pytest.mark.parametrize("cross", [False, True])
def test_reference_second_derivatives_where_keys_are_ruled_out(cross):
    n, m = (3, 4) if cross else (4, 4)
    hidden = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    blind = blind_queries(hidden, [(n, m)], not cross)
    assert blind.any()
    leaves = [randn(1, n, 3, 3), randn(1, m, 2, 3, 3, seed=1)] if cross else [randn(1, n, 3, 3, 3)]
    leaves = [x.double().requires_grad_() for x in (*leaves, randn(1, m, 3, seed=2))]

    def call(*tensors):
        options = {"key_bias": rule_out(tensors[-1], hidden, float("-inf")), "causal": not cross, "stats": True}
        out, (lse, entropy, mass) = ops.attention(
            *tensors[:-1], **options, marked=torch.arange(m)[None] % 2 == 0, backend="reference"
        )
        return out, lse[:, ~blind], entropy, mass

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("where", BACKENDS)
def test_a_loss_of_minus_infinite_lse(where):
    """exp(lse), its square and the logarithm of the entropy: gradients of 0 and of infinity meet P = 0."""
    backend, device = where
    q, kv, bias = randn(2, 3, 2, 16), randn(2, 5, 2, 2, 16, seed=1), randn(2, 5, 2, seed=2)
    bias[0, :, 0] = bias[1, 1:] = float("-inf")
    leaves = [x.to(device).requires_grad_() for x in (q, kv, bias)]
    _, stats = ops.attention(leaves[0], leaves[1], key_bias=leaves[2], stats=True, backend=backend)
    for loss in (stats.lse.exp().sum(), stats.lse.square().sum(), (stats.entropy[0, :, 0] - stats.lse[0, :, 0]).sum()):
        for grad in torch.autograd.grad(loss, leaves, retain_graph=True):
            assert grad.isfinite().all()
            assert not grad[0][..., 0, :].any() if grad.ndim > 3 else not grad[0, :, 0].any()
    for grad in torch.autograd.grad(stats.entropy[0, :, 0].sqrt().log().sum(), leaves):
        assert not grad.any()


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_other_biases_that_are_not_numbers(where, value):
    """NaN for the sequence and head that they are given to, and nothing of it beside."""
    backend, device = where
    qkv, bias = randn(2, 20, 3, 2, 16).to(device), randn(2, 20, 2, seed=1).to(device)
    want = ops.attention(qkv, key_bias=bias, stats=True, backend=backend)
    bias[0, 7, 1] = value
    leaves = [qkv.requires_grad_(), bias.requires_grad_()]
    out, stats = ops.attention(qkv, key_bias=bias, stats=True, backend=backend)
    for found, good in zip((out, *stats[:2]), (want[0], *want[1][:2])):
        assert found[0, :, 1].isnan().all()
        assert torch.equal(found[0, :, 0], good[0, :, 0])
        assert torch.equal(found[1], good[1])
    grad_qkv, grad_bias = torch.autograd.grad(out.sum() + stats.entropy.sum(), leaves)
    assert grad_qkv[0, ..., 0, :].isfinite().all()
    assert grad_qkv[1].isfinite().all()
    assert grad_bias[0, :, 0].isfinite().all()


def test_libraries_give_zeros_to_a_query_without_keys():
    q, kv = randn(3, 2, 16).requires_grad_(), randn(4, 2, 2, 16).requires_grad_()
    out = ops.attention(q, kv, cu_seqlens_q=starts([2, 1]), cu_seqlens_k=starts([0, 4]), backend="sdpa")
    assert not out[:2].any()
    assert not torch.autograd.grad(out.sum(), q)[0][:2].any()
    assert not ops.attention(q[None], kv[None, :0], backend="sdpa").any()
