from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import blocks, linear, norm, parameters
from maefast.data.points import PointBatch
from maefast.recipe import View


def batch(size: int) -> PointBatch:
    return PointBatch(F.normalize(torch.randn(size, 1024, 3), dim=2))


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """Point-MAE (Pang et al., 2022), of groups that are there."""
    p, mask, (points, centres) = parameters(recipe), view.plan.mask, view.parts
    heads, decoder_heads = (part.blocks[0].attn.num_heads for part in (recipe.encoder, recipe.decoder))
    size, batch = points.shape[2], len(points)
    tokens = points if recipe.encoder.patch_embed.embed_all else points[~mask].view(batch, -1, size, 3)
    x = group_tokens(tokens, p, "encoder.patch_embed.", recipe.training)
    x = x[~mask].view(batch, -1, x.shape[-1]) if recipe.encoder.patch_embed.embed_all else x
    seen = centres[~mask].view(batch, -1, 3)
    x = blocks(x, p, "encoder.blocks.", heads, mlp(seen, p, "encoder.pos_embed"), eps=1e-5)[-1]
    x = norm(x, p, "encoder.norm", 1e-5)
    hidden = centres[mask].view(batch, -1, 3)
    x = torch.cat([x, p["decoder.mask_token"].expand(batch, hidden.shape[1], -1)], 1)
    each = mlp(torch.cat([seen, hidden], 1), p, "decoder.pos_embed")
    x = blocks(x, p, "decoder.blocks.", decoder_heads, each, eps=1e-5)[-1][:, -hidden.shape[1] :]
    pred = linear(norm(x, p, "decoder.norm", 1e-5), p, "decoder.pred").view(-1, size, 3)
    distance = (pred[:, :, None] - points[mask][:, None]).square().sum(3)
    return {"chamfer": distance.amin(2).mean() + distance.amin(1).mean()}


def group_tokens(points: Tensor, p: dict[str, Tensor], at: str, training: bool) -> Tensor:
    """[B, G, K, 3] -> [B, G, D]."""
    x = _pointwise(points.flatten(0, 1), p, f"{at}first_conv", training)
    x = torch.cat([x.amax(1, keepdim=True).expand_as(x), x], 2)
    x = _pointwise(x, p, f"{at}second_conv", training)
    return x.amax(1).unflatten(0, points.shape[:2])


def _pointwise(x: Tensor, p: dict[str, Tensor], at: str, training: bool) -> Tensor:
    """Linear, batch norm over all points (running statistics are left alone), ReLU, linear."""
    x = linear(x, p, f"{at}.0")
    running = (p[f"{at}.1.running_{name}"].clone() for name in ("mean", "var"))
    y = F.batch_norm(x.flatten(0, 1), *running, p[f"{at}.1.weight"], p[f"{at}.1.bias"], training).view_as(x)
    return linear(torch.relu(y), p, f"{at}.3")


def mlp(centres: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    return linear(F.gelu(linear(centres, p, f"{name}.0")), p, f"{name}.2")
