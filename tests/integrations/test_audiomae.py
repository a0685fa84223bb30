"""AudioMAE by structure, a fork of MAE whose methods take and return more."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import maefast
from maefast.bench.peers.public.audiomae import MaskedAutoencoderViT
from maefast.bench.peers.public.mae import MaskedAutoencoderViT as MAE
from maefast.integrations import _code
from tests.integrations.common import DropIn, gradient_error, relative
from tests.integrations.test_guards import build, fork

SIZES = {
    "img_size": (64, 32),
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}


def spectrograms(dtype: torch.dtype = torch.float32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 1, 64, 32, dtype=dtype)


class TestAudioMAE(DropIn):
    sweeps = True
    families = ("facebookresearch/mae",)
    kept = {"forward": "it returns 4 values, where maefast knows 3"}  # noqa: RUF012
    decoder_mode = 0
    replaced = 7  # four blocks, three methods

    def make(self):
        return MaskedAutoencoderViT(**SIZES, decoder_mode=self.decoder_mode)

    def inputs(self, dtype):
        return (spectrograms(dtype),), {"mask_ratio": 0.6}

    def loss(self, out):
        return out[0]

    def test_report(self):
        report = maefast.report(self.accelerate(self.build()))
        assert set(self.families) <= set(report.families)
        assert {note.where: note.text for note in report.kept} == self.kept
        assert len(report.replaced) == self.replaced
        assert "agree" in str(report)

    def test_unverified(self):
        fast = maefast.accelerate(self.build(), verify=False)
        assert "verify=False" in str(maefast.report(fast))
        assert {note.where for note in maefast.report(fast).kept} == set(self.kept)
        out = self.call(fast)
        assert len(out) == 4
        assert len(fast.forward_encoder(spectrograms(), 0.6)) == 4


class TestLocalDecoder(TestAudioMAE):
    decoder_mode = 1
    replaced = 5
    kept = {  # noqa: RUF012
        **TestAudioMAE.kept,
        **dict.fromkeys(
            ("decoder_blocks.0", "decoder_blocks.1"),
            "its forward uses feat_size, shift_size, window_size, which maefast does not know",
        ),
    }


def pair(kind: type = MaskedAutoencoderViT, **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = kind(**{**SIZES, **options}).double()
    return model, maefast.accelerate(copy.deepcopy(model))


def same(model, fast, *args, method="forward", **kwargs) -> None:
    outs = []
    for net in (model, fast):
        torch.manual_seed(1)
        out = getattr(net, method)(*args, **kwargs)
        outs.append((out if isinstance(out, tuple) else (out,), torch.get_rng_state()))
    (want, drawn), (got, also) = outs
    assert torch.equal(drawn, also)
    for a, b in zip(got, want, strict=True):
        assert type(a) is type(b)
        if b is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert relative(a, b) < 1e-10
    for net, out in ((model, want), (fast, got)):
        net.zero_grad()
        if out[0].requires_grad:
            out[0].pow(2).mean().backward()
    if want[0].requires_grad:
        assert gradient_error(fast, model) < 1e-9


def ran(fast: nn.Module, method: str) -> str:
    return next(note.runs for note in maefast.report(fast).notes if note.method == method)


@pytest.mark.parametrize("decoder_mode", [0, 1])
def test_the_parts_alone(decoder_mode):
    model, fast = pair(decoder_mode=decoder_mode)
    x = spectrograms(torch.float64)
    same(model, fast, x, 0.75, method="forward_encoder")
    same(model, fast, x, 0.75, False, method="forward_encoder")
    same(model, fast, x, 0.75, mask_2d=False, method="forward_encoder")
    assert ran(fast, "forward_encoder") == "ran fast 3 times"
    latent, mask, ids_restore, _ = model.forward_encoder(x, 0.75)
    same(model, fast, latent.detach(), ids_restore, method="forward_decoder")
    assert fast.forward_decoder(latent.detach(), ids_restore)[1:] == (None, None)
    pred = torch.randn(2, 32, 64).double()
    for args, kwargs in (((), {}), ((True,), {}), ((), {"norm_pix_loss": True})):
        same(model, fast, x, pred, mask, *args, method="forward_loss", **kwargs)
    assert ran(fast, "forward_loss") == "ran fast 3 times"


@pytest.mark.parametrize("how", ["keyword", "position", "attribute"])
def test_masks_in_time_and_frequency_are_the_models_own(how):
    model, fast = pair(mask_2d=how == "attribute")
    x = spectrograms(torch.float64)
    if how == "attribute":
        same(model, fast, x)
    elif how == "keyword":
        same(model, fast, x, 0.75, mask_2d=True, method="forward_encoder")
    else:
        same(model, fast, x, 0.75, True, method="forward_encoder")
    assert "as it was once" in ran(fast, "forward_encoder")


def test_only_visible_patches_and_no_target(monkeypatch):
    _, fast = pair()
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda *args: pytest.fail("all patches were embedded"))
    monkeypatch.setattr(torch, "var_mean", lambda *args, **kwargs: pytest.fail("a target was built"))
    fast(spectrograms(torch.float64))[0].backward()


def test_unknown_arguments_are_still_refused():
    _, fast = pair()
    for args, kwargs in (((0.5,), {"mask_3d": True}), ((0.5, False, 1), {}), ((0.5, False), {"mask_2d": False})):
        with pytest.raises(TypeError):
            fast.forward_encoder(spectrograms(torch.float64), *args, **kwargs)


def test_another_length():
    """The model has positions for one length only; its loss takes any."""
    model, fast = pair()
    long = torch.randn(2, 1, 96, 32).double()
    for net in (model, fast):
        with pytest.raises(RuntimeError):
            net(long)
    same(model, fast, long, torch.randn(2, 48, 64).double(), torch.rand(2, 48), method="forward_loss")


def test_masked_predictions_are_not_for_forks():
    """`forward` is the model's own, and so are its predictions."""
    torch.manual_seed(0)
    fast = maefast.accelerate(MaskedAutoencoderViT(**SIZES), pred="masked")
    assert fast(spectrograms())[1].shape == (2, 32, 64)


