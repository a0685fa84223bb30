"""Forks and later changes that were once wrong in silence."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import maefast
from maefast.bench.peers.public.timm_vit import Block
from tests.integrations.common import gradient_error, relative
from tests.integrations.test_guards import ROOT, build, fork, images, pair, runs, same

# --- forks --------------------------------------------------------------------------------------------------


def stops(self, x, ids_restore):
    return ROOT.forward_decoder(self, x.detach(), ids_restore)


def halves(self, imgs, pred, mask):
    return ROOT.forward_loss(self, imgs, 0.5 * pred + 0.5 * pred.detach(), mask)


def blind(self, x, mask_ratio):
    return ROOT.forward_encoder(self, x.detach(), mask_ratio)


@pytest.mark.parametrize(
    "methods",
    [{"forward_decoder": stops}, {"forward_loss": halves}, {"forward_encoder": blind}],
    ids=["decoder", "loss", "encoder"],
)
def test_gradients_that_stop_on_the_way(methods):
    """Gradients of what a method is given are compared too."""
    model, fast = pair(fork(**methods))
    found = []
    for net in (model, fast):
        torch.manual_seed(1)
        x = images(torch.float64).requires_grad_()
        net(x)[0].backward()
        found.append(torch.zeros_like(x) if x.grad is None else x.grad)
    assert gradient_error(fast, model) < 1e-9
    assert torch.allclose(*found, atol=1e-12)
    assert next(iter(methods)) in {note.method for note in maefast.report(fast).kept}


def frozen(self, name, value):
    if name == "__class__":
        raise AttributeError(f"{name} cannot be set any more")
    nn.Module.__setattr__(self, name, value)


def test_a_class_whose_attributes_cannot_be_set():
    model, fast = pair(fork(__setattr__=frozen))
    assert "forward_encoder" in str(maefast.report(fast))
    outs = []
    for net in (model, fast):
        torch.manual_seed(1)
        outs.append(net(images(torch.float64))[0])
    assert torch.allclose(*outs, atol=1e-12)
    maefast.restore(fast)
    assert type(fast) is type(model)


def weighted(self, imgs, weight=1.0, mask_ratio=0.75):
    loss, pred, mask = ROOT.forward(self, imgs, mask_ratio)
    return loss * weight, pred, mask


def test_other_arguments():
    model, fast = pair(fork(forward=weighted))
    outs = []
    for net in (model, fast):
        torch.manual_seed(1)
        outs.append(net(images(torch.float64), 0.5)[0])
    assert relative(outs[1], outs[0]) < 1e-12
    assert "its arguments are imgs, weight, mask_ratio" in str(maefast.report(fast))


@torch.no_grad()
def _normalise(weight):
    weight.copy_(nn.functional.normalize(weight))


def normalises(self, x, ids_restore):
    _normalise(self.decoder_pred.weight)
    return ROOT.forward_decoder(self, x, ids_restore)


def test_parameters_written_in_place():
    model, fast = pair(fork(forward_decoder=normalises))
    with torch.no_grad():
        for net in (model, fast):
            net.decoder_pred.weight.mul_(3)
    same(model, fast)
    assert torch.equal(fast.decoder_pred.weight, model.decoder_pred.weight)


# --- changes ------------------------------------------------------------------------------------------------


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def augmented(self, imgs, pred, mask):
    loss = ROOT.forward_loss(self, imgs, pred, mask)
    if hasattr(self, "aug"):
        loss = self.aug(loss)
    for part in self.list:
        loss = part(loss)
    return loss


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_parts_that_are_passed_over(when):
    model = build(fork(forward_loss=augmented))
    model.aug, model.list = nn.Identity(), nn.ModuleList()
    fast = copy.deepcopy(model)
    if when == "after":
        maefast.accelerate(fast)
    for net in (model, fast):
        net.aug.register_forward_hook(lambda module, args, out: out * 1.5)
    if when == "before":
        maefast.accelerate(fast)
    same(model, fast)
    assert "aug has a hook" in runs(fast)


def test_parts_that_come_later():
    for change in (lambda m: setattr(m, "aug", Double()), lambda m: m.list.append(Double())):
        model = build(fork(forward_loss=augmented))
        model.list = nn.ModuleList()
        fast = maefast.accelerate(copy.deepcopy(model))
        same(model, fast)
        assert runs(fast) == "ran fast once"
        for net in (model, fast):
            change(net)
        same(model, fast)


class LowRank(nn.Module):
    """An adapter with a dropout of its own, which draws a number for each token."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.drop = base, nn.Dropout(0.3)

    def forward(self, x):
        return self.base_layer(x) + self.drop(x).mean()


@pytest.mark.parametrize("name", ["decoder_pred", "decoder_norm", "decoder_blocks.1.mlp.fc2"])
def test_parts_that_draw_for_each_token(name):
    """The last block is not asked for fewer tokens then."""
    model, fast = pair()
    for net in (model, fast):
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, LowRank(net.get_submodule(name)))
    same(model, fast)


def by_dictionary(self, imgs, pred, mask):
    loss = ROOT.forward_loss(self, imgs, pred, mask)
    return loss * 2 if self.cfg["loss"]["l1"] or self.cfg["weights"][0] > 1 else loss


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy])
def test_values_inside_values(copied):
    for change in (lambda m: m.cfg["loss"].update(l1=True), lambda m: m.cfg["weights"].insert(0, 5)):
        model = build(fork(forward_loss=by_dictionary))
        model.cfg = {"loss": {"l1": False}, "weights": [1]}
        fast = maefast.accelerate(copy.deepcopy(model))
        same(model, fast)
        assert runs(fast) == "ran fast once"
        for net in (model, fast):
            change(net)
        same(model, copied(fast))


CONFIG = {"l1": False}


def by_module(self, imgs, pred, mask):
    loss = ROOT.forward_loss(self, imgs, pred, mask)
    return loss * 2 if CONFIG["l1"] else loss


def test_a_dictionary_of_the_module(monkeypatch):
    model, fast = pair(fork(forward_loss=by_module))
    same(model, fast)
    assert runs(fast) == "ran fast once"
    monkeypatch.setitem(CONFIG, "l1", True)
    same(model, fast)


def test_gradients_of_predictions():
    """The loss keeps a copy, so what is returned is what the loss was computed from."""
    model, fast = pair()
    grads = []
    for net in (model, fast):
        torch.manual_seed(1)
        loss, pred, _ = net(images(torch.float64))
        grads.append(torch.autograd.grad(loss, pred)[0])
    assert relative(grads[1], grads[0]) < 1e-10


def test_a_shallow_copy_is_restored_alone():
    block = maefast.accelerate(Block(32))
    other = copy.copy(block)
    maefast.restore(other)
    block(torch.randn(2, 5, 32))
    other(torch.randn(2, 5, 32))
    assert "ran fast once" in str(maefast.report(block))


def test_exported_code_is_the_models_own():
    block = Block(32).eval()
    x = torch.randn(2, 5, 32)
    exported = torch.export.export(maefast.accelerate(copy.deepcopy(block)), (x,))
    assert not any("maefast" in str(node.target) for node in exported.graph.nodes)
    assert relative(exported.module()(x), block(x)) < 1e-5
