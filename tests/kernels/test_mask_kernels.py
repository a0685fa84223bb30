"""token_mask: the visible set and its order are those of a stable argsort, whatever the scores hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast.kernels.mask import MAX_TOKENS, token_mask
from maefast.ops.mask import token_mask_reference
from tests.kernels.support import property_test


def check(scores: torch.Tensor, counts: list[int], by_position: bool, device: str) -> None:
    cu = torch.tensor([0, *counts]).cumsum(0).int()
    want = token_mask_reference(scores, cu, int(cu[-1]), by_position)
    got = token_mask(scores.to(device), cu.to(device), int(cu[-1]), by_position)
    for name, a, b in zip(("visible", "masked", "slot"), got, want):
        assert a.dtype is torch.int32
        assert torch.equal(a.cpu(), b), f"{name} differs for {tuple(scores.shape)}, by_position={by_position}"


@st.composite
def cases(draw):
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 130))
    counts = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    return batch, tokens, counts, draw(st.integers(0, 2**16)), draw(st.sampled_from(["noise", "ties", "special"]))


@given(cases())
@property_test(40)
def test_equals_stable_argsort(device, dtype, case):
    batch, tokens, counts, seed, kind = case
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        scores = torch.randn(batch, tokens, generator=generator)
    elif kind == "ties":
        scores = torch.randint(-2, 3, (batch, tokens), generator=generator).float()
    else:
        nan, inf = float("nan"), float("inf")
        pool = torch.tensor([0.0, -0.0, nan, -nan, inf, -inf, 1e-40, -1e-40, 1.0, -1.0, 65504.0])
        scores = pool[torch.randint(len(pool), (batch, tokens), generator=generator)]
    for by_position in (False, True):
        check(scores.to(dtype), counts, by_position, device)


@pytest.mark.parametrize("by_position", [False, True], ids=["score", "position"])
@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 196, 512, 1568, 8192])
def test_sizes(device, dtype, tokens, by_position):
    scores = torch.rand(2, tokens, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    check(scores, [tokens // 4, tokens - tokens // 3], by_position, device)


@pytest.mark.parametrize("by_position", [False, True], ids=["score", "position"])
def test_all_and_none_visible(device, by_position):
    scores = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    check(scores, [0, 0, 0], by_position, device)
    check(scores, [50, 50, 50], by_position, device)
    check(scores, [0, 50, 7], by_position, device)


def test_bfloat16_bits_in_the_interpreter(device):
    # Keys are integers, so even the interpreter, whose bfloat16 arithmetic is not to be trusted, sorts them right.
    scores = torch.randn(2, 77, generator=torch.Generator().manual_seed(3)).bfloat16()
    check(scores, [20, 33], False, device)
    check(scores, [20, 33], True, device)


def test_refuses_what_it_cannot_sort(device):
    cu = torch.tensor([0, 1], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=str(MAX_TOKENS)):
        token_mask(torch.zeros(1, MAX_TOKENS + 1, device=device), cu, 1, False)
    with pytest.raises(TypeError, match="float64"):
        token_mask(torch.zeros(1, 4, dtype=torch.float64, device=device), cu, 1, False)
