from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import below, blocks, linear, norm, parameters
from maefast.bench.peers.plain import block as ordinary
from maefast.bench.peers.recipes.dmae import batch as images
from maefast.bench.peers.recipes.dmae import encoder_input, patches
from maefast.data.images.batch import ImageBatch
from maefast.recipe import View


def batch(size: int) -> ImageBatch:
    """`size` mixes of four."""
    return images(4 * size)


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """MixedAE (Chen et al., 2023): all patches embedded, mixed by a product with the masks, tokens in raster order,
    scores below the k-th ruled out before the softmax, a loop over the mixes for the contrast."""
    p, plan, group = parameters(recipe), view.plan, recipe.group
    x = encoder_input(p, "encoder.", view.parts, recipe.patch)
    if recipe.segments is not None:
        x[:, 1:] = x[:, 1:] + p["segments"].repeat(len(x) // group, 1)[:, None]
    own = (~plan.mask).to(x.dtype)[..., None]
    mix = (x[:, 1:] * own).unflatten(0, (-1, group)).sum(1)
    x, heads = torch.cat([x[::group, :1], mix], 1), recipe.encoder.blocks[0].attn.num_heads
    for i in range(recipe.homologous):
        x = homologous_block(x, below(p, f"encoder.blocks.{i}."), heads, recipe.top)
    for i in range(recipe.homologous, len(recipe.encoder.blocks)):
        x = ordinary(x, below(p, f"encoder.blocks.{i}."), heads)
    latent = norm(x, p, "encoder.norm")
    source = (~plan.mask).view(-1, group, plan.num_tokens).int().argmax(1)
    contrast = torch.stack([one_contrast(z, s, recipe.temperature) for z, s in zip(latent[:, 1:], source)]).mean()
    x = linear(latent, p, "decoder.embed").repeat_interleave(group, 0)
    x = torch.cat([x[:, :1], torch.where(plan.mask[..., None], p["decoder.mask_token"], x[:, 1:])], 1)
    x = blocks(x + p["decoder.pos_embed"], p, "decoder.blocks.", recipe.decoder.blocks[0].attn.num_heads)[-1][:, 1:]
    pred, target = linear(norm(x, p, "decoder.norm"), p, "decoder.pred"), patches(view.parts, recipe.patch)
    if recipe.norm == "mae":
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    each = (pred - target).square().mean(2)
    return {"pixels": (each * plan.mask).sum() / plan.mask.sum(), "contrast": recipe.weight * contrast}


def homologous_block(x: Tensor, p: Mapping[str, Tensor], heads: int, top: int) -> Tensor:
    q, k, v = linear(norm(x, p, "norm1"), p, "attn.qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    values, index = scores.topk(top, dim=3)
    scores = torch.full_like(scores, -torch.inf).scatter(3, index, values)
    x = x + linear((scores.softmax(3) @ v).transpose(1, 2).flatten(2), p, "attn.proj")
    return x + linear(F.gelu(linear(norm(x, p, "norm2"), p, "mlp.fc1")), p, "mlp.fc2")


def one_contrast(z: Tensor, source: Tensor, temperature: float) -> Tensor:
    z, others = F.normalize(z, dim=1), ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    scores = (z @ z.t() / temperature)[others].view(len(z), -1)
    same = (source[:, None] == source)[others].view(len(z), -1)
    return -(scores.log_softmax(1) * same).sum(1).div(same.sum(1)).mean()
