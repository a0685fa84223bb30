from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import blocks, linear, norm, parameters
from maefast.data.clips import ClipBatch
from maefast.recipe import View


def batch(size: int) -> ClipBatch:
    return ClipBatch(torch.randint(0, 256, (size, 3, 16, 224, 224), dtype=torch.uint8))


def embedded(p: Mapping[str, Tensor], recipe: nn.Module, video: Tensor) -> Tensor:
    """All tubelets with their positions, [B, N, D]."""
    x = F.conv3d((video - p["mean"]) / p["std"], p["encoder.patch_embed.proj.weight"],
                 p["encoder.patch_embed.proj.bias"], stride=recipe.tubelet)  # fmt: skip
    return x.flatten(2).transpose(1, 2) + p["encoder.pos_embed"]


def targets(recipe: nn.Module, video: Tensor) -> Tensor:
    """[B, N, K], normalised for each channel."""
    pt, ph, pw = recipe.tubelet
    pixels = video.unfold(2, pt, pt).unfold(3, ph, ph).unfold(4, pw, pw)  # [B, C, T', H', W', pt, ph, pw]
    pixels = pixels.permute(0, 2, 3, 4, 5, 6, 7, 1).flatten(1, 3).flatten(2, 4)  # [B, N, pt * ph * pw, C]
    if recipe.norm == "videomae":
        pixels = (pixels - pixels.mean(2, keepdim=True)) / (pixels.var(2, keepdim=True).sqrt() + 1e-6)
    return pixels.flatten(2)


def latents(p: Mapping[str, Tensor], recipe: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
    """Of the visible ones of all tubelets x, [B, visible, D]; bool [B, N]."""
    x = x[visible].view(len(x), -1, x.shape[-1])
    return norm(blocks(x, p, "encoder.blocks.", recipe.encoder.blocks[0].attn.num_heads)[-1], p, "encoder.norm")


def predictions(p: Mapping[str, Tensor], recipe: nn.Module, latent: Tensor, visible: Tensor, decoded: Tensor) -> Tensor:
    """Of the decoded positions, from latents of the visible ones; bool [B, N] each."""
    x, positions = linear(latent, p, "decoder.embed"), p["decoder.pos_embed"].expand(len(latent), -1, -1)
    hidden = p["decoder.mask_token"] + positions[decoded].view(len(x), -1, x.shape[-1])
    x = torch.cat([x + positions[visible].view(x.shape), hidden], 1)
    x = blocks(x, p, "decoder.blocks.", recipe.decoder.blocks[0].attn.num_heads)[-1][:, -hidden.shape[1] :]
    return linear(norm(x, p, "decoder.norm"), p, "decoder.pred")


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """VideoMAE (Tong et al., 2022)."""
    p, mask, video = parameters(recipe), view.plan.mask, view.target
    pred = predictions(p, recipe, latents(p, recipe, embedded(p, recipe, video), ~mask), ~mask, mask)
    return {"pixels": F.mse_loss(pred, targets(recipe, video)[mask].view(pred.shape))}
