from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import blocks, linear, norm, parameters
from maefast.bench.peers.recipes.dmae import batch, encoder_input
from maefast.recipe import View

__all__ = ["batch", "reference"]

ARGUMENTS = {"tokenizer": "random"}


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """CAE (Chen et al., 2022); the codes are there."""
    p, mask = parameters(recipe), view.plan.mask
    heads, batch = recipe.encoder.blocks[0].attn.num_heads, len(mask)
    x = encoder_input(p, "encoder.", view.parts, recipe.encoder.patch_embed.patch_size)
    width = x.shape[2]

    def encoded(which: Tensor) -> Tensor:
        tokens = torch.cat([x[:, :1], x[:, 1:][which].view(batch, -1, width)], 1)
        return norm(blocks(tokens, p, "encoder.blocks.", heads)[-1], p, "encoder.norm")[:, 1:]

    visible, target = encoded(~mask), encoded(mask).detach()
    table = p["encoder.pos_embed"][:, 1:].expand(batch, -1, -1)
    shown, hidden = (table[which].view(batch, -1, width) for which in (~mask, mask))
    y = p["mask_token"].expand_as(hidden)
    for i in range(len(recipe.regressor.blocks)):
        at, z = f"regressor.blocks.{i}", torch.cat([visible, y], 1)
        q = F.linear(norm(y + hidden, p, f"{at}.norm1_q"), p[f"{at}.cross_attn.q.weight"], p[f"{at}.cross_attn.q_bias"])
        k = F.linear(norm(z + torch.cat([shown, hidden], 1), p, f"{at}.norm1_k"), p[f"{at}.cross_attn.k.weight"])
        v = F.linear(norm(z, p, f"{at}.norm1_v"), p[f"{at}.cross_attn.v.weight"], p[f"{at}.cross_attn.v_bias"])
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = norm(y + p[f"{at}.gamma_1_cross"] * linear(seen, p, f"{at}.cross_attn.proj"), p, f"{at}.norm2_cross")
        inner = F.gelu(linear(y, p, f"{at}.mlp_cross.fc1"))
        y = y + p[f"{at}.gamma_2_cross"] * linear(inner, p, f"{at}.mlp_cross.fc2")
    y = norm(y, p, "regressor.norm")
    logits = linear(norm(blocks(y + hidden, p, "decoder.blocks.", heads)[-1], p, "decoder.norm"), p, "decoder.head")
    codes = F.cross_entropy(logits.flatten(0, 1), view.target.flatten())
    return {"codes": codes, "latents": recipe.align * F.mse_loss(y, target)}
