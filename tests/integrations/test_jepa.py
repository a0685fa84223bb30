"""I-JEPA and V-JEPA: encoders, predictors, wrappers, and their `apply_masks`."""

import copy
import types

import pytest
import torch
from torch.utils._pytree import tree_leaves

import maefast
from maefast.bench.peers.public import jepa as models
from maefast.integrations import jepa
from tests.integrations.common import DropIn, gradient_error, relative


def images(batch=2, dtype=torch.float32, frames=None, size=16):
    return torch.randn(batch, 3, *([frames] if frames else []), size, size).to(dtype)


def kept(count, num_tokens=16, batch=2):
    return torch.rand(batch, num_tokens).argsort(1)[:, :count]


def total(out):
    return sum((leaf - torch.linspace(-1, 1, leaf.numel()).view_as(leaf)).square().mean() for leaf in tree_leaves(out))


class Common(DropIn):
    families = ("JEPA",)
    replaced = 6  # four blocks, encoder, predictor

    def loss(self, out):
        return total(out)


class TestImages(Common):
    sweeps = True

    def make(self):
        return models.IJepa()

    def inputs(self, dtype):
        return (images(dtype=dtype), [kept(6), kept(6)], [kept(3), kept(3), kept(3)]), {}


class TestVideos(Common):
    """Two pairs of masks of different sizes, as V-JEPA trains with."""

    sweeps = True

    def make(self):
        return models.VJepa()

    def inputs(self, dtype):
        video = images(dtype=dtype, frames=4)
        return (video, [kept(9, 32), kept(5, 32)], [kept(12, 32), kept(20, 32)]), {}


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
    assert type(got) is type(want)
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert a.dtype is b.dtype
        assert a.shape == b.shape
        assert relative(a, b) < tolerance
    for net, out in ((model, want), (fast, got)):
        net.zero_grad()
        total(out).backward()
    assert gradient_error(fast, model) < 10 * tolerance


