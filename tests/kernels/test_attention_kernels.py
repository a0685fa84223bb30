"""attention: the Triton kernels against float64 plain PyTorch, forward with statistics and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import ops
from maefast.kernels import attention as kernels
from maefast.ops.attention import attention_reference
from tests.kernels.support import INTERPRET, property_test, random_tensor

WIDTHS = range(16, 129, 8)

# A few roundings of the format: scores, probabilities and score gradients each pass through it on the way.
BOUND = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_close(out, ref, what, dtype=None, floor=0.0):
    """||out - ref|| <= bound * ||ref||; elements nobody wrote are NaN and fail. `dtype` if not out's."""
    assert tuple(out.shape) == tuple(ref.shape), f"{what}: {tuple(out.shape)} instead of {tuple(ref.shape)}"
    low, high = out.detach().double().cpu(), ref.detach().double().cpu()
    error, size = float((low - high).norm()), max(floor, float(high.norm()))
    bound = BOUND[dtype or out.dtype]
    assert error <= bound * size, f"{what}: error {error:.3g} of {size:.3g}, allowed {bound}"


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


class Case:
    """Inputs on the CPU, and what attention_reference makes of them in float64."""

    def __init__(
        self,
        dtype,
        width,
        len_q,
        len_k=None,
        heads=2,
        causal=False,
        bias=False,
        stats=False,
        seed=0,
        packed=None,
        size=1.0,
    ):
        cross = len_k is not None
        keys = len_k if cross else len_q
        rows, columns = sum(len_q), sum(keys)
        packed = len(set(len_q)) > 1 or len(set(keys)) > 1 if packed is None else packed
        draw = lambda i, *shape: random_tensor(*shape, seed=100 * seed + i, dtype=dtype)  # noqa: E731
        self.q = draw(0, rows, heads, width) * size if cross else draw(0, rows, 3, heads, width) * size
        self.kv = draw(1, columns, 2, heads, width) if cross else None
        self.bias = random_tensor(columns, heads, seed=seed + 2) if bias else None
        self.marked = random_tensor(columns, seed=seed + 3) > 0 if stats else None
        self.cu = (starts(len_q), starts(len_k) if cross else None) if packed else (None, None)
        self.sizes = (len(len_q), max(len_q), max(keys), width**-0.5, causal)
        self.stats = stats
        self.grad = draw(4, rows, heads, width)
        self.grads = [random_tensor(rows, heads, seed=seed + 5 + i) for i in range(3)] if stats else [None] * 3

    def reference(self, wide=torch.float64):
        """(out, lse, entropy, mass), gradients of the inputs that are there."""
        leaves = [x if x is None else x.detach().to(wide).requires_grad_() for x in (self.q, self.kv, self.bias)]
        out = attention_reference(*leaves, self.marked, *self.cu, *self.sizes, self.stats)
        results = [(y, g.to(wide)) for y, g in zip(out, (self.grad, *self.grads)) if g is not None]
        there = [x for x in leaves if x is not None]
        values, weights = zip(*results)
        grads = torch.autograd.grad(values, there, weights, allow_unused=True)
        return out, [torch.zeros_like(x) if g is None else g for x, g in zip(there, grads)]

    def run(self, device):
        to = lambda x: x if x is None else x.to(device)  # noqa: E731
        q, kv, bias, marked = map(to, (self.q, self.kv, self.bias, self.marked))
        cu = tuple(map(to, self.cu))
        out = kernels.attention(q, kv, *cu, *self.sizes, bias, marked, self.stats)
        grads = kernels.attention_backward(
            to(self.grad), *map(to, self.grads), q, kv, *out, *cu, *self.sizes, bias, marked, bias is not None
        )
        return out, grads

    def check(self, device):
        want, want_grads = self.reference()
        out, grads = self.run(device)
        dtype = self.q.dtype
        assert out[0].dtype is dtype
        assert_close(out[0], want[0], "out")
        keyless = want[1] == float("-inf")
        assert torch.equal(out[1].cpu() == float("-inf"), keyless)
        # The log-sum-exp may cancel to any small number: what counts is its error as part of an exponent.
        floor = want[1].numel() ** 0.5
        assert_close(out[1].cpu().masked_fill(keyless, 0), want[1].masked_fill(keyless, 0), "lse", floor=floor)
        for name, a, b in zip(("entropy", "mass"), out[2:], want[2:]):
            assert a.dtype is torch.float32
            assert_close(a, b, name, floor=1.0) if self.stats else self.is_empty(a)
        assert grads[0].dtype is dtype
        low = [g for g, x in zip(grads, (self.q, self.kv, self.bias)) if x is not None]
        [self.is_empty(g) for g, x in zip(grads, (self.q, self.kv, self.bias)) if x is None]
        if self.sizes[2] < 2:  # one key takes all: scores have no gradient, and zero has no relative error
            low, want_grads = ([torch.cat([g.double().cpu().flatten() for g in side])] for side in (low, want_grads))
        for name, a, b in zip(("grad q", "grad kv", "grad bias"), low, want_grads):
            assert_close(a, b, name, dtype)

    @staticmethod
    def is_empty(x):
        assert tuple(x.shape) == (0,)


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
    Case(dtype, **case).check(device)


