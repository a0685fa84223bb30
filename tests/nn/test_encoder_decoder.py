"""Patch embedding, encoder and decoder used alone."""

from __future__ import annotations

import pytest
import torch

from maefast import masking
from maefast.nn import Decoder, PatchEmbed, position_table
from tests.models.common import encoder_of


def decoder_of(latent: int, width: int, depth: int, heads: int, positions: str = "sincos") -> Decoder:
    return Decoder(latent, 10, position_table(positions, width, (4, 4)), width, depth, heads)


def test_patch_embed_is_the_convolution():
    torch.manual_seed(0)
    embed = PatchEmbed((4, 6), 2, 12).double()
    assert {k: tuple(v.shape) for k, v in embed.state_dict().items()} == {
        "proj.weight": (12, 2, 4, 6),
        "proj.bias": (12,),
    }
    images = torch.randn(3, 2, 8, 18, dtype=torch.float64)
    want = embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(images), want, rtol=0, atol=1e-12)
    plan = masking.random(3, 6, 0.5)
    picked = want.gather(1, plan.ids_keep[..., None].expand(-1, -1, 12))
    torch.testing.assert_close(embed(images, plan), picked, rtol=0, atol=1e-12)


def test_initial_weights_are_mae_s():
    """Xavier-uniform from the layer's own fans (of the patch as a linear map), zero biases, tokens of std 0.02."""
    torch.manual_seed(0)
    encoder = encoder_of(128, 1, 2)
    for weight in (
        encoder.patch_embed.proj.weight,
        encoder.blocks[0].attn.qkv.weight,
        encoder.blocks[0].mlp.fc2.weight,
    ):
        bound = (6 / (weight.shape[0] + weight[0].numel())) ** 0.5
        assert 0.97 * bound < weight.abs().max().item() <= bound
    assert encoder.blocks[0].mlp.fc1.bias.abs().max() == 0
    assert 0.015 < encoder.cls_token.std().item() < 0.025
    decoder = decoder_of(128, 64, 1, 2, "learned")
    assert 0.014 < decoder.mask_token.std().item() < 0.026
    assert 0.018 < decoder.pos_embed.std().item() < 0.022
    assert decoder.pos_embed.requires_grad
    assert not encoder.pos_embed.requires_grad
    bound = (6 / 192) ** 0.5
    assert 0.97 * bound < decoder.embed.weight.abs().max().item() <= bound


@pytest.mark.parametrize("ratio", [0.5, [0.25, 0.75, 0.5]])
def test_decoder_masked_is_a_part_of_full(ratio):
    torch.manual_seed(0)
    encoder, decoder = encoder_of(16, 1, 2).double(), decoder_of(16, 8, 2, 2).double()
    plan = masking.random(3, 16, ratio)
    latent = encoder(torch.randn(3, 3, 32, 32, dtype=torch.float64), plan)
    assert latent.shape == ((3, 9, 16) if ratio == 0.5 else (3 + 4 + 8 + 12, 16))
    full = decoder(latent, plan, "full")
    assert full.shape == (3, 16, 10)
    masked = decoder(latent, plan)
    want = full.reshape(48, 10)[plan.masked.long()]
    torch.testing.assert_close(masked.reshape(-1, 10), want, rtol=0, atol=1e-12)


def test_hook_on_a_block_sees_its_output():
    """Blocks hand on pending sums, but not past a hook."""
    torch.manual_seed(0)
    encoder = encoder_of(16, 3, 2).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    want = encoder(images)
    seen = []
    encoder.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(encoder(images), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(encoder.norm(encoder.blocks[2](seen[0])), want, rtol=0, atol=1e-12)


def test_latents_under_autocast():
    """For the next product in bfloat16; as features with the precision of the residual stream."""
    torch.manual_seed(0)
    encoder = encoder_of(16, 1, 2)
    images = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(images).dtype is torch.float32
    assert encoder.bfloat16()(images.bfloat16()).dtype is torch.bfloat16


def test_decoder_refuses():
    decoder = decoder_of(16, 8, 1, 2)
    plan = masking.random(2, 16, 0.0)
    with pytest.raises(ValueError, match="masks no token"):
        decoder(torch.randn(2, 17, 16), plan)
    assert decoder(torch.randn(2, 17, 16), plan, "full").shape == (2, 16, 10)
    with pytest.raises(ValueError, match="pred must be one of"):
        decoder(torch.randn(2, 17, 16), plan, "some")
    with pytest.raises(ValueError, match="at least one block"):
        decoder_of(16, 8, 0, 2)


@pytest.mark.parametrize(("keep", "hide"), [(6, 4), ([6, 0, 9], 4), ([6, 0, 9], [4, 16, 0]), (6, [4, 10, 1])])
def test_absent_tokens_take_no_part(keep, hide):
    """Equal to each sample alone, cut to the tokens that are there."""
    torch.manual_seed(0)
    encoder, decoder = encoder_of(16, 1, 2).double(), decoder_of(16, 8, 2, 2).double()
    plan = masking.random(3, 16, keep=keep, hide=hide)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    latent = encoder(images, plan)
    got = decoder(latent, plan)
    if isinstance(keep, int) and isinstance(hide, int):
        assert got.shape == (3, 4, 10)
    masked = plan.masked.split(plan.cu_masked.diff().tolist())
    visible = plan.visible.split(plan.cu_visible.diff().tolist())
    want = []
    for b in range(3):
        shown, hidden = visible[b].long() - 16 * b, masked[b].long() - 16 * b
        if not len(hidden):
            continue
        pos = decoder.pos_embed[0]
        alone = encoder(images[b : b + 1], masking.from_indices(shown[None], 16))
        x = torch.cat([decoder.embed(alone[0]), decoder.mask_token[0].expand(len(hidden), -1)])
        x = (x + torch.cat([pos[:1], pos[1:][shown], pos[1:][hidden]]))[None]
        for block in decoder.blocks:
            x = block(x)
        want.append(decoder.pred(decoder.norm(x))[0, -len(hidden) :])
    torch.testing.assert_close(got.reshape(-1, 10), torch.cat(want), rtol=0, atol=1e-12)
    parameters = list(decoder.parameters())
    parameters = [p for p in parameters if p.requires_grad]
    ours = torch.autograd.grad(got.square().sum(), parameters)
    theirs = torch.autograd.grad(torch.cat(want).square().sum(), parameters)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="leaves tokens absent"):
        decoder(latent, plan, "full")


def test_further_tokens_are_attended_to():
    """Mask tokens at positions given again stand with the others as in a sequence put together by hand."""
    torch.manual_seed(0)
    decoder = Decoder(16, 10, torch.randn(16, 8), 8, 2, 2, prefix=0).double()
    plan = masking.random(3, 16, 0.5, order="position")
    latent = torch.randn(3, 8, 16, dtype=torch.float64)
    again = plan.ids_keep[:, ::2]
    tokens = [decoder.embed(latent) + decoder.pos_embed[plan.ids_keep]]
    tokens += [decoder.mask_token + decoder.pos_embed[ids] for ids in (again, plan.ids_masked)]
    x = torch.cat(tokens, 1)
    for block in decoder.blocks:
        x = block(x)
    want = decoder.pred(decoder.norm(x[:, -8:]))
    torch.testing.assert_close(decoder(latent, plan, again=again), want, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="again goes with a table of positions and without prefix"):
        decoder_of(16, 8, 2, 2)(torch.randn(3, 9, 16), plan, again=again)
