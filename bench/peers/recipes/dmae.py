from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import blocks, linear, norm, parameters
from maefast.data.images.batch import ImageBatch
from maefast.recipe import View

ARGUMENTS = {"teacher": "random"}


def batch(size: int) -> ImageBatch:
    return ImageBatch(torch.randint(0, 256, (size, 3, 224, 224), dtype=torch.uint8))


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """DMAE (Bai et al., 2023); what the teacher gives is there."""
    p, plan, images = parameters(recipe), view.plan, view.parts
    latent, pred = autoencoder(p, "student.", recipe.student, images, plan.ids_keep, plan.ids_restore)
    head = F.normalize(linear(latent[recipe.at], p, "head"), dim=2)
    features = (head - F.normalize(view.target, dim=2)).abs().mean()
    target = patches(images, recipe.student.patch_size)
    if recipe.student.norm_pix_loss:
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    error = (pred - target).square().mean(2)
    return {"pixels": (error * plan.mask).sum() / plan.mask.sum(), "features": recipe.weight * features}


def autoencoder(
    p: dict[str, Tensor], at: str, model: nn.Module, images: Tensor, ids_keep: Tensor, ids_restore: Tensor
) -> tuple[list[Tensor], Tensor]:
    """MAE: the outputs of the encoder's blocks, and predictions of all patches."""
    sizes = model.config
    x = encoder_input(p, at, images, model.patch_size)
    kept = x[:, 1:].gather(1, ids_keep[..., None].expand(-1, -1, x.shape[2]))
    states = blocks(torch.cat([x[:, :1], kept], 1), p, f"{at}blocks.", sizes["num_heads"])
    x = linear(norm(states[-1], p, f"{at}norm"), p, f"{at}decoder_embed")
    count = ids_restore.shape[1] + 1 - x.shape[1]
    full = torch.cat([x[:, 1:], p[f"{at}mask_token"].expand(len(x), count, -1)], 1)
    full = full.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))
    x = torch.cat([x[:, :1], full], 1) + p[f"{at}decoder_pos_embed"]
    x = norm(blocks(x, p, f"{at}decoder_blocks.", sizes["decoder_num_heads"])[-1], p, f"{at}decoder_norm")
    return states, linear(x, p, f"{at}decoder_pred")[:, 1:]


def encoder_input(p: dict[str, Tensor], at: str, images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """[B, 1 + N, D] of all patches."""
    weight, bias = p[f"{at}patch_embed.proj.weight"], p[f"{at}patch_embed.proj.bias"]
    x = F.conv2d(images, weight, bias, stride=patch_size).flatten(2).transpose(1, 2)
    return torch.cat([p[f"{at}cls_token"].expand(len(x), -1, -1), x], 1) + p[f"{at}pos_embed"]


def patches(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """[B, N, K] in (ph, pw, C) order."""
    ph, pw = patch_size
    blocks = images.unfold(2, ph, ph).unfold(3, pw, pw)  # [B, C, rows, columns, ph, pw]
    return blocks.permute(0, 2, 3, 4, 5, 1).flatten(1, 2).flatten(2)
