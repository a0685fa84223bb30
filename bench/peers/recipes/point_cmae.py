from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import blocks, linear, norm, parameters
from maefast.bench.peers.recipes.point_mae import batch, group_tokens, mlp
from maefast.recipe import View

__all__ = ["batch", "reference"]


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """Point-CMAE (Ren et al., 2024): two passes, the matrix of all pairs."""
    p, (points, centres) = parameters(recipe), view.parts
    batch, size = len(points), points.shape[2]
    heads, decoder_heads = (part.blocks[0].attn.num_heads for part in (recipe.encoder, recipe.decoders[0]))
    tokens = group_tokens(points, p, "encoder.patch_embed.", recipe.training)
    chamfer, states = 0, []
    for branch, mask in enumerate(plan.mask for plan in view.plan):
        seen, hidden = (centres[which].view(batch, -1, 3) for which in (~mask, mask))
        lead, lead_pos = (p[f"{name}.{branch}"].expand(batch, -1, -1) for name in ("cls_tokens", "cls_positions"))
        x = torch.cat([lead, tokens[~mask].view(batch, seen.shape[1], -1)], 1)
        each = torch.cat([lead_pos, mlp(seen, p, "encoder.pos_embed")], 1)
        x = norm(blocks(x, p, "encoder.blocks.", heads, each, eps=1e-5)[-1], p, "encoder.norm", 1e-5)[:, 1:]
        at = f"decoders.{branch}"
        x = torch.cat([x, p[f"{at}.mask_token"].expand(batch, hidden.shape[1], -1)], 1)
        each = mlp(torch.cat([seen, hidden], 1), p, f"{at}.pos_embed")
        x = blocks(x, p, f"{at}.blocks.", decoder_heads, each, eps=1e-5)[-1]
        pred = linear(norm(x[:, seen.shape[1] :], p, f"{at}.norm", 1e-5), p, f"{at}.pred").view(-1, size, 3)
        distance = (pred[:, :, None] - points[mask][:, None]).square().sum(3)
        chamfer = chamfer + distance.amin(2).mean() + distance.amin(1).mean()
        back = torch.zeros_like(x)
        back[~mask], back[mask] = x[:, : seen.shape[1]].flatten(0, 1), x[:, seen.shape[1] :].flatten(0, 1)
        states.append(F.normalize(back, dim=2))
    twice, apart = view.plan[0].mask & view.plan[1].mask, 1 - states[0] @ states[1].transpose(1, 2)
    each = apart.diagonal(dim1=1, dim2=2) if recipe.pairing == "same" else apart.mean(2)
    return {"chamfer": recipe.chamfer * chamfer, "contrast": (each * twice).sum() / max(1, int(twice.sum()))}
