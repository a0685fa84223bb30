"""VideoMAE v1 and v2, and the loss of their training engine."""

import copy

import pytest
import torch
import torch.nn.functional as F

import maefast
from maefast.bench.peers.public.videomae import Encoder, VideoMAE, VideoMAE2, engine_target
from maefast.integrations import videomae
from tests.integrations.common import DropIn, gradient_error, relative

N = 32


def videos(batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, 4, 16, 16).to(dtype)


def tube_mask(batch=2, visible=4):
    """Visible tubelets at other places in each sample: bool [B, N]."""
    return torch.rand(batch, N).argsort(1) >= visible


def running_cells(mask):
    """Half of the masked tubelets are decoded: bool, True = not decoded."""
    return ~(mask & (mask.cumsum(1) % 2 == 0))


class Common(DropIn):
    families = ("VideoMAE",)
    replaced = 7  # four blocks, encoder, decoder, pair

    def make(self):
        return VideoMAE()

    def inputs(self, dtype):
        return (videos(dtype=dtype), tube_mask()), {}

    def loss(self, out):
        return F.mse_loss(out, torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))


class TestV1(Common):
    sweeps = True
    pass


class TestV2(Common):
    sweeps = True
    """Decoder masks, layer scale, cosine attention in the blocks (which runs as it is)."""

    def make(self):
        return VideoMAE2(cos_attn=True, init_values=0.5)

    def inputs(self, dtype):
        mask = tube_mask()
        return (videos(dtype=dtype), mask, running_cells(mask)), {}


def pair(make, **options):
    torch.manual_seed(0)
    model = make(**options)
    return model, maefast.accelerate(copy.deepcopy(model))


def same(model, fast, *args, tolerance=2e-5, **kwargs):
    torch.manual_seed(1)
    want = model(*args, **kwargs)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    got = fast(*args, **kwargs)
    assert torch.equal(torch.get_rng_state(), after)
    assert got.shape == want.shape
    assert got.dtype is want.dtype
    assert relative(got, want) < tolerance
    for net, out in ((model, want), (fast, got)):
        net.zero_grad()
        out.square().mean().backward()
    assert gradient_error(fast, model) < 10 * tolerance


