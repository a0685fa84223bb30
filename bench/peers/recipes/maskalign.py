from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import blocks, linear, parameters
from maefast.bench.peers.recipes.dmae import batch, encoder_input
from maefast.recipe import View

__all__ = ["batch", "reference"]

ARGUMENTS = {"teacher": "random"}


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """MaskAlign (Xue et al., 2023); what the teacher gives is there. All layers are mixed, as the authors do."""
    p, keep = parameters(recipe), view.plan.ids_keep
    x = encoder_input(p, "encoder.", view.parts, recipe.encoder.patch_embed.patch_size)
    x = torch.cat([x[:, :1], x[:, 1:].gather(1, keep[..., None].expand(-1, -1, x.shape[2]))], 1)
    states = torch.stack(blocks(x, p, "encoder.blocks.", recipe.encoder.blocks[0].attn.num_heads))
    mixed = torch.einsum("ab,bcde->acde", p["mix"], states)
    terms, depth = [], len(states)
    for i, target in zip(range(depth - recipe.layers, depth), view.target):
        target = F.layer_norm(target, target.shape[-1:])
        target = torch.cat([target[:, :1], target[:, 1:].gather(1, keep[..., None].expand(-1, -1, target.shape[2]))], 1)
        terms.append(2 * F.smooth_l1_loss(linear(mixed[i], p, f"heads.{i}"), target))
    return {"features": sum(terms) / recipe.layers}
