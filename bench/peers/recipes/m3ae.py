from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import attention, below, linear, norm, parameters
from maefast.bench.peers.recipes.dmae import patches
from maefast.data.captioned_images import CaptionBatch
from maefast.recipe import View

ARGUMENTS = {"drop": 0.0}


def batch(size: int) -> CaptionBatch:
    lengths = np.random.default_rng(0).integers(12, 65, size)
    at = np.arange(64)
    words = np.where(at < lengths[:, None] - 1, at - 1, np.where(at == lengths[:, None] - 1, -1, -2))
    images = torch.randint(0, 256, (size, 3, 288, 288), dtype=torch.uint8)
    return CaptionBatch(images, torch.randint(0, 50265, (size, 64)), words)


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """M3AE (Chen et al., 2022): three passes over padded captions, each from the beginning and to the end."""
    p, pairs, count = parameters(recipe), view.plan, len(view.parts)
    heads, depth = recipe.language_encoder.layer[0].attention.num_heads, len(recipe.fusion.vision_layers)
    longest, half = pairs.text.max_seqlen, len(pairs.ids) // 2
    keys = torch.arange(longest, device=pairs.ids.device) < pairs.text.cu_seqlens.diff()[:, None]
    ids = [keys.new_zeros(keys.shape, dtype=torch.int64).masked_scatter(keys, some) for some in pairs.ids.split(half)]
    of_image = vision_input(p, view.parts, recipe.patch)

    def passed(ids: Tensor, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        at = torch.arange(longest, device=ids.device) + recipe.language_encoder.first
        e = "language_encoder.embeddings."
        x = p[f"{e}word_embeddings.weight"][ids] + p[f"{e}position_embeddings.weight"][at]
        x = norm(x + p[f"{e}token_type_embeddings.weight"][0], p, f"{e}LayerNorm", 1e-5)
        for i in range(len(recipe.language_encoder.layer)):
            x = layer(x, below(p, f"language_encoder.layer.{i}."), heads, 1e-5, keys)
        y = norm(image, p, "vision_encoder.ln_pre", 1e-5)
        for i in range(len(recipe.vision_encoder.blocks)):
            y = clip_block(y, below(p, f"vision_encoder.blocks.{i}."), heads)
        y = norm(y, p, "vision_encoder.ln_post", 1e-5)
        kinds = p["fusion.type_embeddings.weight"]
        x, y = linear(x, p, "fusion.language_proj") + kinds[0], linear(y, p, "fusion.vision_proj") + kinds[1]
        xs, ys = [x], [y]
        for i in range(depth):
            mine, theirs = (below(p, f"fusion.{stream}_layers.{i}.") for stream in ("language", "vision"))
            x, y = layer(x, mine, heads, 1e-12, keys, y), layer(y, theirs, heads, 1e-12, None, x, keys)
            xs, ys = [*xs, x], [*ys, y]
        return xs, ys

    hidden = pairs.rows[:-count]
    rows = passed(ids[0], of_image)[0][-1][keys][hidden]
    t = "mlm_head.transform."
    rows = norm(F.gelu(linear(rows, p, f"{t}dense")), p, f"{t}LayerNorm", 1e-12)
    logits = linear(rows, p, "mlm_head.decoder") + p["mlm_head.bias"]

    width = of_image.shape[2]
    kept = of_image[:, 1:].gather(1, pairs.image.ids_keep[..., None].expand(-1, -1, width))
    y = linear(passed(ids[1], torch.cat([of_image[:, :1], kept], 1))[1][recipe.layer], p, "mim_head.embed")
    restore = pairs.image.ids_restore[..., None].expand(-1, -1, y.shape[2])
    full = torch.cat([y[:, 1:], p["mim_head.mask_token"].expand(count, restore.shape[1] + 1 - y.shape[1], -1)], 1)
    y = torch.cat([y[:, :1], full.gather(1, restore)], 1) + p["mim_head.pos_embed"]
    for i, block in enumerate(recipe.mim_head.blocks):
        y = clip_block(y, below(p, f"mim_head.blocks.{i}."), block.attn.num_heads)
    pred = linear(norm(y, p, "mim_head.norm", 1e-5), p, "mim_head.pred")[:, 1:]
    target = patches(view.parts, recipe.patch)
    if recipe.norm == "mae":
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    error = ((pred - target) ** 2).mean(2)

    xs, ys = passed(ids[1], of_image[pairs.image_of])
    pooled = [
        linear(stream[-1][:, 0], p, f"fusion.{name}_pooler.dense").tanh()
        for name, stream in (("language", xs), ("vision", ys))
    ]
    return {
        "tokens": F.cross_entropy(logits, view.target.ids),
        "patches": (error * pairs.image.mask).sum() / pairs.image.mask.sum(),
        "matching": F.cross_entropy(linear(torch.cat(pooled, 1), p, "itm_head.fc"), view.target.matched),
    }


def vision_input(p: dict[str, Tensor], images: Tensor, patch: tuple[int, int]) -> Tensor:
    """[B, 1 + N, D] of all patches, with positions."""
    x = F.conv2d(images, p["vision_encoder.conv1.weight"], stride=patch).flatten(2).transpose(1, 2)
    first = p["vision_encoder.class_embedding"].expand(len(x), 1, -1)
    return torch.cat([first, x], 1) + p["vision_encoder.positional_embedding"]


def clip_block(x: Tensor, p: dict[str, Tensor], heads: int) -> Tensor:
    """A pre-norm block with CLIP's activation."""
    names = ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias")
    x = x + attention(norm(x, p, "norm1", 1e-5), heads, *(p[name] for name in names))
    y = linear(norm(x, p, "norm2", 1e-5), p, "mlp.fc1")
    return x + linear(y * torch.sigmoid(1.702 * y), p, "mlp.fc2")


def layer(
    x: Tensor,
    p: dict[str, Tensor],
    heads: int,
    eps: float,
    keys: Tensor | None,
    other: Tensor | None = None,
    other_keys: Tensor | None = None,
) -> Tensor:
    """BERT's, with cross-attention to `other` where it is given."""

    def looked(x: Tensor, at: str, kv: Tensor, keys: Tensor | None) -> Tensor:
        q, k, v = (linear(t, p, f"{at}.self.{n}") for t, n in ((x, "query"), (kv, "key"), (kv, "value")))
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        seen = F.scaled_dot_product_attention(q, k, v, None if keys is None else keys[:, None, None])
        return norm(
            x + linear(seen.transpose(1, 2).flatten(2), p, f"{at}.output.dense"), p, f"{at}.output.LayerNorm", eps
        )

    x = looked(x, "attention", x, keys)
    if other is not None:
        x = looked(x, "crossattention", other, other_keys)
    y = linear(F.gelu(linear(x, p, "intermediate.dense")), p, "output.dense")
    return norm(x + y, p, "output.LayerNorm", eps)
