"""MAE-ST by structure: attention with three projections, two position tables, all tubelets masked at random."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import maefast
from maefast.bench.peers.public.mae_st import Attention, Block, MaskedAutoencoderViT
from tests.integrations.blocks import build, compare, is_fused, tokens
from tests.integrations.common import DropIn, gradient_error, relative

SIZES = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "num_frames": 8,
    "t_patch_size": 2,
    "pred_t_dim": 4,
}
PUBLIC = {"sep_pos_embed": True, "cls_embed": True, "norm_pix_loss": True}  # as it was trained


def videos(dtype: torch.dtype = torch.float32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 16, 16, dtype=dtype)


class TestMAEST(DropIn):
    sweeps = True
    families = ("MAE-ST",)
    replaced = 7  # four blocks, three methods
    options_of_model = PUBLIC

    def make(self):
        model = MaskedAutoencoderViT(**SIZES, **self.options_of_model)
        model.patchify(torch.zeros(1, 3, 4, 16, 16))  # leaves an attribute behind, at the first call
        return model

    def inputs(self, dtype):
        return (videos(dtype),), {"mask_ratio": 0.6}

    def loss(self, out):
        return out[0]


class TestOneTable(TestMAEST):
    sweeps = False
    options_of_model = {"no_qkv_bias": True}  # noqa: RUF012


def pair(kind: type = MaskedAutoencoderViT, **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = kind(**{**SIZES, **PUBLIC, **options}).double()
    return model, maefast.accelerate(copy.deepcopy(model))


def same(model, fast, *args, tolerance=1e-10) -> None:
    outs = []
    for net in (model, fast):
        torch.manual_seed(1)
        outs.append((net(*args), torch.get_rng_state()))
    (want, drawn), (got, also) = outs
    assert torch.equal(drawn, also)
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert relative(a, b) < tolerance
    for net, out in ((model, want), (fast, got)):
        net.zero_grad()
        out[0].backward()
    assert gradient_error(fast, model) < 10 * tolerance


def test_a_decoder_called_with_any_order():
    """With tokens twice: the model gathers what it is told to."""
    model, fast = pair()
    x, order = torch.randn(2, 9, 48).double(), torch.rand(2, 64).argsort(1)
    order[0, 3] = order[0, 5]
    assert relative(fast.forward_decoder(x, order), model.forward_decoder(x, order)) < 1e-12


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"drop_path": 0.5}])
def test_blocks(options):
    block = build(Block(32, 2, **options))
    fast = maefast.accelerate(copy.deepcopy(block))
    assert is_fused(fast)
    compare(block, fast)


class FewKeys(Attention):
    """One head of keys and values for all queries."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.k, self.v = (nn.Linear(dim, dim // num_heads) for _ in range(2))

    def forward(self, x):
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.k(x)[:, None], self.v(x)[:, None]
        x = (q @ k.mT * self.scale).softmax(-1) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class TwoSwitches(Attention):
    def forward(self, x):
        return super().forward(x.flip(1) if self.input_size[0] > 8 else x)


@pytest.mark.parametrize("kind", [FewKeys, TwoSwitches])
def test_attentions_that_differ_are_called(kind):
    block = Block(32, 2)
    block.attn = kind(32, 2)
    build(block)
    fast = maefast.accelerate(copy.deepcopy(block))
    assert not is_fused(fast)
    compare(block, fast)


def test_an_adapted_projection():
    block = build(Block(32, 2))
    fast = maefast.accelerate(copy.deepcopy(block))
    for net in (block, fast):
        net.attn.k = nn.Sequential(net.attn.k)
    assert not is_fused(fast)
    compare(block, fast)
    assert relative(fast(tokens(3)), block(tokens(3))) > 1e-3  # of other tokens


@pytest.mark.parametrize(
    "options",
    [
        {"cls_embed": False},
        {"sep_pos_embed": False},
        {"norm_pix_loss": False},
        {"pred_t_dim": 8},
        {"no_qkv_bias": True},
    ],
    ids=str,
)
def test_options(options):
    model, fast = pair(**options)
    report = maefast.report(fast)
    assert not report.kept, str(report)
    same(model, fast, videos(torch.float64), 0.75)
    assert "as it was" not in str(maefast.report(fast))


@pytest.mark.parametrize("ratio", [0.0, 0.9, 1, 0.99])
def test_ratios(ratio):
    model, fast = pair()
    x = videos(torch.float64)
    found = []
    for net in (model, fast):
        torch.manual_seed(1)
        found.append(net(x, ratio))
    for a, b in zip(found[1], found[0]):
        assert a.shape == b.shape
        assert torch.equal(a.isnan(), b.isnan())
        assert relative(a.nan_to_num(), b.nan_to_num()) < 1e-11


