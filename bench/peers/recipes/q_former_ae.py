from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import blocks, linear, norm, parameters
from maefast.bench.peers.recipes.dmae import batch
from maefast.recipe import View

__all__ = ["batch", "reference"]

ARGUMENTS = {"backbone": "random", "metric": "random", "dropout": 0.0}


def q_former(p: dict[str, Tensor], recipe: nn.Module, features: Tensor) -> Tensor:
    x = p["q_former.queries"].expand(len(features), -1, -1)
    for i, part in enumerate(recipe.q_former.blocks):
        at, heads = f"q_former.blocks.{i}", part.attn.num_heads
        q, k, v = linear(x, p, f"{at}.attn.Wqkv").split([x.shape[2], *[x.shape[2] // heads] * 2], 2)
        q = q.unflatten(2, (heads, -1)).transpose(1, 2)
        k, v = (t[:, None].expand_as(q) for t in (k, v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=part.attn.causal).transpose(1, 2).flatten(2)
        x = linear(x, p, f"{at}.attn.out_proj")
        if part.cross_attn is not None:
            cross = f"{at}.cross_attn"
            q = linear(norm(x, p, f"{cross}.norm", 1e-5), p, f"{cross}.to_q")
            q, k, v = (
                t.unflatten(2, (heads, -1)).transpose(1, 2)
                for t in (q, *linear(features, p, f"{cross}.to_kv").chunk(2, 2))
            )
            null = p[f"{cross}.null_kv"][:, None, None, None].expand(2, len(q), heads, 1, -1)
            k, v = (torch.cat([null[row], t], 2) for row, t in enumerate((k, v)))
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = norm(linear(x, p, f"{cross}.to_out.0"), p, f"{cross}.to_out.1", 1e-5)
        x = norm(x, p, f"{at}.projection.0", 1e-5)
        x = linear(F.gelu(linear(x, p, f"{at}.projection.1")), p, f"{at}.projection.3")
    return x


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """Q-Former Autoencoder (Dalmonte et al., 2026); what the frozen networks say of the images is there."""
    p, images, (ph, pw) = parameters(recipe), view.parts, recipe.patch_size
    x = q_former(p, recipe, linear(view.target["features"], p, "embed"))
    x = linear(x, p, "decoder.embed") + p["decoder.pos_embed"]
    lead = [p[name] for name in ("decoder.reg_tokens", "decoder.cls_token") if name in p]
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in lead), x], 1)
    x = blocks(x, p, "decoder.blocks.", recipe.decoder.blocks[0].attn.num_heads, eps=1e-5)[-1]
    x = linear(norm(x, p, "decoder.norm", 1e-5), p, "decoder.pred")[:, sum(token.shape[1] for token in lead) :]
    rows = images.shape[2] // ph
    x = x.unflatten(1, (rows, -1)).unflatten(3, (ph, pw, 3)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
    m, far = recipe.metric.module.state_dict(), 1.0
    sides, at = recipe.on_loss
    for side, wanted in zip(sides, view.target["states"]):
        y = F.conv2d(x, m[f"weight_{side}"], m["bias"], stride=side).flatten(2).transpose(1, 2)
        y = torch.cat([m["cls_token"].expand(len(y), -1, -1), y], 1) + m[f"pos_{side}"]
        states = blocks(y, m, "blocks.", recipe.metric.module.blocks[0].attn.num_heads)
        cos = torch.stack([F.cosine_similarity(states[i][:, 1:], t, 2) for i, t in zip(at, wanted)])
        grid = (*cos.shape[:2], images.shape[2] // side, -1)
        far = far * F.interpolate((1 - cos).view(grid), images.shape[2:], mode="bilinear", align_corners=False)
    terms = {"perceptual": far.mean()}
    return {**terms, "pixels": recipe.pixels * F.mse_loss(x, images)} if recipe.pixels else terms
