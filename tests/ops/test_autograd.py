"""What the ops' autograd Functions share: second derivatives are refused aloud, and where no gradient is wanted there
is no node at all."""

from __future__ import annotations

import re

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import maefast
from maefast import ops

from .cases import CASES, make, on_cpu, onednn_everywhere, op_of, outputs, total  # noqa: F401
from .common import assert_close

pytestmark = pytest.mark.usefixtures("onednn_everywhere")
# A product of ops.linear, or of torch where the library says so; a gather.
BY_TORCH = ("conv_cells by rows", "relative_bias")
OURS = [param for param in on_cpu() if param.values[0] not in BY_TORCH]
REFUSAL = r"^maefast's {} has no second derivative: .* maefast.backend\('reference'\) or, .* maefast.restore\(model\)$"
SERVED_BY = {  # the op whose Function serves
    "patch_embed": "(patch_embed|linear)",
    "conv_cells on the map": "(un)?pack_cells",
    "group_norm_cells": "batch_norm_act/group_norm_cells",
    "instance_norm_cells": "batch_norm_act/group_norm_cells",
    "batch_norm_act": "batch_norm_act/group_norm_cells",
    "batch_norm_act in eval": "batch_norm_act/group_norm_cells",
    "global_pool_cells": "segment_sum",
    "conv_transpose_cells": "conv_cells",
}


def refusal(name: str) -> str:
    return REFUSAL.format(SERVED_BY.get(name, op_of(name)))


# --- second derivatives --------------------------------------------------------------------------------------


def in_form(value: torch.Tensor, form: str) -> torch.Tensor:
    if form == "strided":
        return value.repeat_interleave(2, -1).requires_grad_()[..., ::2]
    return value.requires_grad_() * 1 if form == "inner" else value.requires_grad_()


def first_gradients(name: str, backend: str, form: str):
    """(inputs, gradients with create_graph, gradients without)"""
    case = CASES[name]
    inputs = {k: in_form(t, form) for k, t in make(case, 0).items()}
    values = list(inputs.values())
    loss = total(outputs(case, backend, "cpu", inputs))
    plain = torch.autograd.grad(loss, values, retain_graph=True)
    return values, torch.autograd.grad(loss, values, create_graph=True), plain


@pytest.mark.parametrize("form", ["leaf", "inner", "strided"])
@pytest.mark.parametrize("name", OURS)
def test_a_gradient_penalty_is_refused(name, form):
    """Though the gradient that comes in is a constant: what the gradient owes to the saved tensors counts too."""
    values, grads, plain = first_gradients(name, "cpu", form)
    for a, b in zip(grads, plain, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match=refusal(name)):
        sum(g.square().sum() for g in grads).backward(retain_graph=True)
    # Beside a term of another origin torch would not miss a path: refused, or as the reference has it.
    others, wanted, _ = first_gradients(name, "reference", form)
    for value, other in zip(values, others):
        for grad, want in zip(grads, wanted):
            term = want.square().sum() if want.requires_grad else want.new_zeros(())
            (whole,) = torch.autograd.grad(term + other.sum(), other, retain_graph=True)
            try:
                (got,) = torch.autograd.grad(grad.square().sum() + value.sum(), value, retain_graph=True)
            except RuntimeError as error:
                assert re.search(refusal(name), str(error))  # noqa: PT017
            else:
                assert_close(got, whole, torch.float32)


def test_a_gradient_that_comes_in_is_differentiated_or_refused():
    """The chain through the incoming gradient, of an op whose backward reads no saved tensor."""
    x, scale = torch.randn(2, 5, 8, requires_grad=True), torch.randn(3, requires_grad=True)
    plan = ops.TokenMask.all_visible(2, 5)
    out = (ops.gather_tokens(x, plan, backend="cpu") * scale[0]).sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match=refusal("gather_tokens")):
        torch.autograd.grad(grad.sum() + scale.sum(), scale)


@pytest.mark.parametrize("name", on_cpu())
def test_the_remedy_works(name):
    case = CASES[name]
    inputs = {k: t.requires_grad_() for k, t in make(case, 0).items()}
    with maefast.backend("reference"):
        loss = total(outputs(case, None, "cpu", inputs)).square()
        grads = torch.autograd.grad(loss, list(inputs.values()), create_graph=True)
        sum(g.square().sum() for g in grads).backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in inputs.values())


