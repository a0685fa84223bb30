from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import below, linear, norm, parameters
from maefast.bench.peers.recipes.dmae import batch, patches
from maefast.recipe import View

__all__ = ["batch", "compress", "expand", "ista", "mssa", "reference"]


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """CRATE-MAE (Pai et al., 2024): all patches are embedded, then hidden ones replaced."""
    p, mask = parameters(recipe), view.plan.mask
    x = F.conv2d(view.parts, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=recipe.patch)
    x = torch.where(mask[..., None], p["mask_token"], x.flatten(2).transpose(1, 2))
    x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x], 1) + p["pos_embed"]
    for i, block in enumerate(recipe.blocks):
        heads, how = block.attn.num_heads, (block.ista.step, block.ista.threshold)
        x = compress(x, below(p, f"blocks.{i}."), heads, *how)
    x = norm(x, p, "norm")
    for i, block in enumerate(recipe.decoder_blocks):
        x = expand(x, below(p, f"decoder_blocks.{i}."), block.attn.num_heads)
    pred = linear(norm(x, p, "decoder_norm"), p, "decoder_pred")[:, 1:]
    target = patches(view.parts, recipe.patch)
    if recipe.target_norm == "mae":
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    return {"pixels": ((pred - target).square().mean(2) * mask).sum() / mask.sum()}


def compress(x: Tensor, p: dict[str, Tensor], heads: int, step: float = 0.1, threshold: float = 0.5) -> Tensor:
    u = norm(x + mssa(norm(x, p, "norm1", 1e-5), below(p, "attn."), heads), p, "norm2", 1e-5)
    return ista(u, p["ista.weight"], step, threshold)


def expand(x: Tensor, p: dict[str, Tensor], heads: int) -> Tensor:
    y = linear(norm(x, p, "norm1", 1e-5), p, "dictionary")
    return y - mssa(norm(y, p, "norm2", 1e-5), below(p, "attn."), heads)


def mssa(x: Tensor, p: dict[str, Tensor], heads: int) -> Tensor:
    w = linear(x, p, "subspaces").unflatten(2, (heads, -1)).transpose(1, 2)
    return linear(F.scaled_dot_product_attention(w, w, w).transpose(1, 2).flatten(2), p, "proj")


def ista(u: Tensor, dictionary: Tensor, step: float, threshold: float) -> Tensor:
    """u are rows, so that D u is u D^T."""
    gradient = u @ dictionary.T @ dictionary - u @ dictionary
    return F.relu(u - step * gradient - step * threshold)