@pytest.mark.parametrize("masks", [None, "one", "few", "many", "repeated"])
@pytest.mark.parametrize("make", [models.ImageEncoder, models.VideoEncoder])
def test_encoder(make, masks):
    model, fast = pair(make)
    frames, n = (None, 16) if make is models.ImageEncoder else (4, 32)
    given = {
        None: None,
        "one": kept(5, n),
        "few": [kept(3, n), kept(3, n)],
        "many": [kept(n // 2, n) for _ in range(3)],
        "repeated": [kept(3, n)[:, [0, 1, 1]], kept(3, n)],
    }[masks]
    same(model, fast, images(frames=frames), given)


def test_kept_patches_only(monkeypatch):
    _, fast = pair(models.ImageEncoder)
    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", lambda *args: pytest.fail("the whole grid was embedded"))
    seen = []
    rows = jepa.ops.linear
    embed = jepa.ops.patch_embed

    def watch(*args, **kwargs):
        out = embed(*args, **kwargs)
        seen.append(out.shape[1])
        return out

    monkeypatch.setattr(jepa, "ops", types.SimpleNamespace(patch_embed=watch, linear=rows))
    for masks in (kept(5), [kept(5), kept(5)], [kept(8), kept(8)], None):
        fast(images(), masks)
    assert seen == [5, 10, 16, 16]


@pytest.mark.parametrize("frames", [1, 4])
def test_out_layers(frames):
    model, fast = pair(models.VideoEncoder, num_frames=frames, depth=3, out_layers=[0, 2])
    same(model, fast, images(frames=None if frames == 1 else frames))
    same(model, fast, images(frames=None if frames == 1 else frames), [kept(5)])


@pytest.mark.parametrize("make", [models.IJepa, models.VJepa])
def test_dropout(make):
    """Draws as the original does; V-JEPA's attention drops in evaluation too."""
    model, fast = pair(make, drop=0.3)
    assert not maefast.report(fast).kept
    args = (images(), [kept(6)], [kept(3)]) if make is models.IJepa else (images(frames=4), [kept(6)], [kept(3)])
    same(model, fast, *args)
    same(model.eval(), fast.eval(), *args)


def test_other_sizes_are_interpolated():
    for make, frames in ((models.ImageEncoder, None), (models.VideoEncoder, 4)):
        model, fast = pair(make)
        same(model, fast, images(frames=frames, size=24), kept(5))
    model, fast = pair(models.VideoEncoder)
    same(model, fast, images(frames=8), None)


def test_gradients_of_images_and_positions():
    """Positions that repeat take part in both gradients as often as they stand there."""
    model, fast = pair(models.ImageEncoder)
    masks = [kept(3)[:, [0, 1, 1]], kept(3)]
    for net in (model, fast):
        net.pos_embed.requires_grad_()
    x = images()
    grads = []
    for net in (model, fast):
        own = x.clone().requires_grad_()
        total(net(own, masks)).backward()
        grads.append((own.grad, net.pos_embed.grad))
    for a, b in zip(*grads):
        assert relative(b, a) < 1e-5


@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize("targets", [1, 3])
def test_image_predictor(contexts, targets):
    model, fast = pair(models.ImagePredictor)
    masks_x, masks = [kept(6) for _ in range(contexts)], [kept(4) for _ in range(targets)]
    same(model, fast, torch.randn(2 * contexts, 6, 48), masks_x, masks)
    if contexts == targets == 1:
        same(model, fast, torch.randn(2, 6, 48), masks_x[0], masks[0])


def test_video_predictor():
    model, fast = pair(models.VideoPredictor)
    x, tgt, masks = torch.randn(2, 6, 48), torch.randn(2, 4, 48), (kept(6, 32), kept(4, 32))
    for index in (0, 1, 2):
        same(model, fast, x, tgt, *masks, mask_index=index)
    same(model, fast, x, tgt, [masks[0]], [masks[1]])


def test_noisy_targets_are_left_to_the_original():
    model, fast = pair(models.VideoPredictor, use_mask_tokens=False)
    report = maefast.report(fast)
    assert [note.method for note in report.kept] == ["forward"]
    assert "noisy targets" in str(report)
    assert len(report.replaced) == 2
    same(model, fast, torch.randn(2, 6, 48), torch.randn(2, 4, 48), kept(6, 32), kept(4, 32))


def test_errors_stay():
    model, fast = pair(models.IJepa)
    outside = kept(6)
    outside[1, 2] = 16
    cases = [
        (images(), [outside], [kept(3)]),
        (images(), [kept(6), kept(5)], [kept(3)]),
        (images(), [kept(6)], [kept(3), kept(4)]),
        (images()[:, :2], [kept(6)], [kept(3)]),
        (images(), [kept(6).float()], [kept(3)]),
        (images(), [], [kept(3)]),
    ]
    for args in cases:
        errors = []
        for net in (model, fast):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                net(*args)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]


class OwnPositions(models.ImageEncoder):
    def interpolate_pos_encoding(self, x, pos_embed):
        return 2 * super().interpolate_pos_encoding(x, pos_embed)


class OwnForward(models.ImagePredictor):
    def forward(self, x, masks_x, masks):
        return 2 * super().forward(x, masks_x, masks)


def test_overrides_stay():
    model, fast = pair(OwnPositions)
    assert "overrides" in str(maefast.report(fast))
    same(model, fast, images(), [kept(5)])
    model, fast = pair(OwnForward)
    assert "overrides" in str(maefast.report(fast))
    same(model, fast, torch.randn(2, 6, 48), [kept(6)], [kept(3)])


# --- apply_masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_apply_masks(dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 16, 5).to(dtype)
    masks = [kept(4, batch=3) for _ in range(4)]
    masks[1] = masks[1][:, [0, 1, 1, 2]]
    want = models.apply_masks(x, masks)
    assert torch.equal(jepa.apply_masks(x, masks), want)
    assert torch.equal(jepa.apply_masks(x.mT.contiguous().mT, [m.int() for m in masks]), want)
    assert torch.equal(jepa.apply_masks(x, masks[0]), want[:3])
    grads = []
    for function in (models.apply_masks, jepa.apply_masks, jepa.apply_masks):
        own = x.clone().requires_grad_()
        (function(own, masks).sin() ** 2).sum().backward()
        grads.append(own.grad)
    assert relative(grads[1], grads[0]) < {torch.bfloat16: 1e-2, torch.float32: 1e-6}.get(dtype, 1e-14)
    assert torch.equal(grads[1], grads[2])


def test_apply_masks_apart():
    x, masks = torch.randn(2, 16, 5, requires_grad=True), [kept(4), kept(7)]
    got = jepa.apply_masks(x, masks, concat=False)
    assert isinstance(got, list)
    for out, mask in zip(got, masks, strict=True):
        assert torch.equal(out, models.apply_masks(x, [mask]))
    got[0].mul_(2)  # no view that refuses it
    got[0].sum().backward()
    assert x.grad.sum() == 2 * 2 * 4 * 5


def test_apply_masks_compiles():
    torch._dynamo.reset()
    x, masks = torch.randn(2, 16, 5), [kept(4), kept(4)]
    compiled = torch.compile(jepa.apply_masks, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, masks), models.apply_masks(x, masks))


def test_apply_masks_arguments():
    x = torch.randn(2, 16, 5)
    with pytest.raises(ValueError, match="empty"):
        jepa.apply_masks(x, [])
    with pytest.raises(ValueError, match="different numbers"):
        jepa.apply_masks(x, [kept(4), kept(5)])
    with pytest.raises(ValueError, match="integer tensors"):
        jepa.apply_masks(x, [kept(4).float()])
    with pytest.raises(ValueError, match="integer tensors"):
        jepa.apply_masks(x, [kept(4, batch=3)])
    for wrong in (-1, 16):
        with pytest.raises(ValueError, match="outside"):
            jepa.apply_masks(x, [torch.full((2, 3), wrong)])