# --- other forks --------------------------------------------------------------------------------------------


class Kept(MaskedAutoencoderViT):
    def random_masking(self, x, mask_ratio):
        return super().random_masking(x.flip(1), mask_ratio)


def test_another_masking_stays():
    model, fast = pair(Kept)
    assert {note.method for note in maefast.report(fast).kept} == {"forward", "forward_encoder"}
    same(model, fast, spectrograms(torch.float64))


def with_indices(self, x, mask_ratio):
    """The fourth value is a tensor, of which maefast knows nothing."""
    latent, mask, ids_restore = MAE.forward_encoder(self, x, mask_ratio)
    return latent, mask, ids_restore, ids_restore.argsort(1)


def with_label(self, x, mask_ratio, label="photo", scale=1.0):
    latent, mask, ids_restore = MAE.forward_encoder(self, x, mask_ratio)
    return latent * scale, mask, ids_restore, "photo", 7


def test_tensors_behind_the_usual_values():
    def forward(self, imgs, mask_ratio=0.75):
        latent, mask, ids_restore, _ = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask

    model = build(fork(forward_encoder=with_indices, forward=forward))
    fast = maefast.accelerate(copy.deepcopy(model))
    kept = {note.method: note.text for note in maefast.report(fast).kept}
    assert "returns 4 values, the accelerated 3" in kept["forward_encoder"]
    same(model, fast, torch.randn(2, 3, 32, 32).double())


def test_constants_and_arguments_of_any_fork():
    def forward(self, imgs, mask_ratio=0.75):
        latent, mask, ids_restore, *_ = self.forward_encoder(imgs, mask_ratio, label="photo")
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask

    model = build(fork(forward_encoder=with_label, forward=forward))
    fast = maefast.accelerate(copy.deepcopy(model))
    x = torch.randn(2, 3, 32, 32).double()
    assert "forward_encoder" in {note.method for note in maefast.report(fast).replaced}
    for args, kwargs in (((), {}), (("photo",), {"scale": 1.0}), ((), {"scale": 2.0}), (("photo", 2.0), {})):
        outs = []
        for net in (model, fast):
            torch.manual_seed(1)
            outs.append(net.forward_encoder(x, 0.5, *args, **kwargs))
        assert outs[0][3:] == outs[1][3:] == ("photo", 7)
        assert relative(outs[1][0], outs[0][0]) < 1e-11
    assert ran(fast, "forward_encoder").startswith("ran fast 2 times, as it was 2 times")
    same(model, fast, x)


def test_how_many_values_code_returns():
    def either(x):
        return (x, 1) if x else (x, 1, 2)

    def computed(x):
        return tuple(x)

    found = [_code.returns(f) for f in (MAE.forward, MAE.forward_loss, MaskedAutoencoderViT.forward, either, computed)]
    assert found == [3, None, 4, None, None]
