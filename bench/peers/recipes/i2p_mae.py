from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import blocks, linear, norm, parameters
from maefast.bench.peers.recipes.point_mae import group_tokens, mlp
from maefast.data.points import PointBatch
from maefast.recipe import View

ARGUMENTS = {"teacher": "random"}


def batch(size: int) -> PointBatch:
    return PointBatch(F.normalize(torch.randn(size, 2048, 3), dim=2))


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """I2P-MAE (Zhang et al., 2023), of scales, masks and targets that are there: visible tokens padded to the longest
    sample's, all groups embedded, a plain matrix of distances."""
    p, (groups, index), masks = parameters(recipe), view.parts[0], [plan.mask for plan in view.plan]
    rows, heads = torch.arange(len(masks[0]), device=masks[0].device), recipe.encoder.stages[0].blocks[0].attn.num_heads
    latents, x = [], None
    for i, ((points, centres), members, mask) in enumerate(zip(groups, index, masks)):
        parts = points if x is None else x[rows[:, None, None], members]
        wanted = torch.ones_like(mask) if recipe.encoder.embed_all else ~mask
        made = group_tokens(parts[wanted][None], p, f"encoder.embeds.{i}.", recipe.training)[0]
        tokens = made.new_zeros(*mask.shape, made.shape[1])
        tokens[wanted] = made
        order = mask.float().sort(dim=1, stable=True)[1][:, : (~mask).sum(1).max()]
        keys = ~mask.gather(1, order)
        each = mlp(centres[rows[:, None], order], p, f"encoder.pos_embeds.{i}")
        seen = blocks(tokens[rows[:, None], order], p, f"encoder.stages.{i}.blocks.", heads, each, 1e-5, keys)[-1][keys]
        x = torch.zeros_like(tokens)
        x[mask], x[~mask] = tokens[mask], seen
        latents.append(norm(seen, p, f"encoder.norms.{i}", 1e-5))
    x = p["decoder.mask_token"].expand(*masks[-1].shape, -1).clone()
    x[~masks[-1]] = latents[-1]
    for level, at in enumerate(range(len(groups) - 1, 0, -1)):
        if level:
            fine = x.new_zeros(*masks[at].shape, latents[at].shape[1])
            fine[~masks[at]] = latents[at]
            x = propagate(fine, x, groups[at].centres, groups[at + 1].centres, p, level - 1, recipe.training)
        each = mlp(groups[at].centres, p, f"decoder.pos_embeds.{level}")
        x = blocks(x, p, f"decoder.stages.{level}.blocks.", heads, each, 1e-5)[-1]
    x, mask, (points, _), members = norm(x, p, "decoder.norm", 1e-5), masks[1], groups[1], index[1]
    pred = linear(x[mask], p, "pred_points").view(-1, points.shape[2], 3)
    distance = (pred[:, :, None] - points[mask][:, None]).square().sum(3)
    features = linear(x[~mask], p, "pred_features").view(-1, points.shape[2], view.target.shape[2])
    return {
        "chamfer": distance.amin(2).mean() + distance.amin(1).mean(),
        "features": F.mse_loss(features, view.target[rows[:, None, None], members][~mask]),
    }


def propagate(
    fine: Tensor, coarse: Tensor, at: Tensor, coarse_at: Tensor, p: dict[str, Tensor], level: int, training: bool
) -> Tensor:
    """Three nearest, weighed by 1 / distance^2; linear, batch norm, GELU; residual layers."""

    def normed(x: Tensor, name: str) -> Tensor:
        running = (p[f"{name}.running_{which}"].clone() for which in ("mean", "var"))
        return F.batch_norm(x.flatten(0, 1), *running, p[f"{name}.weight"], p[f"{name}.bias"], training).view_as(x)

    away, near = torch.cdist(at, coarse_at).square().topk(3, largest=False)
    weights = 1 / (away + 1e-8)
    weights = weights / weights.sum(2, keepdim=True)
    picked = coarse[torch.arange(len(at), device=at.device)[:, None, None], near]
    start = f"decoder.props.{level}."
    x = torch.cat([fine, (picked * weights[..., None]).sum(2)], 2)
    x = F.gelu(normed(linear(x, p, f"{start}fuse.net.0"), f"{start}fuse.net.1"))
    i = 0
    while f"{start}extraction.operation.{i}.net1.0.weight" in p:
        name = f"{start}extraction.operation.{i}."
        y = F.gelu(normed(linear(x, p, f"{name}net1.0"), f"{name}net1.1"))
        x = F.gelu(normed(linear(y, p, f"{name}net2.0"), f"{name}net2.1") + x)
        i += 1
    return x
