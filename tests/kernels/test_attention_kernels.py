"""attention: the Triton kernels against float64 plain PyTorch, forward with statistics and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import ops
from maefast.kernels import attention as kernels
from tests.kernels.attention_case import BOUND, NEVER, PATTERNS, Case, assert_close, blind_queries, hidden_keys
from tests.kernels.support import INTERPRET, property_test, random_tensor
from tests.kernels.test_bounds_kernels import FencedTorch, fenced

WIDTHS = range(16, 129, 8)


def run(case, device):
    return case.run(device, kernels.attention, kernels.attention_backward)


def check(case, device, share=0.01):
    return case.check(device, kernels.attention, kernels.attention_backward, share)


@st.composite
def cases(draw):
    lengths = st.integers(0, 40)
    cross = draw(st.booleans())
    len_q = draw(st.lists(lengths, min_size=1, max_size=4))
    len_k = [draw(lengths) for _ in len_q] if cross else None
    if draw(st.booleans()):
        len_q, len_k = len_q[:1] * len(len_q), len_k and len_k[:1] * len(len_q)
    options = {name: draw(st.booleans()) for name in ("bias", "stats", *(() if cross else ("causal",)))}
    return {
        "width": draw(st.sampled_from(WIDTHS)),
        "len_q": len_q,
        "len_k": len_k,
        "heads": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**16)),
        **options,
    }


@given(cases())
@property_test(30)
def test_short_sequences(device, dtype, case):
    check(Case(dtype, **case), device)


@pytest.mark.blocks
@pytest.mark.parametrize("width", [32, 64, 88])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
def test_every_tile(device, dtype, width, extras):
    # Each tile of forward_tile and backward_tile, just full and begun.
    for length in (1, 16, 17, 32, 33, 64, 65, 128, 129):
        causal = extras and length % 2 == 0
        check(Case(dtype, width, [length], heads=1, causal=causal, bias=extras, stats=extras), device)


@pytest.mark.blocks
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_long_sequences(device, dtype, causal):
    extras = {"bias": causal, "stats": causal, "causal": causal}
    check(Case(dtype, 32, [197, 0, 70], heads=1, **extras), device)
    check(Case(dtype, 64, [270], heads=1, **extras), device)
    check(Case(dtype, 24, [300, 64, 1], heads=1, **extras), device)


@pytest.mark.blocks
def test_ragged_cross_attention(device, dtype):
    check(Case(dtype, 32, [5, 0, 140, 3], [200, 7, 0, 130], bias=True, stats=True), device)
    check(Case(dtype, 128, [1, 70, 9], [257, 1, 30], heads=1, bias=True), device)
    check(Case(dtype, 40, [147] * 2, [50] * 2), device)
    check(Case(dtype, 16, [1030], [20], heads=1), device)  # too many queries for one program's backward


@pytest.mark.blocks
def test_programs_that_take_several_blocks_of_queries(device, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    check(Case(dtype, 32, [100, 0, 70], stats=True, bias=True), device)
    check(Case(dtype, 32, [197], causal=True), device)


def test_no_queries_or_no_keys(device, dtype):
    for extras in (False, True):
        check(Case(dtype, 16, [0, 0], [3, 5], bias=extras, stats=extras), device)
        check(Case(dtype, 16, [3, 5], [0, 0], bias=extras, stats=extras), device)
        check(Case(dtype, 16, [3, 3], [0, 0], bias=extras, stats=extras, packed=False), device)
        check(Case(dtype, 16, [0, 0], bias=extras, stats=extras), device)


def test_bias_of_minus_infinity_removes_a_key(device, dtype):
    # Two padded sequences, with the gradients of all statistics, equal the same two packed without the padding.
    for length, kept in ((20, [20, 11]), (150, [90, 131])):
        case = Case(dtype, 32, [7, 7], [length, length], bias=True, stats=True)
        there = torch.cat([torch.arange(length) < n for n in kept])
        case.bias[~there] = float("-inf")
        short = Case(dtype, 32, [7, 7], kept, bias=True, stats=True)
        short.q, short.grad, short.grads = case.q, case.grad, case.grads
        short.kv, short.bias, short.marked = case.kv[there], case.bias[there], case.marked[there]
        want, want_grads = short.reference()
        out, grads = run(case, device)
        for name, a, b in zip(("out", "lse", "entropy", "mass"), out, want):
            assert_close(a, b, name)
        for name, a, b in zip(("grad q", "grad kv", "grad bias"), grads, want_grads):
            a = a.cpu() if name == "grad q" else a.cpu()[there]
            assert_close(a, b, name, dtype)
        assert all(bool((g.cpu()[~there] == 0).all()) for g in grads[1:])


def check_ruled_out(case, hidden, value, device):
    """Against the reference; exactly zero where no key is seen or a key is not seen."""
    cross, causal, batch = case.kv is not None, case.sizes[-1], case.sizes[0]
    lengths = [[n] * batch if cu is None else cu.diff().tolist() for n, cu in zip(case.sizes[1:3], case.cu)]
    blind = blind_queries(hidden, list(zip(lengths[0], lengths[cross])), causal)
    case.rule_out(hidden, blind, value)
    (out, lse, entropy, mass), grads = check(case, device, share=0.1)  # many queries see one key
    assert torch.equal(lse.cpu() == -torch.inf, blind)
    assert not out.cpu()[blind].any()
    assert not any(x.cpu()[blind].any() for x in (entropy, mass) if x.numel())
    grad_q, grad_kv, grad_bias = (g.cpu() for g in grads)
    assert not (grad_q if cross else grad_q[:, 0])[blind].any()
    assert not (grad_kv if cross else grad_q[:, 1:])[hidden[:, None].expand(-1, 2, -1)].any()
    assert not grad_bias[hidden].any()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # the interpreter's, of finfo.min in base 2
@given(cases(), st.data())
@property_test(20)
def test_ruled_out_keys(device, dtype, case, data):
    case["bias"] = True
    keys, heads = case["len_k"] or case["len_q"], case["heads"]
    names = st.lists(st.sampled_from(list(PATTERNS)), min_size=heads, max_size=heads)
    hidden = hidden_keys([data.draw(names) for _ in keys], keys, case["seed"])
    check_ruled_out(Case(dtype, **case), hidden, data.draw(st.sampled_from(NEVER)), device)


@pytest.mark.blocks
@pytest.mark.parametrize("stats", [False, True], ids=["plain", "stats"])
def test_ruled_out_blocks_of_keys(device, dtype, stats):
    # One head for each pattern. Above 128 keys whole blocks come before or behind those that are seen.
    heads = len(PATTERNS)
    for len_q, len_k in (([3, 2], [1, 2]), ([70, 2], [128, 2]), ([20], [200])):
        case = Case(dtype, 16, len_q, len_k, heads=heads, bias=True, stats=stats)
        hidden = hidden_keys([list(PATTERNS), ["all"] * heads][: len(len_k)], len_k, seed=1)
        check_ruled_out(case, hidden, float("-inf"), device)
    case = Case(dtype, 16, [150], heads=heads, bias=True, stats=stats, causal=True)
    check_ruled_out(case, hidden_keys([list(PATTERNS)], [150], seed=2), float("-inf"), device)


@pytest.mark.parametrize("length", [40, 150])
def test_large_scores(device, dtype, length):
    # Scores of some hundred: nothing overflows, and the error is that of plain PyTorch in float32 (and of rounding).
    case = Case(dtype, 32, [length], stats=True, size=8.0)
    (out, lse, entropy, mass), grads = run(case, device)
    want, want_grads = case.reference()
    assert float(want[1].detach().abs().max()) > 100
    plain, plain_grads = case.reference(torch.float32)
    sides = zip((out, lse, entropy, mass, grads[0]), (*want, want_grads[0]), (*plain, plain_grads[0]))
    for name, (a, b, c) in zip(("out", "lse", "entropy", "mass", "grad"), sides):
        error, usual = (float((x.detach().double().cpu() - b.detach()).norm() / b.detach().norm()) for x in (a, c))
        bound = 4 * usual + BOUND[a.dtype]
        assert error <= bound, f"{name}: relative error {error:.3g}, allowed {bound:.3g}"


@pytest.mark.blocks
def test_two_runs_agree_bit_for_bit(device, dtype):
    for width, lengths in ((64, [50, 26]), (32, [98, 20]), (64, [197, 3])):
        case = Case(dtype, width, lengths, bias=True, stats=True)
        first, second = run(case, device), run(case, device)
        for a, b in zip((*first[0], *first[1]), (*second[0], *second[1])):
            assert torch.equal(a, b)


def test_public_op(device, dtype):
    qkv = random_tensor(2, 9, 3, 2, 24, dtype=dtype)
    bias, marked = random_tensor(2, 9, 2, seed=1), random_tensor(2, 9, seed=2) > 0

    def run(backend, there, cast):
        leaves = [cast(x).to(there).requires_grad_() for x in (qkv, bias)]
        options = {"key_bias": leaves[1], "marked": marked.to(there), "stats": True, "backend": backend}
        out, stats = ops.attention(leaves[0], **options)
        return out, stats, torch.autograd.grad(out.sum() + stats.entropy.sum() + stats.mass.sum(), leaves)

    got, want = run("triton", device, lambda x: x.clone()), run("reference", "cpu", torch.Tensor.double)
    for name, a, b in zip(
        ("out", "lse", "entropy", "mass", "grad qkv", "grad bias"),
        (got[0], *got[1], *got[2]),
        (want[0], *want[1], *want[2]),
    ):
        assert_close(a, b, name, dtype)


def test_refuses_float64(device):
    qkv = torch.zeros(2, 3, 1, 16, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="float64"):
        kernels.attention(qkv, None, None, None, 1, 2, 2, 1.0, False, None, None, False)


if INTERPRET:

    @pytest.mark.parametrize("at_end", [True, False], ids=["behind", "before"])
    def test_nothing_outside_is_touched(monkeypatch, at_end):
        monkeypatch.setattr(kernels, "torch", FencedTorch(at_end))
        both = fenced(kernels.attention, at_end), fenced(kernels.attention_backward, at_end)
        for width in (24, 64):
            Case(torch.float32, width, [11], causal=True).run("cpu", *both)
            Case(torch.float16, width, [5, 0, 17], bias=True, stats=True).run("cpu", *both)
            Case(torch.float32, width, [3, 40], [70, 1], bias=True, stats=True).run("cpu", *both)
            Case(torch.float16, width, [141], heads=1, bias=True, stats=True).run("cpu", *both)
            Case(torch.float32, width, [0, 0], [3, 5]).run("cpu", *both)

else:

    @pytest.mark.gpu
    def test_cuda_graph(device, dtype):
        case = Case(dtype, 64, [50, 0, 26], bias=True, stats=True)
        want = run(case, device)  # compiles the kernels
        inputs = [x if x is None else x.to(device) for x in (case.q, case.kv, *case.cu, case.bias, case.marked)]
        q, kv, cu_q, cu_k, bias, marked = inputs
        grads = [g.to(device) for g in (case.grad, *case.grads)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernels.attention(q, kv, cu_q, cu_k, *case.sizes, bias, marked, True)
            back = kernels.attention_backward(*grads, q, kv, *out, cu_q, cu_k, *case.sizes, bias, marked, True)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip((*out, *back), (*want[0], *want[1])):
            assert torch.equal(a, b)
