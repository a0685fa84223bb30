from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import blocks, linear, norm, parameters
from maefast.data.spectrograms import SpectrogramBatch
from maefast.recipe import View


def batch(size: int) -> SpectrogramBatch:
    return SpectrogramBatch(torch.randn(size, 1, 512, 128) * 4 - 7)


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """Bird-MAE (Rauch et al., 2025), which is MAE (He et al., 2022) on spectrograms."""
    p, mask, mel = parameters(recipe), view.plan.mask, view.parts
    heads, decoder_heads = (part.blocks[0].attn.num_heads for part in (recipe.encoder, recipe.decoder))
    ph, pw = recipe.patch_size
    x = F.conv2d(mel, p["encoder.patch_embed.proj.weight"], p["encoder.patch_embed.proj.bias"], stride=(ph, pw))
    x = x.flatten(2).transpose(1, 2) + p["encoder.pos_embed"][:, 1:]
    size, _, width = x.shape
    lead = (p["encoder.cls_token"] + p["encoder.pos_embed"][:, :1]).expand(size, -1, -1)
    x = torch.cat([lead, x[~mask].view(size, -1, width)], 1)
    x = linear(norm(blocks(x, p, "encoder.blocks.", heads)[-1], p, "encoder.norm"), p, "decoder.embed")
    whole = p["decoder.mask_token"].expand(size, mask.shape[1], -1).to(x.dtype)
    whole = whole.masked_scatter(~mask[..., None], x[:, 1:])
    x = torch.cat([x[:, :1], whole], 1) + p["decoder.pos_embed"]
    x = blocks(x, p, "decoder.blocks.", decoder_heads)[-1][:, 1:]
    pred = linear(norm(x, p, "decoder.norm"), p, "decoder.pred")
    target = mel[:, 0].unfold(1, ph, ph).unfold(2, pw, pw).flatten(1, 2).flatten(2)  # [B, N, ph * pw]
    if recipe.norm == "mae":
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    each = ((pred - target) ** 2).mean(2)
    return {"patches": (each * mask).sum() / mask.sum()}
