"""linear: the same numbers from whichever library serves, and a choice that is made once and kept."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from maefast import ops

from .common import assert_close, property_test

family = importlib.import_module("maefast.ops.linear")
needs_onednn = pytest.mark.skipif(not family._has_onednn(), reason="this torch has no private oneDNN linear")


@pytest.fixture(params=["torch", pytest.param("onednn", marks=needs_onednn)])
def library(request, monkeypatch):
    """Force one library, for products of any size."""
    monkeypatch.setattr(family, "_choice", (request.param, "test"))
    monkeypatch.setattr(family, "MIN_WORK", 0)
    return request.param


@given(data=st.data())
@property_test
def test_product_and_every_gradient(library, data):
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    inner, outer = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    x = torch.randn(*shape, inner, generator=generator, requires_grad=True)
    leaves = [x, torch.randn(outer, inner, generator=generator, requires_grad=True)]
    if data.draw(st.booleans()):
        leaves.append(torch.randn(outer, generator=generator, requires_grad=True))
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    if data.draw(st.booleans()):  # strided input
        wide = torch.randn(*shape, 2 * inner, generator=generator)
        leaves[0] = wide[..., ::2].requires_grad_()
        doubles[0] = leaves[0].detach().double().requires_grad_()
    out, ref = ops.linear(*leaves), F.linear(*doubles)
    assert_close(out, ref, torch.float32)
    seed = torch.randn(ref.shape, generator=generator)
    got = torch.autograd.grad(out, leaves, seed)
    for grad, want in zip(got, torch.autograd.grad(ref, doubles, seed.double())):
        assert_close(grad, want, torch.float32)


@pytest.mark.parametrize("bias", [torch.randn(9, 2)[:, 0], torch.randn(1).expand(9)], ids=["strided", "expanded"])
def test_a_bias_with_strides(library, bias):
    x, weight, bias = torch.randn(5, 8), torch.randn(9, 8), bias.detach().requires_grad_()
    out = ops.linear(x, weight, bias)
    assert_close(out, F.linear(x.double(), weight.double(), bias.double()), torch.float32)
    (grad,) = torch.autograd.grad(out.sum(), bias)
    assert_close(grad, torch.full((9,), 5.0), torch.float32)


def test_other_calls_are_torch_itself(library):
    x, weight = torch.randn(5, 8), torch.randn(3, 8)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(ops.linear(x.to(dtype), weight.to(dtype)), F.linear(x.to(dtype), weight.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight).dtype is torch.bfloat16
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 7\] for this weight"):
        ops.linear(x, weight[:, 1:])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(library, dynamic):
    weight, bias = torch.randn(6, 8, requires_grad=True), torch.randn(6, requires_grad=True)
    compiled = torch.compile(
        lambda x: ops.linear(x, weight, bias).square().sum(), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for rows in (3, 5):
        x = torch.randn(2, rows, 8, requires_grad=True)
        got = torch.autograd.grad(compiled(x), [x, weight, bias])
        want = torch.autograd.grad(ops.linear(x, weight, bias).square().sum(), [x, weight, bias])
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)


@needs_onednn
def test_inductor_takes_symbolic_sizes(monkeypatch):
    """Its own lowering of oneDNN's product does not."""
    monkeypatch.setattr(family, "_choice", ("onednn", "test"))
    monkeypatch.setattr(family, "MIN_WORK", 0)
    weight, bias = torch.randn(6, 8, requires_grad=True), torch.randn(6, requires_grad=True)
    compiled = torch.compile(lambda x: ops.linear(x, weight, bias).square().sum(), fullgraph=True, dynamic=True)
    x = torch.randn(2, 3, 8, requires_grad=True)
    got = torch.autograd.grad(compiled(x), [x, weight, bias])
    for a, b in zip(got, torch.autograd.grad(F.linear(x, weight, bias).square().sum(), [x, weight, bias])):
        torch.testing.assert_close(a, b)


def test_choice_is_measured_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MAEFAST_LINEAR", raising=False)
    monkeypatch.setattr(family, "_has_onednn", lambda: True)
    for ratio, name in ((3.0, "onednn"), (1.1, "torch")):
        monkeypatch.setattr(family, "_measure", lambda ratio=ratio: ratio)
        assert family._decide()[0] == name
        (kept,) = tmp_path.glob("maefast/*.json")
        assert json.loads(kept.read_text())["library"] == name
        monkeypatch.setattr(family, "_measure", lambda: pytest.fail("measured again"))
        assert family._decide()[0] == name
        kept.write_text("{ half a rec")  # a broken record is measured again
    monkeypatch.setattr(family, "_measure", lambda: 2.0)
    assert family._decide()[0] == "onednn"


def test_choice_can_be_forced(monkeypatch):
    monkeypatch.setenv("MAEFAST_LINEAR", "torch")
    assert family._decide()[0] == "torch"
    monkeypatch.setenv("MAEFAST_LINEAR", "mkl")
    with pytest.raises(ValueError, match="MAEFAST_LINEAR must be"):
        family._decide()
    monkeypatch.setenv("MAEFAST_LINEAR", "onednn")
    monkeypatch.setattr(family, "_has_onednn", lambda: False)
    with pytest.raises(RuntimeError, match="no mkldnn"):
        family._decide()


@needs_onednn
def test_strided_input_takes_no_slow_path(monkeypatch):
    """Rows that are a slice of wider ones, as of a strided 1x1 convolution, are saved contiguous."""
    seen = []
    product = family._product
    monkeypatch.setattr(family, "_choice", ("onednn", "test"))
    monkeypatch.setattr(family, "MIN_WORK", 0)

    def record(x, weight, bias=None):
        seen.append(weight)
        return product(x, weight, bias)

    monkeypatch.setattr(family, "_product", record)
    x = torch.randn(6, 4, 8)[:, 0].requires_grad_()
    weight = torch.randn(10, 8).t().contiguous().t().requires_grad_()
    ops.linear(x, weight).sum().backward()
    assert len(seen) == 3
    assert all(w.is_contiguous() or w.t().is_contiguous() for w in seen)
