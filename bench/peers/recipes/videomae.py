from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.plain import blocks, linear, norm, parameters
from maefast.data.clips import ClipBatch
from maefast.recipe import View


def batch(size: int) -> ClipBatch:
    return ClipBatch(torch.randint(0, 256, (size, 3, 16, 224, 224), dtype=torch.uint8))


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """VideoMAE (Tong et al., 2022)."""
    p, mask, video = parameters(recipe), view.plan.mask, view.target
    heads, decoder_heads = (part.blocks[0].attn.num_heads for part in (recipe.encoder, recipe.decoder))
    pt, ph, pw = recipe.tubelet
    x = F.conv3d((video - p["mean"]) / p["std"], p["encoder.patch_embed.proj.weight"],
                 p["encoder.patch_embed.proj.bias"], stride=recipe.tubelet).flatten(2).transpose(1, 2)  # fmt: skip
    batch, _, width = x.shape
    x = (x + p["encoder.pos_embed"])[~mask].view(batch, -1, width)
    x = linear(norm(blocks(x, p, "encoder.blocks.", heads)[-1], p, "encoder.norm"), p, "decoder.embed")
    width = x.shape[-1]
    positions = p["decoder.pos_embed"].expand(batch, -1, -1)
    hidden = p["decoder.mask_token"] + positions[mask].view(batch, -1, width)
    x = torch.cat([x + positions[~mask].view(batch, -1, width), hidden], 1)
    x = blocks(x, p, "decoder.blocks.", decoder_heads)[-1][:, -hidden.shape[1] :]
    pred = linear(norm(x, p, "decoder.norm"), p, "decoder.pred")
    pixels = video.unfold(2, pt, pt).unfold(3, ph, ph).unfold(4, pw, pw)  # [B, C, T', H', W', pt, ph, pw]
    pixels = pixels.permute(0, 2, 3, 4, 5, 6, 7, 1).flatten(1, 3).flatten(2, 4)  # [B, N, pt * ph * pw, C]
    if recipe.norm == "videomae":
        pixels = (pixels - pixels.mean(2, keepdim=True)) / (pixels.var(2, keepdim=True).sqrt() + 1e-6)
    return {"pixels": F.mse_loss(pred, pixels.flatten(2)[mask].view(batch, -1, pred.shape[-1]))}
