"""timm's `VisionTransformer` by structure, with patch dropout and without."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import maefast
from maefast import ops
from maefast.bench.peers.public.timm_vit import PatchDropout, VisionTransformer
from tests.integrations.common import DropIn, relative


def images(dtype: torch.dtype = torch.float32, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=dtype)


class TestPatchDropout(DropIn):
    sweeps = True
    families = ("timm ViT",)
    replaced = 3  # two blocks, forward_features

    def make(self):
        return VisionTransformer(patch_drop_rate=0.6, reg_tokens=2)

    def inputs(self, dtype):
        return (images(dtype),), {}

    def loss(self, out):
        return out.float().sub(1).square().mean() if out.dtype is torch.bfloat16 else out.sub(1).square().mean()


class TestPooled(TestPatchDropout):
    sweeps = False

    def make(self):
        return VisionTransformer(
            patch_drop_rate=0.5, no_embed_class=True, global_pool="avg", pre_norm=True, ordered=True
        )


def pair(kind: type = VisionTransformer, **sizes) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = kind(**{"patch_drop_rate": 0.5, **sizes}).double()
    return model, maefast.accelerate(copy.deepcopy(model))


def run(model, *args, **kwargs):
    torch.manual_seed(1)
    out = model(*args, **kwargs)
    return out, torch.get_rng_state()


def compare(model, fast, *args, **kwargs):
    (want, drawn), (got, also) = run(model, *args, **kwargs), run(fast, *args, **kwargs)
    assert relative(got, want) < 1e-12
    assert torch.equal(drawn, also)


@pytest.mark.parametrize(
    "sizes",
    [
        {"class_token": False, "global_pool": "avg"},
        {"patch_drop_rate": 0.99},
        {"patch_drop_rate": 0.0},
        {"pos_drop_rate": 0.2},
        {"reg_tokens": 3, "no_embed_class": True},
        {"dynamic_img_size": True},
        {"drop_path": 0.3, "init_values": 1e-5},
        {"attn_drop": 0.2, "drop": 0.1},
        {"qk_norm": True},
    ],
    ids=str,
)
def test_variants(sizes):
    model, fast = pair(**sizes)
    x = images(torch.float64)
    for training in (True, False):
        compare(model.train(training), fast.train(training), x)


def test_only_kept_patches_are_embedded(monkeypatch):
    rows = []
    embed = ops.patch_embed

    def spy(x, weight, bias, plan, **kwargs):
        rows.append(plan.keep)
        return embed(x, weight, bias, plan, **kwargs)

    monkeypatch.setattr(ops, "patch_embed", spy)
    _, fast = pair(patch_drop_rate=0.75)
    rows.clear()
    fast(images(torch.float64))
    assert rows == [4]
    fast.eval()(images(torch.float64))
    assert rows == [4]  # nothing is dropped: as the model does it


def test_changed_after_acceleration():
    """What is read at the call: rate, order, switched off, watched, another dropout."""
    model, fast = pair()
    x = images(torch.float64)
    for net in (model, fast):
        net.patch_drop.prob, net.patch_drop.ordered = 0.25, True
    compare(model, fast, x)
    seen = []
    handle = fast.patch_embed.proj.register_forward_hook(lambda m, i, o: seen.append(o.shape[2]))
    compare(model, fast, x)
    assert seen == [4]
    handle.remove()

    class Last(PatchDropout):
        def forward(self, x):
            return x[:, -5:]

    for net in (model, fast):
        net.patch_drop = Last(0.5)
    compare(model, fast, x)
    for net in (model, fast):
        net.patch_drop = nn.Identity()
        net.patch_embed = nn.Sequential(net.patch_embed, nn.Tanh())
    compare(model, fast, x)


def test_arguments_and_checkpointing():
    model, fast = pair()
    x = images(torch.float64)
    compare(model, fast, x, is_causal=True)
    mask = torch.randn(9, 9, dtype=torch.float64)
    compare(model, fast, x, attn_mask=mask)
    model.grad_checkpointing = fast.grad_checkpointing = True
    compare(model, fast, x)
    want, got = run(model, x)[0], run(fast, x)[0]
    want.sum().backward()
    got.sum().backward()
    assert relative(fast.pos_embed.grad, model.pos_embed.grad) < 1e-12


def test_what_the_model_refuses_it_still_refuses():
    model, fast = pair()
    for bad in (images(torch.float64)[:, :2], torch.zeros(2, 3, 40, 40, dtype=torch.float64), images()):
        with pytest.raises((AssertionError, RuntimeError)) as want:
            model(bad)
        with pytest.raises(type(want.value)):
            fast(bad)


class OtherPositions(VisionTransformer):
    def _pos_embed(self, x):
        return super()._pos_embed(x.flip(1))


class OtherFeatures(VisionTransformer):
    def forward_features(self, x, attn_mask=None, is_causal=False):
        return super().forward_features(x.flip(3)) * 2


class Switch(VisionTransformer):
    """Overrides nothing, but its own class reads a switch that is off."""

    flipped = False

    def _pos_embed(self, x):
        return super()._pos_embed(x.flip(1) if self.flipped else x)


@pytest.mark.parametrize(
    ("kind", "method"), [(OtherPositions, "patch_drop"), (OtherFeatures, "forward_features"), (Switch, "patch_drop")]
)
def test_overrides_are_kept(kind, method):
    model, fast = pair(kind)
    report = maefast.report(fast)
    assert [note.method for note in report.kept] == [method]
    assert "overrides" in str(report)
    compare(model, fast, images(torch.float64))
    model.flipped = fast.flipped = True
    compare(model, fast, images(torch.float64))


def test_unknown_patch_embedding_is_kept():
    class Odd(VisionTransformer):
        def __init__(self, **sizes):
            super().__init__(**sizes)
            self.patch_embed.proj = nn.Conv2d(3, 32, 10, stride=8, padding=1)

    model, fast = pair(Odd)
    assert "overlap" in str(maefast.report(fast))
    compare(model, fast, images(torch.float64))