def test_equal_numbers_drawn(monkeypatch):
    """A draw of a thousand numbers often holds one twice: their order is that of torch's sort, which is not stable."""
    model, fast = pair()
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: (rand(*args, **kwargs) * 8).floor() / 8)
    for _ in range(3):
        same(model, fast, videos(torch.float64))
    x = videos(torch.float64, 5)
    found = []
    for net in (model, fast):
        torch.manual_seed(2)
        found.append(net.forward_encoder(x, 0.75))
    for a, b in zip(found[1], found[0]):
        assert relative(a, b) < 1e-10  # integers: equal


def test_only_visible_tubelets_and_no_target(monkeypatch):
    _, fast = pair()
    monkeypatch.setattr(nn.Conv3d, "_conv_forward", lambda *args: pytest.fail("all tubelets were embedded"))
    monkeypatch.setattr(torch, "var_mean", lambda *args, **kwargs: pytest.fail("a target was built"))
    fast(videos(torch.float64))[0].backward()


def test_gradients_of_both_tables():
    model, fast = pair()
    same(model, fast, videos(torch.float64), 0.75)
    for name in ("pos_embed_spatial", "pos_embed_temporal", "pos_embed_class", "decoder_pos_embed_temporal"):
        grad = fast.get_parameter(name).grad
        assert grad.norm() > 0
        assert relative(grad, model.get_parameter(name).grad) < 1e-9


def test_what_patchify_leaves_behind():
    model, fast = pair()
    for net in (model, fast):
        net(videos(torch.float64))
    assert fast.patch_info == model.patch_info == (2, 4, 16, 16, 4, 1, 4, 4, 4)
    same(model, fast, videos(torch.float64))
    assert "as it was" not in str(maefast.report(fast))


def test_what_the_model_refuses_it_still_refuses():
    model, fast = pair()
    for bad in (videos(), videos(torch.float64)[:, :2], videos(torch.float64)[:, :, :4], videos(torch.float64)[0]):
        with pytest.raises((AssertionError, RuntimeError, ValueError)) as want:
            model(bad)
        with pytest.raises(type(want.value)):
            fast(bad)


def test_another_loss_mask():
    """Any weights, in any shape that fits."""
    model, fast = pair()
    x, pred, mask = videos(torch.float64), torch.randn(2, 64, 48).double(), torch.rand(2, 4, 16)
    assert relative(fast.forward_loss(x, pred, mask), model.forward_loss(x, pred, mask)) < 1e-12


class InTimeAndSpace(Attention):
    """Wants [B, T, H * W, D]."""

    requires_t_shape = True

    def forward(self, x):
        return super().forward(x.flatten(1, 2)).view(x.shape)


def test_attention_in_time_and_space():
    model, fast = pair(cls_embed=False)
    for net in (model, fast):
        for block in net.decoder_blocks:
            block.attn.__class__ = InTimeAndSpace
    same(model, fast, videos(torch.float64))


class OtherMasking(MaskedAutoencoderViT):
    def random_masking(self, x, mask_ratio):
        return super().random_masking(x.flip(1), mask_ratio)


class OtherTarget(MaskedAutoencoderViT):
    def patchify(self, imgs):
        return super().patchify(imgs) * 2


class OtherDecoder(MaskedAutoencoderViT):
    def forward_decoder(self, x, ids_restore):
        return super().forward_decoder(x, ids_restore) * 2


@pytest.mark.parametrize(
    ("kind", "kept"),
    [(OtherMasking, "forward_encoder"), (OtherTarget, "forward_loss"), (OtherDecoder, "forward_decoder")],
)
def test_forks_stay(kind, kept):
    model, fast = pair(kind)
    assert {note.method for note in maefast.report(fast).kept} == {kept}
    same(model, fast, videos(torch.float64))


def test_a_fork_that_computes_something_else_is_found_out():
    class Fork(MaskedAutoencoderViT):
        pass

    original = MaskedAutoencoderViT.forward_encoder
    try:
        MaskedAutoencoderViT.forward_encoder = lambda self, x, mask_ratio: original(self, x.flip(2), mask_ratio)
        model, fast = pair(Fork)
        assert {note.method for note in maefast.report(fast).kept} == {"forward_encoder"}
        same(model, fast, videos(torch.float64))
    finally:
        MaskedAutoencoderViT.forward_encoder = original
