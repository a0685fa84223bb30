"""CrossMAE by structure: cross-attention blocks of any model, and the model around them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import maefast
from maefast.bench.peers.public.crossmae import Attention, Block, CrossAttention, CrossAttentionBlock
from maefast.bench.peers.public.crossmae import MaskedAutoencoderViT as CrossMAE
from maefast.integrations import crossmae
from tests.integrations.common import DropIn, gradient_error, relative

SIZES = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "norm_pix_loss": True,
}
RATIOS = {"mask_ratio": 0.6, "kept_mask_ratio": 0.4}


def images(dtype: torch.dtype = torch.float32, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=dtype)


class TestCrossMAE(DropIn):
    sweeps = True
    families = ("CrossMAE",)
    replaced = 8  # five blocks, three methods

    def make(self):
        return CrossMAE(**SIZES)

    def inputs(self, dtype):
        return (images(dtype),), RATIOS

    def loss(self, out):
        return out


class TestFeatureMaps(TestCrossMAE):
    """Weighted sums of the outputs of some blocks, attention among the queries, all masked tokens, plain pixels."""

    def make(self):
        options = {"weight_fm": True, "use_fm": (0, -1), "use_input": True, "self_attn": True}
        return CrossMAE(**{**SIZES, "norm_pix_loss": False}, **options)

    def inputs(self, dtype):
        return (images(dtype),), {}


def pair(kind: type = CrossMAE, **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = kind(**{**SIZES, **options}).double()
    return model, maefast.accelerate(copy.deepcopy(model))


def same(model, fast, *args, tolerance=1e-10, **kwargs) -> None:
    outs = []
    for net in (model, fast):
        torch.manual_seed(1)
        outs.append((net(*args, **kwargs), torch.get_rng_state()))
    (want, drawn), (got, also) = outs
    assert torch.equal(drawn, also)
    want, got = (out if isinstance(out, tuple) else (out,) for out in (want, got))
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert relative(a, b) < tolerance
    for net, out in ((model, want), (fast, got)):
        net.zero_grad()
        out[0].pow(3).mean().backward()
    assert gradient_error(fast, model) < 10 * tolerance


def test_spectral_norm_advances_as_before():
    """By one step in a forward, for the queries and keys of the decoder."""
    model, fast = pair()
    for net in (model, fast):
        torch.manual_seed(4)
        for block in net.decoder_blocks:
            torch.nn.utils.parametrizations.spectral_norm(block.cross_attn.q)
            torch.nn.utils.parametrizations.spectral_norm(block.cross_attn.kv)
    same(model, fast, images(torch.float64))
    for (name, a), (_, b) in zip(model.named_buffers(), fast.named_buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-10), name


# --- a probability that no module holds ---------------------------------------------------------------------


def fused(block: nn.Module) -> bool:
    return "fused attention" in str(maefast.report(maefast.accelerate(copy.deepcopy(block))))


@pytest.mark.parametrize("none", [0.0, 0, None])
def test_a_rate_of_zero_is_no_dropout(none):
    block = Block(32, 2)
    block.attn.attn_drop = 0.0 if none is None else none
    assert fused(block)
    report = str(maefast.report(maefast.accelerate(Block(32, 2, attn_drop=0.3))))
    assert "dropout inside the attention is on" in report


def test_a_rate_that_comes_later():
    block = Block(32, 2).double()
    fast = maefast.accelerate(copy.deepcopy(block))
    x = torch.randn(2, 5, 32).double()
    same(block, fast, x)
    for net in (block, fast):
        net.attn.attn_drop = 0.5
    same(block, fast, x)
    same(block.eval(), fast.eval(), x)  # it drops in evaluation too


def test_a_scale_that_is_never_read():
    """torch's scaled_dot_product_attention has its own."""
    block = Block(32, 2).double()
    fast = maefast.accelerate(copy.deepcopy(block))
    for net in (block, fast):
        net.attn.scale = 7.0
    x = torch.randn(2, 5, 32).double()
    same(block, fast, x)
    assert "ran fast once" in str(maefast.report(fast))
    assert fused(block)


