from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import below, blocks, linear, norm, parameters
from maefast.data.vectors import VectorBatch
from maefast.recipe import View

ARGUMENTS = {"drop": 0.0}


def batch(size: int) -> VectorBatch:
    images = torch.randint(0, 256, (size, 3, 112, 112), dtype=torch.uint8)
    return VectorBatch(torch.randn(size, 512), images)


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """Vec2Face (Wu et al., 2025), without networks of the user's."""
    p, (images, _), hidden, dropped = parameters(recipe), view.target, view.plan.hidden, view.plan.plan.mask
    f = linear(view.parts, p, "latent_prior_proj_f")
    rows = linear(f[..., None], p, "feature_token").transpose(1, 2)
    x = torch.cat([f[:, None], torch.where(hidden[..., None], f[:, None], rows)], 1)
    x = norm(x + p["token_emb.position_embeddings.weight"], p, "token_emb.LayerNorm")
    kept = F.pad(~dropped, (1, 0), value=True)
    x = norm(blocks(x[kept].view(len(x), -1, x.shape[2]), p, "blocks.", recipe.blocks[0].attn.num_heads)[-1], p, "norm")
    x = linear(x, p, "decoder_embed")
    full = x[:, :1].expand(-1, kept.shape[1], -1).masked_scatter(kept[..., None], x)
    full = torch.where(F.pad(hidden, (1, 0))[..., None], x[:, :1], full) + p["decoder_pos_embed_learned"]
    heads = recipe.decoder_blocks[0].attn.num_heads
    y = norm(blocks(full, p, "decoder_blocks.", heads)[-1], p, "decoder_norm")[:, 1:]
    each = ((y - rows.detach()) ** 2).mean(2)
    distance = each.mean() if recipe.rows == "all" else each[hidden].mean()
    features = linear(y, p, "im_decoder_proj").transpose(1, 2).unflatten(2, recipe.grid)
    made = image(features, below(p, "im_decoder."), recipe.im_decoder.up[0].block[0].shortcut)
    alike = similarity((made + 1) / 2, (images + 1) / 2)
    return {"rows": distance, "pixels": ((made - images) ** 2).mean(), "ssim": 0.1 * (1 - alike)}


def image(x: Tensor, p: dict[str, Tensor], shortcut: str) -> Tensor:
    """VQGAN's decoder."""

    def conv(x: Tensor, name: str) -> Tensor:
        weight = p[f"{name}.weight"]
        return F.conv2d(x, weight, p.get(f"{name}.bias"), padding=weight.shape[2] // 2)

    def active(x: Tensor, name: str) -> Tensor:
        x = F.group_norm(x, min(32, x.shape[1]), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)
        return x * torch.sigmoid(x)

    def block(x: Tensor, at: str) -> Tensor:
        h = conv(active(x, f"{at}.norm1"), f"{at}.conv1")
        h = conv(active(h, f"{at}.norm2"), f"{at}.conv2")
        if f"{at}.nin_shortcut.weight" not in p:
            return x + h
        return h + conv(x if shortcut == "input" else h, f"{at}.nin_shortcut")

    x = block(block(conv(x, "conv_in"), "mid.block_1"), "mid.block_2")
    for level in sorted({int(name.split(".")[1]) for name in p if name.startswith("up.")}, reverse=True):
        for i in sorted({int(name.split(".")[3]) for name in p if name.startswith(f"up.{level}.block.")}):
            x = block(x, f"up.{level}.block.{i}")
        if level:
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"up.{level}.upsample.conv")
    return conv(active(x, "norm_out"), "conv_out")


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of images in [0, 1]."""
    at = torch.arange(-5, 6, dtype=a.dtype, device=a.device)
    line = torch.exp(-(at**2) / 4.5)
    window = (line[:, None] * line / line.sum() ** 2).expand(a.shape[1], 1, -1, -1)
    m, n, aa, bb, ab = (F.conv2d(t, window, groups=a.shape[1]) for t in (a, b, a * a, b * b, a * b))
    high = (2 * m * n + 1e-4) * (2 * (ab - m * n) + 9e-4)
    return (high / ((m**2 + n**2 + 1e-4) * (aa - m**2 + bb - n**2 + 9e-4))).mean()
