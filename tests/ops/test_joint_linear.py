"""joint_linear: several layers of one input give what their weights side by side do, and no copy of these is kept."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import maefast
from maefast.ops._joint_linear import joint_linear

from .common import assert_close, property_test

family = importlib.import_module("maefast.ops.linear")
needs_onednn = pytest.mark.skipif(not family._has_onednn(), reason="this torch has no private oneDNN linear")


@pytest.fixture(params=["torch", "apart", pytest.param("onednn", marks=needs_onednn)])
def library(request, monkeypatch):
    """Force one library, for products of any size; torch's with weights side by side, or each by itself."""
    monkeypatch.setattr(family, "_choice", ("onednn" if request.param == "onednn" else "torch", "test"))
    monkeypatch.setattr(family, "MIN_WORK", 0)
    monkeypatch.setattr(family, "MIN_APART", 0 if request.param == "apart" else 2**60)
    return request.param


def layers(widths, inner, biased, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).requires_grad_()  # noqa: E731
    return [draw(n, inner) for n in widths], [draw(n) if b else None for n, b in zip(widths, biased)]


@given(data=st.data())
@property_test
def test_product_and_every_gradient(library, data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    least = 1 if library == "onednn" else 0  # which nothing empty is sent to: MIN_WORK, zero here
    shape = data.draw(st.lists(st.integers(least, 7), min_size=1, max_size=3))
    inner, widths = data.draw(st.integers(1, 40)), data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=3))
    biased = data.draw(st.lists(st.booleans(), min_size=len(widths), max_size=len(widths)))
    seed = data.draw(st.integers(0, 2**16))
    weights, biases = layers(widths, inner, biased, seed, dtype)
    x = torch.randn(*shape, inner, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    if data.draw(st.booleans()):  # strided input
        x = x.transpose(0, -2) if x.ndim > 2 else x.T.contiguous().T
    x.requires_grad_()
    leaves = [t for t in (x, *weights, *biases) if t is not None]
    frozen = data.draw(st.integers(0, len(leaves)))  # one of them, or none
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i != frozen)
    doubles = {id(t): t.detach().double().requires_grad_(t.requires_grad) for t in leaves}
    of = lambda t: None if t is None else doubles[id(t)]  # noqa: E731
    out = joint_linear(x, tuple(weights), tuple(biases))
    ref = torch.cat([F.linear(of(x), of(w), of(b)) for w, b in zip(weights, biases)], -1)
    assert out.is_contiguous()
    assert_close(out, ref, dtype)
    asked = [t for t in leaves if t.requires_grad]
    seed_grad = torch.randn(ref.shape, generator=torch.Generator().manual_seed(seed + 2)).to(dtype)
    got = torch.autograd.grad(out, asked, seed_grad)
    want = torch.autograd.grad(ref, [of(t) for t in asked], seed_grad.double())
    for leaf, grad, right in zip(asked, got, want):
        assert grad.shape == leaf.shape
        assert_close(grad, right, dtype)


def test_no_copy_of_the_weights_is_kept(library):
    weights, biases = layers((16, 16, 16), 16, (True, False, True), 0)
    x, kept = torch.randn(3, 16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        joint_linear(x, tuple(weights), tuple(biases))
    known = {t.data_ptr() for t in (x, *weights)}
    assert kept
    assert {t.data_ptr() for t in kept} == known


def test_a_weight_that_was_changed_is_told(library):
    weights, biases = layers((4, 4), 8, (False, False), 0)
    out = joint_linear(torch.randn(3, 8, requires_grad=True), tuple(weights), tuple(biases))
    with torch.no_grad():
        weights[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_autocast_reference_and_other_dtypes(library):
    weights, biases = layers((4, 6), 8, (True, True), 0)
    x = torch.randn(3, 8)
    whole = torch.cat(weights), torch.cat(biases)
    with torch.autocast("cpu", torch.bfloat16):
        out = joint_linear(x, tuple(weights), tuple(biases))
        assert torch.equal(out, F.linear(x, *whole))
        assert out.dtype is torch.bfloat16
    with maefast.backend("reference"):
        assert torch.equal(joint_linear(x, tuple(weights), tuple(biases)), F.linear(x, *whole))
    with pytest.raises((TypeError, RuntimeError)):
        joint_linear(x.double(), tuple(weights), tuple(biases))


def test_compiles_whole(library):
    weights, biases = layers((4, 6), 8, (True, False), 0)
    x = torch.randn(3, 8, requires_grad=True)
    run = lambda x: joint_linear(x, tuple(weights), tuple(biases)).square().sum()  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(*(torch.autograd.grad(f(x), [x, *weights, biases[0]]) for f in (compiled, run))):
        torch.testing.assert_close(got, want)
