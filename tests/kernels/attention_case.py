"""One call of attention: random inputs, what the reference makes of them in float64, and the comparison."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from maefast.ops.attention import attention_reference
from tests.kernels.support import random_tensor

# A few roundings of the format: scores, probabilities and score gradients each pass through it on the way.
BOUND = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

NEVER = [float("-inf"), torch.finfo(torch.float32).min]
PATTERNS = {  # which of n keys a query cannot see; in parts of the kernels' blocks of keys, whole ones and several
    "none": lambda n, pick: torch.zeros(n, dtype=torch.bool),
    "all": lambda n, pick: torch.ones(n, dtype=torch.bool),
    "some": lambda n, pick: pick < 0.5,
    "most": lambda n, pick: pick < 0.97,
    "first half": lambda n, pick: torch.arange(n) < n / 2,
    "all but the first": lambda n, pick: torch.arange(n) > 0,
    "all but the last": lambda n, pick: torch.arange(n) < n - 1,
}


def assert_close(out, ref, what, dtype=None, floor=0.0):
    """||out - ref|| <= bound * ||ref||; elements nobody wrote are NaN and fail. `dtype` if not out's."""
    assert tuple(out.shape) == tuple(ref.shape), f"{what}: {tuple(out.shape)} instead of {tuple(ref.shape)}"
    low, high = out.detach().double().cpu(), ref.detach().double().cpu()
    error, size = float((low - high).norm()), max(floor, float(high.norm()))
    bound = BOUND[dtype or out.dtype]
    print(f"{what}: error {error:.3g} of {size:.3g}, allowed {bound}")
    assert error <= bound * size, f"{what}: error {error:.3g} of {size:.3g}, allowed {bound}"


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def rule_out(bias, hidden, value):
    return torch.where(hidden, torch.tensor(value, dtype=bias.dtype), bias)


def hidden_keys(patterns: list[list[str]], lengths: list[int], seed: int) -> torch.Tensor:
    """bool [keys, heads] from the name of a pattern for each sequence and head."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda name, n: PATTERNS[name](n, torch.rand(n, generator=generator))  # noqa: E731
    return torch.cat([torch.stack([draw(p, n) for p in row], 1) for row, n in zip(patterns, lengths)])


def blind_queries(hidden: torch.Tensor, pairs, causal: bool) -> torch.Tensor:
    """bool [queries, heads]: those that see no key."""
    parts = zip(pairs, hidden.split([m for _, m in pairs]))
    return torch.cat([h.cumprod(0).bool() if causal else h.all(0).expand(n, -1) for (n, _), h in parts])


@st.composite
def random_calls(draw, longest: int, most: int, heads: int) -> dict:
    """Arguments of a `Case`: up to `most` sequences and `heads` heads, self or cross, any width that a kernel takes."""
    batch = draw(st.integers(1, most))
    each = st.lists(st.integers(0, longest), min_size=batch, max_size=batch)
    cross = draw(st.booleans())
    return {
        "width": draw(st.sampled_from(range(16, 129, 8))),
        "len_q": draw(each),
        "len_k": draw(each) if cross else None,
        "heads": draw(st.integers(1, heads)),
        "causal": not cross and draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


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

    def rule_out(self, hidden, blind, value):
        """Biases of -inf; infinite gradients of the statistics of queries that see nothing."""
        self.bias = rule_out(self.bias, hidden, value)
        for i, g in enumerate(self.grads):
            self.grads[i] = None if g is None else g.masked_fill(blind, float("-inf") if i % 2 else float("inf"))

    def reference(self, wide=torch.float64):
        """(out, lse, entropy, mass), gradients of the inputs that are there."""
        leaves = [x if x is None else x.detach().to(wide).requires_grad_() for x in (self.q, self.kv, self.bias)]
        out = attention_reference(*leaves, self.marked, *self.cu, *self.sizes, self.stats)
        results = [(y, g.to(wide)) for y, g in zip(out, (self.grad, *self.grads)) if g is not None]
        there = [x for x in leaves if x is not None]
        values, weights = zip(*results)
        grads = torch.autograd.grad(values, there, weights, allow_unused=True)
        return out, [torch.zeros_like(x) if g is None else g for x, g in zip(there, grads)]

    def run(self, device, forward, backward):
        """Results and gradients of two functions with the raw ops' arguments."""
        to = lambda x: x if x is None else x.to(device)  # noqa: E731
        q, kv, bias, marked = map(to, (self.q, self.kv, self.bias, self.marked))
        cu = tuple(map(to, self.cu))
        out = forward(q, kv, *cu, *self.sizes, bias, marked, self.stats)
        *grads, of_pairs = backward(
            to(self.grad), *map(to, self.grads), q, kv, *out, *cu, *self.sizes, bias, marked, bias is not None
        )
        assert of_pairs.numel() == 0
        return out, grads

    def check(self, device, forward, backward, share=0.01):
        """`share`: of the size of all gradients, the least that the error of one is measured by."""
        want, want_grads = self.reference()
        out, grads = self.run(device, forward, backward)
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
            if self.stats:
                assert_close(a, b, name, floor=1.0)
            else:
                assert tuple(a.shape) == (0,)
        assert grads[0].dtype is dtype
        low = [g for g, x in zip(grads, (self.q, self.kv, self.bias)) if x is not None]
        for gradient, x in zip(grads, (self.q, self.kv, self.bias)):
            assert x is not None or tuple(gradient.shape) == (0,)
        # Scores of queries that see one key have no gradient: zero is compared on the scale of the others.
        floor = share * float(torch.cat([x.flatten() for x in want_grads]).norm())
        names = [n for n, x in zip(("grad q", "grad kv", "grad bias"), (self.q, self.kv, self.bias)) if x is not None]
        for name, a, b in zip(names, low, want_grads):
            assert_close(a, b, name, dtype, floor)
        return out, grads