@pytest.mark.parametrize("width", [32, 64, 88])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
def test_every_tile(device, dtype, width, extras):
    # Each tile of forward_tile and backward_tile, just full and begun.
    for length in (1, 16, 17, 32, 33, 64, 65, 128, 129):
        Case(dtype, width, [length], heads=1, causal=extras and length % 2 == 0, bias=extras, stats=extras).check(
            device
        )


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_long_sequences(device, dtype, causal):
    extras = {"bias": causal, "stats": causal, "causal": causal}
    Case(dtype, 32, [197, 0, 70], heads=1, **extras).check(device)
    Case(dtype, 64, [270], heads=1, **extras).check(device)
    Case(dtype, 24, [300, 64, 1], heads=1, **extras).check(device)


def test_ragged_cross_attention(device, dtype):
    Case(dtype, 32, [5, 0, 140, 3], [200, 7, 0, 130], bias=True, stats=True).check(device)
    Case(dtype, 128, [1, 70, 9], [257, 1, 30], heads=1, bias=True).check(device)
    Case(dtype, 40, [147] * 2, [50] * 2).check(device)
    Case(dtype, 16, [1030], [20], heads=1).check(device)  # too many queries for one program's backward


def test_programs_that_take_several_blocks_of_queries(device, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    Case(dtype, 32, [100, 0, 70], stats=True, bias=True).check(device)
    Case(dtype, 32, [197], causal=True).check(device)


def test_no_queries_or_no_keys(device, dtype):
    for extras in (False, True):
        Case(dtype, 16, [0, 0], [3, 5], bias=extras, stats=extras).check(device)
        Case(dtype, 16, [3, 5], [0, 0], bias=extras, stats=extras).check(device)
        Case(dtype, 16, [3, 3], [0, 0], bias=extras, stats=extras, packed=False).check(device)
        Case(dtype, 16, [0, 0], bias=extras, stats=extras).check(device)


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
        out, grads = case.run(device)
        for name, a, b in zip(("out", "lse", "entropy", "mass"), out, want):
            assert_close(a, b, name)
        for name, a, b in zip(("grad q", "grad kv", "grad bias"), grads, want_grads):
            a = a.cpu() if name == "grad q" else a.cpu()[there]
            assert_close(a, b, name, dtype)
        assert all(bool((g.cpu()[~there] == 0).all()) for g in grads[1:])


@pytest.mark.parametrize("length", [40, 150])
def test_large_scores(device, dtype, length):
    # Scores of some hundred: nothing overflows, and the error is that of plain PyTorch in float32 (and of rounding).
    case = Case(dtype, 32, [length], stats=True, size=8.0)
    (out, lse, entropy, mass), grads = case.run(device)
    want, want_grads = case.reference()
    assert float(want[1].detach().abs().max()) > 100
    plain, plain_grads = case.reference(torch.float32)
    sides = zip((out, lse, entropy, mass, grads[0]), (*want, want_grads[0]), (*plain, plain_grads[0]))
    for name, (a, b, c) in zip(("out", "lse", "entropy", "mass", "grad"), sides):
        error, usual = (float((x.detach().double().cpu() - b.detach()).norm() / b.detach().norm()) for x in (a, c))
        bound = 4 * usual + BOUND[a.dtype]
        assert error <= bound, f"{name}: relative error {error:.3g}, allowed {bound:.3g}"


def test_two_runs_agree_bit_for_bit(device, dtype):
    for width, lengths in ((64, [50, 26]), (32, [98, 20]), (64, [197, 3])):
        case = Case(dtype, width, lengths, bias=True, stats=True)
        first, second = case.run(device), case.run(device)
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


if not INTERPRET:

    @pytest.mark.gpu
    def test_cuda_graph(device, dtype):
        case = Case(dtype, 64, [50, 0, 26], bias=True, stats=True)
        want = case.run(device)  # compiles the kernels
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