# --- blocks -------------------------------------------------------------------------------------------------


def block_pair(**options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    block = CrossAttentionBlock(48, 32, 2, **options).double()
    return block, maefast.accelerate(copy.deepcopy(block))


def tokens(count: int = 5, width: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, count, width).double()


@pytest.mark.parametrize("options", [{}, {"self_attn": True}, {"drop_path": 0.5}, {"drop": 0.3}, {"attn_drop": 0.3}])
@pytest.mark.parametrize("training", [True, False])
def test_blocks(options, training):
    block, fast = block_pair(**options)
    report = maefast.report(fast)
    assert not report.kept
    assert ("fused cross-attention" in str(report)) is ("attn_drop" not in options)
    same(block.train(training), fast.train(training), tokens(), tokens(7, 48))
    assert "ran fast once" in str(maefast.report(fast))


def test_gradients_of_queries_and_keys():
    block, fast = block_pair(self_attn=True)
    x, y = tokens(), tokens(7, 48)
    found = []
    for net in (block, fast):
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        found.append(torch.autograd.grad(net(*leaves).pow(3).sum(), leaves))
    for a, b in zip(found[1], found[0]):
        assert relative(a, b) < 1e-11


def test_parts_that_are_watched_or_exchanged():
    for change in (
        lambda m: m.cross_attn.register_forward_hook(lambda module, args, out: out * 2),
        lambda m: setattr(m.mlp, "act", nn.ReLU()),
        lambda m: setattr(m.cross_attn, "kv", nn.Sequential(m.cross_attn.kv)),
        lambda m: setattr(m, "norm1", nn.Identity()),
        lambda m: setattr(m.cross_attn, "num_heads", 4),
        lambda m: setattr(m, "self_attn", None),
    ):
        block, fast = block_pair(self_attn=True)
        for net in (block, fast):
            change(net)
        same(block, fast, tokens(), tokens(7, 48))


def test_adapted_before():
    block, _ = block_pair()
    block.cross_attn.kv = nn.Sequential(block.cross_attn.kv)
    fast = maefast.accelerate(copy.deepcopy(block))
    assert "watched or adapted" in str(maefast.report(fast))
    same(block, fast, tokens(), tokens(7, 48))


def test_what_a_block_refuses_it_still_refuses():
    block, fast = block_pair()
    for args in (
        (tokens(), tokens(7, 40)),
        (tokens(), tokens(7, 48, batch=3)),
        (tokens().float(), tokens(7, 48)),
        (tokens(), None),
        (tokens(),),
    ):
        with pytest.raises((RuntimeError, TypeError, AttributeError)) as want:
            block(*args)
        with pytest.raises(type(want.value)):
            fast(*args)


class Gated(CrossAttentionBlock):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Parameter(torch.tensor(0.0))

    def forward(self, x, y):
        x = x + self.gate * self.cross_attn(self.norm1(x), y)
        return x + self.mlp(self.norm2(x))


class Sharpened(CrossAttention):
    """Another softmax, under the same names."""

    def forward(self, x, y):
        q = 2 * self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(y).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(((q * self.scale @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore:maefast.accelerate")
def test_blocks_of_forks_stay():
    block = CrossAttentionBlock(48, 32, 2)
    block.cross_attn = Sharpened(48, 32, 2)
    for model, why in ((block, "output 0 differs"), (Gated(48, 32, 2), "overrides that of CrossAttentionBlock")):
        fast = maefast.accelerate(copy.deepcopy(model))
        assert why in str(maefast.report(fast))
        same(model.double(), fast.double(), tokens(), tokens(7, 48))


# --- the model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weight_fm": True}])
@pytest.mark.parametrize("ratios", [(0.75, 0.75), (0.75, 0.25), (0.5, 0.0), (0.25, 0.5), (1, 1), (0.0, 0.0)])
@pytest.mark.filterwarnings("ignore:var_mean")
def test_ratios(ratios, options):
    """What is predicted, of what is masked; where nothing is, or more than is masked, the model's own answer."""
    model, fast = pair(**options)
    x, found = images(torch.float64), []
    for net in (model, fast):
        torch.manual_seed(1)
        try:
            latent, mask, ids_restore, coords = net.forward_encoder(x, *ratios)
            pred, none = net.forward_decoder(latent, mask, ids_restore, coords, *ratios)
            assert none is None
            found.append(
                (*(latent if isinstance(latent, list) else [latent]), mask, ids_restore, pred, net(x, *ratios))
            )
        except RuntimeError as error:
            found.append((error,))
    for a, b in zip(found[1], found[0], strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.shape == b.shape
            assert torch.equal(a.isnan(), b.isnan())
            assert relative(a.nan_to_num(), b.nan_to_num()) < 1e-11


def test_arguments_by_name():
    model, fast = pair(weight_fm=True)
    x = images(torch.float64)
    latent, mask, ids_restore, _ = model.forward_encoder(x, mask_ratio=0.75, kept_mask_ratio=0.5)
    given = {"mask": mask, "ids_restore": ids_restore, "coords": None, "mask_ratio": 0.75, "kept_mask_ratio": 0.5}
    want, got = (net.forward_decoder([t.detach() for t in latent], **given)[0] for net in (model, fast))
    assert relative(got, want) < 1e-11
    want, got = (net.forward_loss(x, pred=got, mask=mask, coords=None) for net in (model, fast))
    assert relative(got, want) < 1e-11
    assert "as it was" not in str(maefast.report(fast))
    with pytest.raises(TypeError):
        fast.forward_decoder(latent, mask, ids_restore, None, 0.75)


def test_only_visible_patches_and_no_target(monkeypatch):
    _, fast = pair()
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda *args: pytest.fail("all patches were embedded"))
    monkeypatch.setattr(torch.Tensor, "masked_select", lambda *args: pytest.fail("a target was built"))
    fast(images(torch.float64), **RATIOS).backward()


class Softmaxed(nn.Module):
    """Weighted sums of another kind in the place of the public code's."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.spread = linear, 0.5

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(maps, dim=-1) @ (self.linear.weight * self.spread).softmax(1).t()


def own_sums(model) -> None:
    model.wfm = Softmaxed(model.wfm.linear)


def with_bias(model) -> None:
    model.wfm.linear = nn.Linear(3, 2).double()


def prepared(model) -> None:
    model.wfm.linear = nn.utils.parametrizations.weight_norm(model.wfm.linear)


def heard(model) -> None:
    model.wfm.register_forward_hook(lambda module, args, out: out * 2)


def heard_inside(model) -> None:
    model.wfm.linear.register_forward_hook(lambda module, args, out: out * 2)


SUMS = (own_sums, with_bias, prepared, heard, heard_inside)


@pytest.mark.parametrize("change", SUMS)
@pytest.mark.parametrize("before", [True, False])
def test_sums_of_feature_maps_follow_every_change(change, before):
    torch.manual_seed(0)
    model = CrossMAE(**SIZES, weight_fm=True).double()
    fast = None if before else maefast.accelerate(copy.deepcopy(model))
    for net in (model, fast):
        if net is not None:
            torch.manual_seed(1)
            change(net)
    fast = maefast.accelerate(copy.deepcopy(model)) if before else fast
    same(model, fast, images(torch.float64), **RATIOS)


def test_sums_of_feature_maps_in_whole_rows():
    _, fast = pair(weight_fm=True)
    seen = []
    for norm in fast.dec_norms:
        norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
    fast(images(torch.float64), **RATIOS)
    assert seen == [True] * SIZES["decoder_depth"]


def test_another_number_of_feature_maps_is_refused_as_before():
    model, fast = pair(weight_fm=True)
    latent, *rest = model.forward_encoder(images(torch.float64), **RATIOS)
    for net in (model, fast):
        with pytest.raises(AssertionError, match="number of feature maps"):
            net.forward_decoder(latent[1:], *rest, *RATIOS.values())


def test_sums_stay_pending_between_blocks(monkeypatch):
    _, fast = pair()
    seen = []
    inner = crossmae._run
    monkeypatch.setattr(crossmae, "_run", lambda block, x, delta, y: seen.append(delta) or inner(block, x, delta, y))
    fast(images(torch.float64), **RATIOS)
    assert [delta is None for delta in seen] == [True, False]


def test_uneven_masks_are_left_to_the_original():
    model, fast = pair()
    latent = torch.randn(2, 5, 48, dtype=torch.float64)
    mask = torch.zeros(2, 16)
    mask[0, :3], mask[1, :5] = 1, 1  # eight, four for each: the original mixes samples
    pred = torch.randn(2, 4, 192, dtype=torch.float64)
    rest = torch.zeros(2, 16, dtype=torch.long), None, 0.75, 0.25
    want, got = (net.forward_decoder(latent, mask, *rest)[0] for net in (model, fast))
    assert relative(got, want) < 1e-12
    picture = images(torch.float64, 2)
    want, got = (net.forward_loss(picture, pred, mask, None) for net in (model, fast))
    assert relative(got, want) < 1e-12


class OtherMasking(CrossMAE):
    def random_masking(self, x, mask_ratio, kept_mask_ratio):
        return super().random_masking(x.flip(1), mask_ratio, kept_mask_ratio)


class OtherLoss(CrossMAE):
    def forward_loss(self, imgs, pred, mask, coords):
        return super().forward_loss(imgs, pred, mask, coords) * 2


def test_a_loss_that_returns_its_target_stays():
    """As in later versions of the public code."""

    def forward_loss(self, imgs, pred, mask, coords):
        target = self.patchify(imgs).masked_select(mask.bool()[..., None]).view(pred.shape)
        return (pred - target).square().mean(), target

    def forward(self, imgs, mask_ratio=0.75, kept_mask_ratio=0.75):
        latent, mask, ids_restore, coords = self.forward_encoder(imgs, mask_ratio, kept_mask_ratio)
        pred, _ = self.forward_decoder(latent, mask, ids_restore, coords, mask_ratio, kept_mask_ratio)
        return self.forward_loss(imgs, pred, mask, coords)[0]

    def init(self, **sizes):
        nn.Module.__init__(self)
        vars(self).update(vars(CrossMAE(**sizes)))

    body = {**vars(CrossMAE), "__init__": init, "forward_loss": forward_loss, "forward": forward}
    model, fast = pair(type("Later", (nn.Module,), body))
    kept = {note.method: note.text for note in maefast.report(fast).kept}
    assert kept == {"forward_loss": "it returns 2 values, where maefast knows 1"}
    same(model, fast, images(torch.float64), **RATIOS)


class OtherQueries(CrossMAE):
    def mask_tokens_grid(self, mask, ids_restore):
        return super().mask_tokens_grid(mask, ids_restore) * 2


@pytest.mark.parametrize(
    ("kind", "kept"),
    [(OtherMasking, "forward_encoder"), (OtherLoss, "forward_loss"), (OtherQueries, "forward_decoder")],
)
def test_forks_stay(kind, kept):
    model, fast = pair(kind)
    assert {note.method for note in maefast.report(fast).kept} == {kept}
    same(model, fast, images(torch.float64), **RATIOS)


def test_a_block_restored_alone():
    model, fast = pair()
    maefast.restore(fast.decoder_blocks[0])
    same(model, fast, images(torch.float64), **RATIOS)
    assert isinstance(fast.decoder_blocks[0], CrossAttentionBlock)
    assert type(fast.blocks[0].attn) is Attention
