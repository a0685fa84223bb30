from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import blocks, linear, norm, parameters
from maefast.data.embeddings import EmbeddingBatch
from maefast.recipe import View


def batch(size: int) -> EmbeddingBatch:
    lengths = np.random.default_rng(0).integers(2, 257, size)
    return EmbeddingBatch(torch.randn(size, 256, 1024), lengths)


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """LV-MAE (Naiman et al., 2025), padded: the visible segments to the longest of the batch, the decoder's to L."""
    p, values, mask, absent = parameters(recipe), view.parts, view.plan.mask, view.plan.absent
    heads, decoder_heads = (part.blocks[0].attn.num_heads for part in (recipe.encoder, recipe.decoder))
    values = values.masked_fill(absent[..., None], 0)
    visible = ~(mask | absent)
    count = visible.sum(1)
    first = (~visible).to(torch.uint8).argsort(dim=1, stable=True)[:, : count.max()]  # visible positions, then others
    x = linear(values, p, "encoder.patch_embed.proj") if "encoder.patch_embed.proj.weight" in p else values
    x = x + p["encoder.pos_embed"][:, 1:]
    lead = (p["encoder.cls_token"] + p["encoder.pos_embed"][:, :1]).expand(len(x), -1, -1)
    x = torch.cat([lead, x.gather(1, first[..., None].expand(-1, -1, x.shape[2]))], 1)
    keys = torch.arange(x.shape[1], device=x.device) <= count[:, None]
    x = norm(blocks(x, p, "encoder.blocks.", heads, keys=keys)[-1], p, "encoder.norm")
    x = linear(x, p, "decoder.embed")
    whole = p["decoder.mask_token"].expand(*mask.shape, -1).to(x.dtype)
    whole = whole.masked_scatter(visible[..., None], x[:, 1:][keys[:, 1:]])
    x = torch.cat([x[:, :1], whole], 1) + p["decoder.pos_embed"]
    keys = F.pad(~absent, (1, 0), value=True)
    x = norm(blocks(x, p, "decoder.blocks.", decoder_heads, keys=keys)[-1], p, "decoder.norm")
    pred = linear(x, p, "decoder.pred")[:, 1:]
    if recipe.loss == "cosine":
        each = 1 - F.cosine_similarity(pred, values, dim=2, eps=1e-6)
    else:
        each = ((pred - values) ** 2).mean(2)
    return {"segments": (each * mask).sum() / mask.sum()}
