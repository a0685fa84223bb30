from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import blocks, linear, norm, parameters
from maefast.data.channels import ChannelBatch
from maefast.recipe import View


def batch(size: int) -> ChannelBatch:
    return ChannelBatch(torch.randn(size, 8, 224, 224))


def padded(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """The same as `reference`, as a batch: visible tokens padded to the most of a sample, the decoder's to all, padding
    hidden from attention."""
    p, plan = parameters(recipe), view.plan
    heads, decoder_heads = recipe.blocks[0].attn.num_heads, recipe.decoder_blocks[0].attn.num_heads
    count, (_, ph, pw) = p["cls_token"].shape[1], recipe.patch
    lead, pos = p["pos_embed"].split([count, p["pos_embed"].shape[1] - count], 1)
    pos = torch.cat([pos + token for token in p["channel_tokens"]], 1)
    images, hidden, absent = view.parts[:, 0], plan.mask, plan.absent
    visible = ~(hidden | absent)
    weight, bias = p["patch_embed.proj.weight"][:, :, 0], p["patch_embed.proj.bias"]
    tokens = F.conv2d(images.flatten(0, 1)[:, None], weight, bias, stride=(ph, pw)).flatten(2).transpose(1, 2)
    tokens = tokens.reshape(len(images), -1, tokens.shape[2]) + pos
    most = visible.sum(1)
    first = (~visible).to(torch.uint8).argsort(dim=1, stable=True)[:, : most.max()]  # visible tokens, then others
    x = torch.cat([(p["cls_token"] + lead).expand(len(images), -1, -1), _rows(tokens, first)], 1)
    keys = torch.arange(x.shape[1], device=x.device) < most[:, None] + count
    x = linear(norm(blocks(x, p, "blocks.", heads, keys=keys)[-1], p, "norm"), p, "decoder_embed")
    whole = p["mask_token"].expand(*hidden.shape, -1).to(x.dtype)
    whole = whole.masked_scatter(visible[..., None], x[:, count:][keys[:, count:]]) + pos
    x, keys = torch.cat([x[:, :count] + lead, whole], 1), F.pad(~absent, (count, 0), value=True)
    x = norm(blocks(x, p, "decoder_blocks.", decoder_heads, keys=keys)[-1], p, "decoder_norm")
    pred = linear(x[:, count:][hidden], p, "decoder_pred")
    target = images.unfold(2, ph, ph).unfold(3, pw, pw).flatten(1, 3).flatten(2)[hidden]
    target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    terms = {"pixels": (1 - recipe.spectrum) * (pred - target).square().mean()}
    if recipe.spectrum:
        mine, theirs = (torch.fft.fft2(rows.to(target.dtype).view(-1, ph, pw)).abs() for rows in (pred, target))
        terms["spectrum"] = recipe.spectrum * (mine - theirs).abs().mean()
    return terms


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """ChA-MAEViT's self-supervised part (Pham et al., 2025), sample by sample."""
    p, plan = parameters(recipe), view.plan
    heads, decoder_heads = recipe.blocks[0].attn.num_heads, recipe.decoder_blocks[0].attn.num_heads
    count, (_, ph, pw) = p["cls_token"].shape[1], recipe.patch
    pos = torch.cat([p["pos_embed"][:, count:] + token for token in p["channel_tokens"]], 1)[0]
    lead = p["pos_embed"][0, :count]
    images = view.parts[:, 0]
    weight, bias = p["patch_embed.proj.weight"][:, :, 0], p["patch_embed.proj.bias"]
    errors, spectra = [], []
    for image, hidden, absent in zip(images, plan.mask, plan.absent):
        visible = ~hidden & ~absent
        tokens = F.conv2d(image[:, None], weight, bias, stride=(ph, pw)).flatten(2).transpose(1, 2).flatten(0, 1)
        x = torch.cat([p["cls_token"][0] + lead, (tokens + pos)[visible]])[None]
        x = linear(norm(blocks(x, p, "blocks.", heads)[-1], p, "norm"), p, "decoder_embed")[0]
        x = torch.cat([x[:count] + lead, x[count:] + pos[visible], p["mask_token"][0] + pos[hidden]])[None]
        x = norm(blocks(x, p, "decoder_blocks.", decoder_heads)[-1], p, "decoder_norm")[0, count + int(visible.sum()) :]
        pred = linear(x, p, "decoder_pred")
        target = image.unfold(1, ph, ph).unfold(2, pw, pw).flatten(0, 2).flatten(1)[hidden]
        target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
        errors.append((pred - target).square().mean(1))
        mine, theirs = (torch.fft.fft2(rows.view(-1, ph, pw)).abs() for rows in (pred, target))
        spectra.append((mine - theirs).abs().flatten(1).mean(1))
    terms = {"pixels": (1 - recipe.spectrum) * torch.cat(errors).mean()}
    if recipe.spectrum:
        terms["spectrum"] = recipe.spectrum * torch.cat(spectra).mean()
    return terms
