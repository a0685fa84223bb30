"""`MaskedAutoencoderViT` by structure: facebookresearch/mae and its forks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import maefast
from maefast.bench.peers.public.mae import MaskedAutoencoderViT
from tests.integrations.common import DropIn, relative

SIZES = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "norm_pix_loss": True,
}


def images(dtype: torch.dtype = torch.float32, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=dtype)


class TestMAE(DropIn):
    sweeps = True
    families = ("facebookresearch/mae",)
    replaced = 8  # four blocks, four methods

    def make(self):
        return MaskedAutoencoderViT(**SIZES)

    def inputs(self, dtype):
        return (images(dtype),), {"mask_ratio": 0.6}

    def loss(self, out):
        return out[0]


class TestWithoutNormalisation(TestMAE):
    sweeps = False

    def make(self):
        return MaskedAutoencoderViT(**{**SIZES, "norm_pix_loss": False})


def pair(kind: type = MaskedAutoencoderViT, **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = kind(**SIZES).double()
    return model, maefast.accelerate(copy.deepcopy(model), **options)


def run(function, *args):
    torch.manual_seed(1)
    return function(*args)


def test_the_three_parts_keep_their_contracts():
    model, fast = pair()
    x = images(torch.float64)
    want, got = run(model.forward_encoder, x, 0.5), run(fast.forward_encoder, x, 0.5)
    assert relative(got[0], want[0]) < 1e-12
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2], want[2])
    pred = model.forward_decoder(want[0], want[2])
    assert relative(fast.forward_decoder(want[0], want[2]), pred) < 1e-12
    for mask in (want[1], torch.rand_like(want[1])):  # any weights may stand in the mask
        assert relative(fast.forward_loss(x, pred, mask), model.forward_loss(x, pred, mask)) < 1e-12


@pytest.mark.parametrize("ratio", [0.0, 0.3, 15 / 16, 1.0])
def test_extreme_ratios(ratio):
    model, fast = pair()
    x = images(torch.float64)
    for a, b in zip(run(fast, x, ratio), run(model, x, ratio)):
        assert a.shape == b.shape
        assert torch.allclose(a, b, equal_nan=True)


def test_masked_predictions():
    """pred="masked": same loss and gradients, predictions of masked patches in plan order."""
    model, fast = pair(pred="masked")
    x = images(torch.float64)
    want, got = run(model, x, 0.6), run(fast, x, 0.6)
    assert relative(got[0], want[0]) < 1e-12
    torch.manual_seed(1)
    order = torch.rand(3, 16).argsort(1)[:, int(16 * 0.4) :]
    rows = want[1].gather(1, order[..., None].expand(-1, -1, want[1].shape[-1]))
    assert relative(got[1], rows) < 1e-12
    want[0].backward()
    got[0].backward()
    for (name, p), (_, q) in zip(fast.named_parameters(), model.named_parameters()):
        if q.grad is not None and q.grad.norm() > 1e-8:
            assert relative(p.grad, q.grad) < 1e-9, name
    # The parts keep the contract of full predictions.
    latent, _, ids = run(model.forward_encoder, x, 0.6)
    assert fast.forward_decoder(latent, ids).shape == want[1].shape


def test_a_ratio_of_none_is_refused():
    """It is no default."""
    for net in pair():
        for args, kwargs in (((None,), {}), ((), {"mask_ratio": None})):
            with pytest.raises(TypeError):
                net(images(torch.float64), *args, **kwargs)


def test_a_decoder_called_with_any_order():
    """With tokens twice, or one more of them than places: the model gathers what it is told to."""
    model, fast = pair()
    x = torch.randn(2, 9, 48).double()
    order = torch.rand(2, 16).argsort(1)
    twice = order.clone()
    twice[0, 3] = twice[0, 5]
    for latent, ids in ((x, twice), (torch.randn(2, 18, 48).double(), order), (x, torch.zeros_like(order))):
        assert relative(fast.forward_decoder(latent, ids), model.forward_decoder(latent, ids)) < 1e-12
    assert relative(fast.forward_decoder(x, order), model.forward_decoder(x, order)) < 1e-12
    (note,) = (note for note in maefast.report(fast).notes if note.method == "forward_decoder")
    assert note.runs.startswith("ran fast once, as it was 3 times")


def test_what_the_model_refuses_it_still_refuses():
    model, fast = pair()
    for bad in (images(torch.float64)[:, :2], torch.zeros(2, 3, 40, 40, dtype=torch.float64), images(torch.float32)):
        with pytest.raises((AssertionError, RuntimeError)) as want:
            model(bad)
        with pytest.raises(type(want.value)):
            fast(bad)


class OtherLoss(MaskedAutoencoderViT):
    def forward_loss(self, imgs, pred, mask):
        return ((pred - self.patchify(imgs)).abs().mean(-1) * mask).sum() / mask.sum()


class OtherMasking(MaskedAutoencoderViT):
    def random_masking(self, x, mask_ratio):
        return super().random_masking(x.flip(1), mask_ratio)


class OtherForward(MaskedAutoencoderViT):
    def forward(self, imgs, mask_ratio=0.75):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(imgs, mask_ratio)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        (OtherLoss, {"forward_loss", "forward"}),
        (OtherMasking, {"forward_encoder", "forward"}),
        (OtherForward, {"forward"}),
    ],
)
def test_overrides_are_kept(kind, kept):
    model, fast = pair(kind)
    report = maefast.report(fast)
    assert {note.method for note in report.kept} == kept
    assert f"{kind.__name__}." in str(report)
    x = images(torch.float64)
    for a, b in zip(run(fast, x, 0.6), run(model, x, 0.6)):
        assert relative(a, b) < 1e-12
    if kind is OtherForward:
        assert fast.calls == 1 + model.calls - 1


def test_own_method_of_one_object_is_kept():
    model, _ = pair()
    model.forward_loss = lambda imgs, pred, mask: pred.sum()
    report = maefast.report(maefast.accelerate(model))
    assert any("this object has its own forward_loss" in note.text for note in report.kept)
    assert model(images(torch.float64))[0].dtype is torch.float64


def test_a_fork_that_computes_something_else_is_found_out():
    """Same names, other maths, in the class itself: only the comparison can tell."""

    class Fork(MaskedAutoencoderViT):
        pass

    def forward_loss(self, imgs, pred, mask):
        target = self.patchify(imgs)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-5) ** 0.5
        return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()

    original = MaskedAutoencoderViT.forward_loss
    try:
        MaskedAutoencoderViT.forward_loss = forward_loss
        model, fast = pair()
        report = maefast.report(fast)
        assert {note.method for note in report.kept} == {"forward_loss", "forward"}
        assert "not what it looks like" in str(report)
        x = images(torch.float64)
        assert relative(run(fast, x)[0], run(model, x)[0]) < 1e-12
    finally:
        MaskedAutoencoderViT.forward_loss = original


def test_stopped_gradients_are_found_out():
    original = MaskedAutoencoderViT.forward_decoder
    try:
        MaskedAutoencoderViT.forward_decoder = lambda self, x, ids: original(self, x.detach(), ids)
        _, fast = pair()
        # By itself the decoder looks right (its input is a leaf of the probe); the whole model does not.
        assert any(note.method == "forward" for note in maefast.report(fast).kept)
    finally:
        MaskedAutoencoderViT.forward_decoder = original