@pytest.mark.parametrize("name", ["add_norm", "bias_gelu", "attention", "patch_loss"])
def test_second_derivatives_of_the_reference(name):
    case = CASES[name]
    inputs = {k: t.double().requires_grad_() for k, t in make(case, 0).items()}
    with maefast.backend("reference"):

        def call(*values):
            return tuple(outputs(case, None, "cpu", dict(zip(inputs, values))))

        assert torch.autograd.gradgradcheck(call, tuple(inputs.values()), fast_mode=True)


def block(x, weight, bias):
    residual, y = ops.add_norm(x, x.sin(), weight, bias, backend="cpu")
    return residual + ops.bias_gelu(y, bias, backend="cpu")


def block_inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).requires_grad_() for s in ((2, 5, 16), (16,), (16,))]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    inputs, again = block_inputs(), block_inputs()
    block(*inputs).square().sum().backward()
    checkpoint(block, *again, use_reentrant=reentrant).square().sum().backward()
    for a, b in zip(inputs, again):
        assert torch.equal(a.grad, b.grad)
    if reentrant:
        return  # torch refuses autograd.grad there
    grads = torch.autograd.grad(checkpoint(block, *again, use_reentrant=False).sum(), again, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        sum(g.square().sum() for g in grads).backward()


# --- without a gradient --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["no_grad", "frozen"])
@pytest.mark.parametrize("name", on_cpu())
def test_no_node_where_no_gradient_is_wanted(name, form, monkeypatch):
    case, grad = CASES[name], form == "frozen"
    made = make(case, 0)
    wanted = outputs(case, "cpu", "cpu", {k: t.clone().requires_grad_() for k, t in made.items()})
    inputs = {k: t.clone().requires_grad_(not grad) for k, t in made.items()}
    saved = []

    def never(*args):
        raise AssertionError("a Function ran")

    monkeypatch.setattr(torch.autograd.Function, "apply", never)
    with torch.set_grad_enabled(grad), torch.autograd.graph.saved_tensors_hooks(saved.append, never):
        outs = outputs(case, "cpu", "cpu", inputs)
    assert not saved
    for out, want in zip(outs, wanted, strict=True):
        assert not out.requires_grad
        assert out.grad_fn is None
        assert torch.equal(out, want)
        assert all(out.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in inputs.values())
    with torch.no_grad():
        outs[0].add_(1)  # a result is the caller's own
    assert all(torch.equal(t, made[k]) for k, t in inputs.items())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", [p for p in OURS if p.values[0] not in ("patch_embed", "depthwise_cells")])
def test_tangents_and_transforms_are_not_dropped(name, grad):
    case = CASES[name]
    inputs = make(case, 0)
    first = next(iter(inputs))
    with torch.set_grad_enabled(grad):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs[first], torch.ones_like(inputs[first]))
            with pytest.raises(NotImplementedError, match="jvp"):
                outputs(case, "cpu", "cpu", {**inputs, first: dual})
        with pytest.raises(RuntimeError, match=r"setup_context|not possible"):  # BatchNorm's buffers come first
            torch.func.vmap(lambda t: outputs(case, "cpu", "cpu", {**inputs, first: t}))(inputs[first][None])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("trainable", [None, (), (2,), (0, 1)], ids=["no_grad", "none", "bias", "others"])
def test_compiles_whole(dynamic, trainable):
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        inputs = [torch.randn(s) for s in ((2, rows, 16), (16,), (16,))]
        for i in range(3) if trainable is None else trainable:
            inputs[i].requires_grad_()
        with torch.set_grad_enabled(trainable is not None):
            out, want = compiled(*inputs), block(*inputs)
        torch.testing.assert_close(out, want)
        assert out.requires_grad == want.requires_grad == bool(trainable)
        if trainable:
            leaves = [inputs[i] for i in trainable]
            got = torch.autograd.grad(out.square().sum(), leaves)
            torch.testing.assert_close(got, torch.autograd.grad(want.square().sum(), leaves))
