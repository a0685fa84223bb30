from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import blocks, linear, norm, parameters
from maefast.bench.peers.recipes.dmae import batch, encoder_input, patches
from maefast.ops import TokenMask
from maefast.recipe import View

__all__ = ["batch", "encode", "reference"]


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """LUT (Kim et al., 2023), a pass for each view, as the authors do; what the average gives is there."""
    p, (both, first) = parameters(recipe), view.plan
    images, keep = view.parts.chunk(2), both.ids_keep.chunk(2)
    latents = [encode(p, "encoder.", recipe, *given) for given in zip(images, keep)]
    x = linear(latents[0], p, "decoder.embed")
    count = first.num_tokens + 1 - x.shape[1]
    full = torch.cat([x[:, 1:], p["decoder.mask_token"].expand(len(x), count, -1)], 1)
    full = full.gather(1, first.ids_restore[..., None].expand(-1, -1, x.shape[2]))
    x = torch.cat([x[:, :1], full], 1) + p["decoder.pos_embed"]
    heads = recipe.decoder.blocks[0].attn.num_heads
    pred = linear(norm(blocks(x, p, "decoder.blocks.", heads)[-1], p, "decoder.norm"), p, "decoder.pred")[:, 1:]
    target = patches(images[0], recipe.patch)
    if recipe.norm == "mae":
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    pixels = ((pred - target).square().mean(2) * first.mask).sum() / first.mask.sum()
    q = [_head(_head(x[:, 1:].mean(1), p, "projector", recipe), p, "predictor", recipe) for x in latents]
    t = view.target.chunk(2)
    apart = sum((2 - 2 * F.cosine_similarity(q[i], t[1 - i])).mean() for i in (0, 1)) / 2
    return {"pixels": pixels, "agreement": recipe.weight * apart}


def encode(p: dict[str, Tensor], at: str, recipe: nn.Module, images: Tensor, keep: Tensor | None = None) -> Tensor:
    x = encoder_input(p, at, images, recipe.patch)
    if keep is not None:
        x = torch.cat([x[:, :1], x[:, 1:].gather(1, keep[..., None].expand(-1, -1, x.shape[2]))], 1)
    return norm(blocks(x, p, f"{at}blocks.", recipe.encoder.blocks[0].attn.num_heads)[-1], p, f"{at}norm")


def _head(x: Tensor, p: dict[str, Tensor], at: str, recipe: nn.Module) -> Tensor:
    running = (p[f"{at}.1.running_{name}"].clone() for name in ("mean", "var"))
    x = F.batch_norm(linear(x, p, f"{at}.0"), *running, p[f"{at}.1.weight"], p[f"{at}.1.bias"], recipe.training)
    return linear(torch.relu(x), p, f"{at}.3")


def apart(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """As `recipe(view)`, with maefast's kernels, but view after view, as the authors do."""
    both, first = view.plan
    second = TokenMask.from_scores(both.ids_restore.chunk(2)[1].float(), both.keep)
    latents = [recipe.encoder(*given, features=False) for given in zip(view.parts.chunk(2), (first, second))]
    return recipe.scored(latents, view).terms