@pytest.mark.parametrize(
    "options",
    [{"with_cp": True}, {"drop_path": 0.5}, {"drop": 0.2}, {"init_values": 0.1}, {"with_cp": True, "drop_path": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("make", [VideoMAE, VideoMAE2])
@pytest.mark.filterwarnings("ignore:.*use_reentrant")
def test_options(make, options):
    model, fast = pair(make, **options)
    assert not maefast.report(fast).kept
    same(model, fast, videos(), tube_mask())


@pytest.mark.parametrize("how", ["none", "complement", "keyword", "with visible", "other overlaps", "ragged"])
def test_decode_masks(how):
    model, fast = pair(VideoMAE2)
    mask = tube_mask()
    if how == "none":
        same(model, fast, videos(), mask, None)
    elif how == "complement":  # what v2's collator sends where nothing is left out
        same(model, fast, videos(), mask, ~mask)
    elif how == "keyword":
        same(model, fast, x=videos(), mask=mask, decode_mask=running_cells(mask))
    elif how == "with visible":
        same(model, fast, videos(), mask, tube_mask(visible=9))
    elif how == "other overlaps":  # as many decoded in each sample, but not as many of them masked
        decode = mask.flip(1)
        decode[0] = mask[0]
        same(model, fast, videos(), mask, decode)
        assert all("as it was" not in note.runs for note in maefast.report(fast).notes)
    else:
        decode = running_cells(mask)
        decode[0, decode[0].nonzero()[:2]] = False
        decode[1, (~decode[1]).nonzero()[:2]] = True
        same(model, fast, videos(), mask, decode)


def test_only_kept_tubelets_and_one_plan(monkeypatch):
    _, fast = pair(VideoMAE)
    calls = []
    inner = videomae._uniform
    monkeypatch.setattr(videomae, "_uniform", lambda *masks: calls.append(len(masks)) or inner(*masks))
    monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", lambda *args: pytest.fail("all tubelets were embedded"))
    fast(videos(), tube_mask())
    assert calls == [1]
    seen = []
    fast.encoder.register_forward_pre_hook(lambda module, args: seen.append(args))
    mask = tube_mask()
    fast(videos(), mask)
    assert seen[0][1] is mask  # who watches sees what he always saw
    assert calls == [1, 1]  # the pair's own forward, and the encoder's plan


def test_encoder_restored_alone():
    model, fast = pair(VideoMAE)
    maefast.restore(fast.encoder)
    same(model, fast, videos(), tube_mask())


def test_uneven_masks_are_left_to_the_original():
    """Its reshape mixes samples where the counts differ, and raises where they do not divide."""
    model, fast = pair(VideoMAE)
    mask = tube_mask()
    mask[0, mask[0].nonzero()[:2]] = False
    same(model, fast, videos(), mask)
    mask[0, mask[0].nonzero()[:1]] = False
    for net in (model, fast):
        with pytest.raises(RuntimeError, match="shape"):
            net(videos(), mask)


def test_errors_stay():
    model, fast = pair(VideoMAE)
    for args in ((videos()[..., :8], tube_mask()), (videos()[:, :2], tube_mask()), (videos(), tube_mask()[:, :-1])):
        errors = []
        for net in (model, fast):
            with pytest.raises((AssertionError, RuntimeError, IndexError)) as caught:
                net(*args)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]
    with pytest.raises(TypeError, match="decode_mask"):
        fast(videos(), tube_mask(), decode_mask=tube_mask())


@pytest.mark.filterwarnings("ignore:indexing with dtype")
def test_unusual_masks_are_left_to_the_original():
    model, fast = pair(VideoMAE)
    for visible in (0, N):  # nothing to predict: it predicts everything
        same(model, fast, videos(), tube_mask(visible=visible))
    same(model, fast, videos(), tube_mask().to(torch.uint8) * 255)


def test_parts_alone():
    model, fast = pair(VideoMAE)
    mask = tube_mask()
    video = videos()
    assert relative(fast.encoder(video, mask), model.encoder(video, mask)) < 1e-5
    x = torch.randn(2, 9, 32)
    for count in (0, 1, 9, 12):
        assert relative(fast.decoder(x, count), model.decoder(x, count)) < 1e-5
    part = maefast.accelerate(copy.deepcopy(model.encoder))
    assert "VideoMAE" in maefast.report(part).families
    assert relative(part(video, mask), model.encoder(video, mask)) < 1e-5


def test_positions_stay_out_of_the_state():
    _, fast = pair(VideoMAE)
    fast(videos(), tube_mask())
    assert not any("pos_embed" in key for key in fast.state_dict())
    assert type(fast.pos_embed) is torch.Tensor


class Subclass(VideoMAE):
    def forward(self, x, mask):
        return super().forward(x, mask) * 2


class OwnFeatures(Encoder):
    def forward_features(self, x, mask):
        return super().forward_features(x, mask) * 2


class OwnEncoder(Encoder):
    """Looks at the mask: it must be the mask."""

    def forward(self, x, mask):
        return super().forward(x, mask) * mask.sum()


@pytest.mark.parametrize("kind", [OwnFeatures, OwnEncoder])
def test_encoder_with_overrides(kind):
    def make():
        model = VideoMAE()
        model.encoder.__class__ = kind
        return model

    model, fast = pair(make)
    kept = [(note.path, note.method) for note in maefast.report(fast).kept]
    assert kept == ([("encoder", "forward_features")] if kind is OwnFeatures else [])
    same(model, fast, videos(), tube_mask())


def test_override_stays():
    model, fast = pair(Subclass)
    assert [note.method for note in maefast.report(fast).kept] == ["forward"]
    same(model, fast, videos(), tube_mask())


def test_whole_bfloat16():
    model, fast = pair(VideoMAE)
    exact, mask, video = model(v := videos(), m := tube_mask()), m, v.bfloat16()
    model, fast = model.bfloat16(), fast.bfloat16()
    want, got = model(video, mask), fast(video, mask)
    assert got.dtype is torch.bfloat16
    assert relative(got, exact) <= 1.5 * relative(want, exact)


# --- the loss -----------------------------------------------------------------------------------------------


def engine_v1(pred, video, mask, normalize):
    target = engine_target(video, 4, normalize)
    return F.mse_loss(pred, target[mask].reshape(len(video), -1, target.shape[-1]))


def engine_v2(pred, video, mask, decode_mask, normalize):
    target = engine_target(video, 4, normalize)
    each = (pred - target[~decode_mask].reshape(pred.shape)).square().mean(-1)
    counts = mask[~decode_mask].reshape(each.shape)
    return (each * counts).sum() / counts.sum()


def scored(pred, *args, function, **kwargs):
    pred = pred.clone().requires_grad_()
    loss = function(pred, *args, **kwargs)
    loss.backward()
    return loss.detach(), pred.grad


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_v1(normalize, dtype):
    contrast, tolerance = (1e-4, 1e-12) if dtype is torch.float64 else (0.1, 2e-5)
    torch.manual_seed(0)
    video, mask = videos(3, dtype), tube_mask(3)
    video[1] *= contrast  # where the epsilon of the target shows
    pred = torch.randn(3, N - 4, 96, dtype=dtype)
    want = scored(pred, video, mask, normalize, function=engine_v1)
    got = scored(pred, video, mask, normalize_target=normalize, patch_size=4, function=videomae.loss)
    assert got[0].dtype is dtype
    for a, b in zip(got, want):
        assert relative(a, b) < tolerance


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["running cells", "all", "some visible"])
def test_loss_v2(normalize, kind):
    torch.manual_seed(0)
    video, mask = videos(3, torch.float64), tube_mask(3)
    decode = {"running cells": running_cells(mask), "all": ~mask, "some visible": tube_mask(3, 9)}[kind]
    pred = torch.randn(3, int((~decode[0]).sum()), 96, dtype=torch.float64)
    want = scored(pred, video, mask, decode, normalize, function=engine_v2)
    got = scored(
        pred, video, mask, normalize_target=normalize, patch_size=(4, 4), decode_mask=decode, function=videomae.loss
    )
    for a, b in zip(got, want):
        assert relative(a, b) < 1e-12


def test_loss_arguments():
    torch.manual_seed(0)
    video, mask = videos(), tube_mask()
    pred = torch.randn(2, N - 4, 96)
    usual = videomae.loss(pred, video, mask, patch_size=4)
    assert torch.equal(videomae.loss(pred, video, mask.view(2, 2, 4, 4).float(), patch_size=4), usual)
    mean, std = torch.tensor(videomae.IMAGENET_MEAN), torch.tensor(videomae.IMAGENET_STD)
    plain = video * std.view(3, 1, 1, 1) + mean.view(3, 1, 1, 1)
    assert relative(videomae.loss(pred, plain, mask, patch_size=4, mean=None, std=None), usual) < 1e-6
    assert videomae.loss(pred.bfloat16(), video, mask, patch_size=4).dtype is torch.float32
    with pytest.raises(ValueError, match="both mean and std"):
        videomae.loss(pred, video, mask, patch_size=4, std=None)
    with pytest.raises(ValueError, match="channels"):
        videomae.loss(pred, video, mask, patch_size=4, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="keep"):
        videomae.loss(pred[:, 1:], video, mask, patch_size=4)
    with pytest.raises(ValueError, match="pred"):
        videomae.loss(pred[0], video, mask, patch_size=4)
    nothing = videomae.loss(pred[:, :4], video, mask, patch_size=4, decode_mask=mask)
    assert nothing.isnan()  # as 0 / 0 in the engine
