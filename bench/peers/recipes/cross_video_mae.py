from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import below, blocks, linear, norm, parameters
from maefast.bench.peers.recipes.videomae import batch
from maefast.recipe import View

__all__ = ["batch", "reference"]


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """CrossVideoMAE (Ahamed et al., 2025): samples that show different numbers of tokens one by one."""
    p, terms, found = parameters(recipe), {}, []
    heads, decoder_heads = (part.blocks[0].attn.num_heads for part in (recipe.encoder, recipe.decoder))
    for term, name, x, plan in zip(("clips", "frames"), ("", "frame_"), view.parts, view.plan):
        own, told = below(p, f"{name}encoder."), below(p, f"{name}decoder.")
        middle = below(p, "encoder.blocks.") if recipe.shared else below(own, "blocks.")
        tokens, target = embedded(own, x), patches(x, own["patch_embed.proj.weight"].shape[2:], recipe.norm)
        size = 1 if plan.keep is None else len(x)
        pooled, errors = [], []
        for start in range(0, len(x), size):
            mask = plan.mask[start : start + size]
            latent = encoded(own, middle, tokens[start : start + size], mask, heads)
            pooled.append(latent[:, 1:].mean(1))
            pred = decoded(told, latent, mask, decoder_heads)
            errors.append((pred - target[start : start + size]).square().mean(2)[mask])
        terms[term] = torch.cat(errors).mean()
        found.append(projected(below(p, f"{name}projector."), torch.cat(pooled)).chunk(2))
    for term, weight, (one, other) in (
        ("clip contrast", recipe.intra, found[0]),
        ("frame contrast", recipe.intra, found[1]),
        ("cross contrast", recipe.cross, [(a + b) / 2 for a, b in found]),
    ):
        rows = F.normalize(torch.cat([one, other]), dim=1)
        scores = rows @ rows.T / recipe.temperature
        scores = scores - torch.diag(torch.full((len(rows),), torch.inf).to(scores))
        pairs = torch.arange(len(rows), device=rows.device).roll(len(one))
        terms[term] = weight * F.cross_entropy(scores, pairs)
    return terms


def embedded(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """All tokens with their positions, behind the class token."""
    convolve, kernel = (F.conv3d if x.ndim == 5 else F.conv2d), p["patch_embed.proj.weight"]
    x = convolve(x, kernel, p["patch_embed.proj.bias"], stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
    return torch.cat([p["cls_token"].expand(len(x), -1, -1), x], 1) + p["pos_embed"]


def encoded(p: Mapping[str, Tensor], middle: Mapping[str, Tensor], x: Tensor, mask: Tensor, heads: int) -> Tensor:
    shown = torch.cat([torch.ones_like(mask[:, :1]), ~mask], 1)
    return norm(blocks(x[shown].view(len(x), -1, x.shape[2]), middle, "", heads)[-1], p, "norm")


def decoded(p: Mapping[str, Tensor], latent: Tensor, mask: Tensor, heads: int) -> Tensor:
    x = linear(latent, p, "embed")
    whole = p["mask_token"].expand(len(x), mask.shape[1], -1).masked_scatter(~mask[..., None], x[:, 1:])
    x = blocks(torch.cat([x[:, :1], whole], 1) + p["pos_embed"], p, "blocks.", heads)[-1]
    return linear(norm(x[:, 1:], p, "norm"), p, "pred")


def projected(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return linear(F.gelu(linear(x, p, "fc1")), p, "fc2")


def patches(x: Tensor, patch: tuple[int, ...], how: str) -> Tensor:
    """[B, N, K], normalised as MAE does."""
    pt, ph, pw = (1,) * (3 - len(patch)) + tuple(patch)
    x = x.view(*x.shape[:2], -1, *x.shape[-2:]).unfold(2, pt, pt).unfold(3, ph, ph).unfold(4, pw, pw)
    x = x.permute(0, 2, 3, 4, 5, 6, 7, 1).flatten(1, 3).flatten(2)
    return x if how == "none" else (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True) + 1e-6).sqrt()
