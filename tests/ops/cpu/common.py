"""Shared by the raw-op tests of the C++ CPU kernels: the ops, random sizes and plans, the comparison rule."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from maefast import _native
from maefast.ops import TokenMask, _registry, token_mask
from tests.budget import examples
from tests.ops.common import TOLERANCE, relative_error

needs_cpu_ops = pytest.mark.skipif(not _native.has_cpu_ops, reason=f"no C++ CPU ops: {_native.why_missing('cpu')}")

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# (narrow, wide) pairs that place_tokens and restore_tokens convert between.
WIDENING = [(dtype, dtype) for dtype in FLOATS] + [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)]
# Not multiples of any vector width (4, 8, 16 floats), and exactly one, and one more.
WIDTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 65]

property_test = settings(
    max_examples=int(os.environ.get("MAEFAST_TEST_EXAMPLES") or examples(12, 40)),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def raw(op: str, *args):
    """The C++ kernel itself: no checks, no autograd around it."""
    return _registry.raw(op, "cpu")(*args)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def plans(draw, batches: tuple[int, ...] = (1, 2, 3, 5), tokens: tuple[int, ...] = (1, 2, 3, 7, 16, 21)) -> TokenMask:
    """One token, all visible, none visible, ragged counts, both orders."""
    return plan_of(draw, draw(st.sampled_from(batches)), draw(st.sampled_from(tokens)))


def plan_of(draw, batch: int, tokens: int) -> TokenMask:
    counts = st.integers(0, tokens)
    keep = draw(st.one_of(counts, st.lists(counts, min_size=batch, max_size=batch)))
    scores = randn(batch, tokens, seed=draw(st.integers(0, 1000)))
    return token_mask(scores, keep, order=draw(st.sampled_from(["score", "position"])), backend="reference")


def identical(out: Tensor, ref: Tensor, what: str = "output") -> None:
    """Same dtype, shape and bits (a NaN equals a NaN)."""
    assert (out.dtype, out.shape) == (ref.dtype, ref.shape), what
    torch.testing.assert_close(out, ref, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def close(out: Tensor, ref: Tensor, what: str = "output", slack: float = 0.0) -> None:
    """Relative error against float64 within the bound of out's dtype, plus `slack` where a test says why."""
    error = relative_error(out, ref)
    assert error <= TOLERANCE[out.dtype] + slack, f"{what}: relative error {error:.3g} in {out.dtype}"
