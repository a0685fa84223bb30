from __future__ import annotations

import torch
from torch import Tensor, nn

from maefast.bench.peers.plain import below, blocks, linear, norm, parameters
from maefast.bench.peers.recipes import dmjd
from maefast.bench.peers.recipes.dmae import batch, encoder_input, patches
from maefast.recipe import View

__all__ = ["batch", "reference"]

ARGUMENTS = {"teacher": "random"}


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """MR-MAE (Gao et al., 2023) with dense convolution stages; what the teacher gives is there. One fused layer, MSE of
    the features, and a class token or MCMAE's stages, as the recipe has them."""
    p, plan, images = parameters(recipe), view.plan, view.parts
    keep, restore, lead = plan.ids_keep, plan.ids_restore, recipe.lead
    if lead:
        x = encoder_input(p, "encoder.", images, recipe.patch)
        x = torch.cat([x[:, :1], x[:, 1:].gather(1, keep[..., None].expand(-1, -1, x.shape[2]))], 1)
        states = blocks(x, p, "encoder.blocks.", recipe.encoder.blocks[0].attn.num_heads)
        latent = norm(states[-1], p, "encoder.norm")
    else:
        latent, states = dmjd.encode(below(p, "encoder."), images, recipe, plan.mask, keep)
    for i, index in enumerate(recipe.fused):
        latent = latent + linear(norm(states[index], p, f"fusion.norms.{i}"), p, f"fusion.maps.{i}")
    features = (linear(latent[:, lead:], p, "head") - view.target).square().mean()
    x = linear(latent, p, "decoder.embed")
    masked = p["decoder.mask_token"].expand(len(x), plan.num_tokens - keep.shape[1], -1)
    whole = torch.cat([x[:, lead:], masked], 1).gather(1, restore[..., None].expand(-1, -1, x.shape[2]))
    x = torch.cat([x[:, :lead], whole], 1) + p["decoder.pos_embed"]
    x = blocks(x, p, "decoder.blocks.", recipe.decoder.blocks[0].attn.num_heads)[-1][:, lead:]
    target = patches(images, recipe.patch)
    if recipe.norm == "mae":
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    each = (linear(norm(x, p, "decoder.norm"), p, "decoder.pred") - target).square().mean(2)
    return {"pixels": (each * plan.mask).sum() / plan.mask.sum(), "mimic": recipe.weight * features}
