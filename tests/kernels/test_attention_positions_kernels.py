"""attention with a bias of pairs and a rotation: the Triton kernels against float64 plain PyTorch, every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast.kernels import attention as kernels
from maefast.ops.attention import attention_reference
from tests.kernels.attention_case import NEVER, assert_close, starts
from tests.kernels.support import INTERPRET, property_test, random_tensor
from tests.kernels.test_bounds_kernels import FencedTorch, fenced

INF = float("inf")


class Case:
    """`turn`: None, "shared" or "rows". lengths: of packed sequences, without a bias."""

    def __init__(
        self, dtype, width, len_q, len_k=None, more=1, groups=2, heads=2, bias=True, turn=None, interleaved=False,
        causal=False, key_bias=False, stats=False, never=None, lengths=None, seed=0,
    ):  # fmt: skip
        batch = len(lengths) if lengths else more * groups
        rows, keys = sum(lengths) if lengths else batch * len_q, batch * (len_k or len_q)
        draw = lambda i, *shape, dtype=torch.float32: random_tensor(*shape, seed=10 * seed + i, dtype=dtype)  # noqa: E731
        self.q = draw(0, rows, *(() if len_k else (3,)), heads, width, dtype=dtype)
        self.kv = draw(1, keys, 2, heads, width, dtype=dtype) if len_k else None
        self.key_bias = draw(2, rows if lengths else keys, heads) if key_bias else None
        self.marked = draw(3, rows if lengths else keys) > 0 if stats else None
        self.bias = draw(4, groups, heads, len_q, len_k or len_q) if bias else None
        if never is not None:
            self.bias = self.bias.masked_fill(draw(5, *self.bias.shape) > 0.3, never)
        self.turn = (None, None, False)
        if turn is not None:
            rows_of = len_q if turn == "shared" else rows
            self.turn = *(draw(i, rows_of, width) for i in (6, 7)), interleaved
        longest = max(lengths) if lengths else len_q
        self.sizes = batch, longest, longest if lengths else len_k or len_q, width**-0.5, causal
        self.cu = starts(lengths) if lengths else None
        self.stats, self.grad = stats, draw(8, rows, heads, width, dtype=dtype)
        self.grads = [draw(9 + i, rows, heads) if stats else None for i in range(3)]

    def reference(self):
        given = self.q, self.kv, self.key_bias, self.bias
        leaves = [t if t is None else t.double().requires_grad_() for t in given]
        cos, sin, interleaved = self.turn
        turn = (cos, sin) if cos is None else (cos.double(), sin.double())
        q, kv, key_bias, bias = leaves
        out = attention_reference(
            q, kv, key_bias, self.marked, self.cu, None, *self.sizes, self.stats, bias, *turn, interleaved
        )
        blind = out[1] == -INF
        self.grads = [g if g is None else g.masked_fill(blind, INF) for g in self.grads]
        pairs = [(y, g.double()) for y, g in zip(out, (self.grad, *self.grads)) if g is not None]
        there = [t for t in leaves if t is not None]
        finite = [torch.where(g.isfinite(), g, 0) for _, g in pairs]
        return out, torch.autograd.grad([y for y, _ in pairs], there, finite, allow_unused=True)

    def check(self, device, both=(kernels.attention, kernels.attention_backward)):
        out, want = self.reference()
        to = lambda t: t if t is None else t.to(device)  # noqa: E731
        q, kv, key_bias, marked, bias, cos, sin, cu = map(
            to, (self.q, self.kv, self.key_bias, self.marked, self.bias, *self.turn[:2], self.cu)
        )
        places = bias, cos, sin, self.turn[2]
        forward, backward = both
        got = forward(q, kv, cu, None, *self.sizes, key_bias, marked, self.stats, *places)
        assert_close(got[0], out[0], "out")
        seen = out[1] != -INF
        assert torch.equal(got[1].cpu() != -INF, seen)
        # What was rotated is rounded to the dtype of q: its sines are of any size, scores of size 2 are ordinary.
        dtype, size = (None, 1.0) if cos is None else (self.q.dtype, 3.0)
        assert_close(got[1].cpu()[seen], out[1][seen], "lse", dtype, floor=size * float(seen.sum()) ** 0.5)
        for name, a, b in zip(("entropy", "mass"), got[2:], out[2:] if self.stats else ()):
            assert_close(a, b, name, dtype, floor=1.0)
        grads = [to(g) for g in (self.grad, *self.grads)]
        options = *self.sizes, key_bias, marked, key_bias is not None, *places, bias is not None
        found = backward(*grads, q, kv, *got, cu, None, *options)
        names, there = ("q", "kv", "key_bias", "bias"), [q, kv, key_bias, bias]
        low = [(n, g) for n, g, t in zip(names, found, there) if t is not None]
        assert all(g.numel() == 0 for g, t in zip(found, there) if t is None)
        # A score's gradient is P (dP - rowsum(dO * O)): as exact as the terms of that sum, also where few keys are
        # visible and the difference is small by chance. BOUND is 2 roundings in 16 bits, 80 in float32.
        terms = (0.1 if self.q.dtype is torch.float32 else 0.3) * float((out[0].detach() * self.grad).norm())
        floor = max(0.01 * float(torch.cat([g.flatten() for g in want if g is not None]).norm()), terms)
        for (name, a), b in zip(low, want):
            assert_close(a, b, f"grad {name}", self.q.dtype, floor)
        if self.bias is not None:
            assert not found[3].cpu()[self.bias <= NEVER[1]].any()


@st.composite
def cases(draw):
    """Several keys always: the gradients of scores are zero without."""
    lengths = st.integers(2, 40)
    len_k = draw(st.none() | lengths)
    options = {name: draw(st.booleans()) for name in ("key_bias", "stats", "interleaved")}
    options["turn"] = None if len_k else draw(st.sampled_from([None, "shared", "rows"]))
    options["bias"] = options["turn"] is None or draw(st.booleans())
    options["never"] = draw(st.sampled_from([None, *NEVER])) if options["bias"] else None
    return {
        "width": draw(st.sampled_from(range(16, 129, 8))),
        "len_q": draw(lengths),
        "len_k": len_k,
        "more": draw(st.integers(1, 2)),
        "groups": draw(st.integers(1, 3)),
        "heads": draw(st.integers(1, 2)),
        "causal": len_k is None and draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
        **options,
    }


@given(cases())
@property_test(40)
def test_short_sequences(device, dtype, case):
    Case(dtype, **case).check(device)


@pytest.mark.blocks
@pytest.mark.parametrize("width", [32, 88])
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_tile(device, dtype, width, interleaved):
    for length in (5, 16, 17, 33, 65, 129):
        options = {"turn": "rows", "interleaved": interleaved, "causal": length % 2 == 0, "heads": 1}
        Case(dtype, width, length, groups=2 if length < 64 else 1, **options).check(device)


@pytest.mark.blocks
@pytest.mark.parametrize("causal", [False, True])
def test_many_blocks(device, dtype, causal):
    Case(dtype, 32, 300, groups=1, heads=1, turn="shared", causal=causal, stats=True).check(device)


@pytest.mark.blocks
def test_long_cross_attention(device, dtype):
    Case(dtype, 24, 150, 290, groups=1, heads=1, key_bias=True, stats=True, never=-INF).check(device)


@pytest.mark.blocks
@pytest.mark.parametrize("lengths", [[5, 0, 33, 1], [70, 290]], ids=str)
def test_packed_rotation(device, dtype, lengths):
    for interleaved in (False, True):
        options = {"lengths": lengths, "bias": False, "turn": "rows", "interleaved": interleaved, "heads": 1}
        Case(dtype, 40, 0, **options).check(device)


@pytest.mark.blocks
def test_runs_agree_bit_for_bit(device, dtype):
    case = Case(dtype, 32, 70, more=4, turn="shared")
    to = lambda t: t.to(device)  # noqa: E731
    places = to(case.bias), *map(to, case.turn[:2]), False
    runs = []
    for _ in range(2):
        out = kernels.attention(to(case.q), None, None, None, *case.sizes, None, None, False, *places)
        grads = to(case.grad), None, None, None
        options = *case.sizes, None, None, False, *places, True
        runs.append([*out, *kernels.attention_backward(*grads, to(case.q), None, *out, None, None, *options)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_no_keys_or_no_sequences(device, dtype):
    for shape, groups in (((0, 3, 2, 16), 1), ((0, 3, 2, 16), 2)):
        q, bias = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(groups, 2, 5, 5, device=device)
        places = bias, None, None, False
        out = kernels.attention(q, None, None, None, 0, 5, 5, 0.25, False, None, None, False, *places)
        options = 0, 5, 5, 0.25, False, None, None, False, *places, True
        back = kernels.attention_backward(out[0], None, None, None, q, None, *out, None, None, *options)
        assert back[3].shape == bias.shape
        assert not back[3].any()


if INTERPRET:

    @pytest.mark.parametrize("at_end", [True, False], ids=["behind", "before"])
    def test_nothing_outside_is_touched(monkeypatch, at_end):
        monkeypatch.setattr(kernels, "torch", FencedTorch(at_end))
        both = fenced(kernels.attention, at_end), fenced(kernels.attention_backward, at_end)
        for interleaved in (False, True):
            options = {"turn": "rows", "interleaved": interleaved, "more": 1}
            Case(torch.float32, 24, 19, stats=True, key_bias=True, **options).check("cpu", both)
            Case(torch.float16, 32, 5, 17, stats=True, key_bias=True).check("cpu", both)
            Case(torch.float32, 24, 141, heads=1, groups=1, **options).check("cpu", both)
