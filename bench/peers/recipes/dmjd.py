from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import below, blocks, linear, norm, parameters
from maefast.bench.peers.recipes.dmae import batch
from maefast.recipe import View

__all__ = ["batch", "encode", "reference"]


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """DMJD (Ma et al., 2023) with dense stages whose convolutions are multiplied by the mask, as the authors do."""
    p, plan = parameters(recipe), view.plan
    images, target = torch.cat([view.parts] * 2), torch.cat([view.target] * 2)
    latents, _ = encode(below(p, "encoder."), images, recipe, plan.mask, plan.ids_keep)
    x = linear(latents, p, "decoder.embed")
    full = torch.cat([x, p["decoder.mask_token"].expand(len(x), plan.num_tokens - x.shape[1], -1)], 1)
    x = full.gather(1, plan.ids_restore[..., None].expand(-1, -1, x.shape[2])) + p["decoder.pos_embed"]
    x = blocks(x, p, "decoder.blocks.", recipe.decoder.blocks[0].attn.num_heads)[-1]
    each = distance(linear(norm(x, p, "decoder.norm"), p, "decoder.pred"), target, recipe.losses[0]).mean(2)
    masked = (each * plan.mask).sum() / plan.mask.sum()
    x = F.gelu(norm(linear(latents, p, "projector.0"), p, "projector.1"))
    x = F.gelu(norm(linear(x, p, "projector.3"), p, "projector.4"))
    x = F.layer_norm(linear(x, p, "projector.6"), x.shape[-1:], eps=1e-6)
    order = plan.ids_keep if recipe.paired else plan.ids_keep.sort(1)[0]
    own = target.gather(1, order[..., None].expand(-1, -1, target.shape[2]))
    visible = distance(linear(x, p, "predictor.0"), own, recipe.losses[1]).mean()
    return {"masked": masked, "visible": recipe.theta * visible}


def encode(
    p: Mapping[str, Tensor], x: Tensor, recipe: nn.Module, mask: Tensor, keep: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Latents of visible tokens, and the outputs of the transformer's blocks."""
    maps = (~mask).to(x.dtype).view(-1, 1, *recipe.grid)
    index, skips = keep[..., None], []
    for stage, ratio in ((1, 4), (2, 2)):
        x = embed(x, p, stage)
        shown = maps.repeat_interleave(ratio, 2).repeat_interleave(ratio, 3)
        for i in range(len(getattr(recipe.encoder, f"blocks{stage}"))):
            x = conv_block(x, below(p, f"blocks{stage}.{i}."), shown)
        skips.append(conv(x, p, f"stage{stage}_output_decode", stride=ratio).flatten(2).transpose(1, 2))
    x = linear(embed(x, p, 3).flatten(2).transpose(1, 2), p, "patch_embed4") + p["pos_embed"]
    x, *skips = (t.gather(1, index.expand(-1, -1, t.shape[2])) for t in (x, *skips))
    states = blocks(x, p, "blocks3.", recipe.encoder.blocks3[0].attn.num_heads)
    return norm(states[-1] + skips[0] + skips[1], p, "norm"), states


def distance(pred: Tensor, target: Tensor, loss: str) -> Tensor:
    if loss == "mse":
        return (pred - target).square()
    return F.smooth_l1_loss(pred, target, reduction="none", beta=2.0)


def embed(x: Tensor, p: Mapping[str, Tensor], stage: int) -> Tensor:
    stride = p[f"patch_embed{stage}.proj.weight"].shape[-1]
    return F.gelu(over_channels(conv(x, p, f"patch_embed{stage}.proj", stride=stride), p, f"patch_embed{stage}.norm"))


def conv_block(x: Tensor, p: Mapping[str, Tensor], shown: Tensor) -> Tensor:
    y = shown * conv(over_channels(x, p, "norm1"), p, "conv1")
    x = x + conv(conv(y, p, "attn", padding=2, groups=x.shape[1]), p, "conv2")
    return x + conv(F.gelu(conv(over_channels(x, p, "norm2"), p, "mlp.fc1")), p, "mlp.fc2")


def conv(x: Tensor, p: Mapping[str, Tensor], name: str, **how: int) -> Tensor:
    return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **how)


def over_channels(x: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
    return norm(x.permute(0, 2, 3, 1), p, name, eps=1e-5).permute(0, 3, 1, 2)
