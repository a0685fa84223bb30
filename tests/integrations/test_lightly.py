"""lightly's masked ViT encoder and decoders by structure."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import maefast
from maefast import ops
from maefast.bench.peers.public.lightly import MAEDecoderTIMM, MaskedVisionTransformerDecoderTIMM
from maefast.bench.peers.public.lightly import MaskedVisionTransformerTIMM as Encoder
from maefast.bench.peers.public.timm_vit import VisionTransformer
from tests.integrations.common import DropIn, relative


def split(batch: int = 3, length: int = 17, keep: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """(kept, masked) indices; the class token is always kept, and first."""
    noise = torch.rand(batch, length)
    noise[:, 0] = -1
    order = noise.argsort(1)
    return order[:, :keep], order[:, keep:]


class Both(nn.Module):
    """An MAE of lightly's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(VisionTransformer())
        self.embed = nn.Linear(32, 16)
        self.decoder = MaskedVisionTransformerDecoderTIMM(16, 16, 2, 2)
        self.head = nn.Linear(16, 8)

    def forward(self, images, kept, masked):
        latent = self.encoder.encode(images, idx_keep=kept)
        x = self.embed(latent)
        full = x.new_zeros(len(x), 17, 16).scatter(1, kept[..., None].expand(-1, -1, 16), x)
        out = self.decoder(full, idx_mask=masked)
        return self.head(out.gather(1, masked[..., None].expand(-1, -1, 16))), latent


class TestLightly(DropIn):
    sweeps = True
    families = ("lightly masked ViT", "timm ViT")
    replaced = 8  # four blocks, forward_features, preprocess and encode, preprocess and decode

    def make(self):
        return Both()

    def inputs(self, dtype):
        return (torch.randn(3, 3, 32, 32, dtype=dtype), *split()), {}

    def loss(self, out):
        return out[0].sub(1).square().mean()


class TestMAEDecoder(DropIn):
    sweeps = True
    families = ("lightly masked ViT",)
    replaced = 3

    def make(self):
        return MAEDecoderTIMM(16, 32, 16, 8)

    def inputs(self, dtype):
        return (torch.randn(2, 17, 32, dtype=dtype),), {}

    def loss(self, out):
        return out.sub(1).square().mean()


def pair(kind: type = Encoder, **sizes) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = kind(VisionTransformer(**sizes)).double()
    nn.init.normal_(model.mask_token)
    return model, maefast.accelerate(copy.deepcopy(model))


def images(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64)


@pytest.fixture
def embedded(monkeypatch):
    """How many patches a sample were embedded by the fused kernel."""
    rows, embed = [], ops.patch_embed

    def spy(x, weight, bias, plan, **kwargs):
        rows.append(plan.keep)
        return embed(x, weight, bias, plan, **kwargs)

    monkeypatch.setattr(ops, "patch_embed", spy)
    return rows


@pytest.mark.parametrize("sizes", [{}, {"no_embed_class": True}, {"pre_norm": True}], ids=str)
def test_kept_tokens_only(sizes, embedded):
    model, fast = pair(**sizes)
    embedded.clear()
    x, (kept, masked) = images(), split()
    assert relative(fast.encode(x, idx_keep=kept), model.encode(x, idx_keep=kept)) < 1e-12
    assert relative(fast(x, idx_keep=kept), model(x, idx_keep=kept)) < 1e-12
    assert embedded == [5, 5]
    for norm in (False, True):
        want = model.forward_intermediates(x, idx_keep=kept, norm=norm)
        got = fast.forward_intermediates(x, idx_keep=kept, norm=norm)
        for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
            assert relative(a, b) < 1e-12
    embedded.clear()
    for kwargs in ({}, {"idx_mask": masked}, {"mask": torch.rand(3, 17) < 0.5}, {"idx_mask": masked, "idx_keep": kept}):
        assert relative(fast.encode(x, **kwargs), model.encode(x, **kwargs)) < 1e-12
    assert embedded == []
    with pytest.raises(ValueError, match="not both"):
        fast.encode(x, idx_mask=masked, mask=torch.rand(3, 17) < 0.5)


def test_indices_out_of_the_ordinary(embedded):
    """No class token, repeated tokens, all or one token, indices out of range: as the model has it."""
    model, fast = pair(reg_tokens=2)
    embedded.clear()
    x = images()
    prefix = torch.arange(3).expand(3, -1)
    patches = torch.stack([torch.randperm(16) for _ in range(3)]) + 3
    unusual = [patches, torch.cat([prefix, patches[:, :4], patches[:, :1]], 1), prefix, prefix.flip(1), patches[:, :1]]
    for index in unusual:
        assert relative(fast.encode(x, idx_keep=index), model.encode(x, idx_keep=index)) < 1e-12
    assert embedded == []
    for index in (torch.cat([prefix, patches], 1), torch.cat([prefix, patches[:, :1]], 1)):
        assert relative(fast.encode(x, idx_keep=index), model.encode(x, idx_keep=index)) < 1e-12
    assert embedded == [16, 1]
    for bad in (torch.cat([prefix, patches + 1], 1), torch.cat([prefix, patches - 4], 1)):
        with pytest.raises((RuntimeError, IndexError)) as want:
            model.encode(x, idx_keep=bad)
        with pytest.raises(type(want.value)):
            fast.encode(x, idx_keep=bad)


def test_dropout_of_positions(embedded):
    model, fast = pair(pos_drop_rate=0.3)
    embedded.clear()
    x, (kept, _) = images(), split()
    torch.manual_seed(3)
    want = model.encode(x, idx_keep=kept)
    torch.manual_seed(3)
    assert relative(fast.encode(x, idx_keep=kept), want) < 1e-12
    assert embedded == []
    fast.eval().encode(x, idx_keep=kept)
    assert embedded == [5]


class OtherPositions(Encoder):
    def add_pos_embed(self, x):
        return super().add_pos_embed(x) * 2


class OtherEncode(Encoder):
    def encode(self, images, idx_mask=None, idx_keep=None, mask=None):
        return super().encode(images, idx_mask, idx_keep, mask) * 2


@pytest.mark.parametrize(("kind", "method"), [(OtherPositions, "preprocess"), (OtherEncode, "encode")])
def test_overrides_are_kept(kind, method):
    model, fast = pair(kind)
    assert [note.method for note in maefast.report(fast).kept] == [method]
    x, (kept, _) = images(), split()
    assert relative(fast.encode(x, idx_keep=kept), model.encode(x, idx_keep=kept)) < 1e-12


def test_decoder():
    torch.manual_seed(0)
    model = MaskedVisionTransformerDecoderTIMM(16, 16, 2, 2).double()
    nn.init.normal_(model.mask_token)
    fast = maefast.accelerate(copy.deepcopy(model))
    x, (kept, masked) = torch.randn(3, 17, 16, dtype=torch.float64), split()
    mask = torch.rand(3, 17) < 0.5
    calls = ({}, {"idx_mask": masked}, {"idx_mask": masked, "idx_keep": kept}, {"mask": mask}, {"mask": mask.int()})
    for kwargs in calls:
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, want = fast(mine, **kwargs), model(theirs, **kwargs)
        assert relative(got, want) < 1e-12
        (got - 1).pow(3).sum().backward()
        (want - 1).pow(3).sum().backward()
        assert relative(mine.grad, theirs.grad) < 1e-11
    assert relative(fast.mask_token.grad, model.mask_token.grad) < 1e-11
    with pytest.raises(ValueError, match="not both"):
        fast(x, idx_mask=masked, mask=mask)
    short = torch.randn(3, 9, 16, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        fast(short, idx_mask=masked)
