from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import attention, below, block, blocks, linear, norm, parameters
from maefast.data.volumes import VolumeBatch
from maefast.recipe import View


def batch(size: int) -> VolumeBatch:
    return VolumeBatch(torch.rand(size, 1, 96, 96, 96))


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """Hi-End-MAE (Tang et al., 2025)."""
    p, mask, patch, volumes = parameters(recipe), view.plan.mask, recipe.patch_size, view.parts
    heads, decoder_heads = recipe.encoder.blocks[0].attn.num_heads, recipe.decoder.cross_blocks[0].self_attn.num_heads
    x = F.conv3d(volumes, p["encoder.patch_embed.proj.weight"], p["encoder.patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2) + p["encoder.pos_embed"][1:]
    x = x[~mask].view(len(x), -1, x.shape[2])
    x = torch.cat([p["encoder.cls_token"].expand(len(x), 1, -1), x], 1)
    states = blocks(x, p, "encoder.blocks.", heads)
    last = len(recipe.states)
    y = linear(norm(states[-1], p, "encoder.norm"), p, f"decoder.embed.{last}")
    positions = p["decoder.pos_embed"][1:].expand(len(x), -1, -1)
    shown, hidden = (positions[which].view(len(x), -1, y.shape[2]) for which in (~mask, mask))
    y = torch.cat([y[:, :1], y[:, 1:] + shown, p["decoder.mask_token"] + hidden], 1)
    for i in range(len(recipe.decoder.blocks)):
        y = block(y, below(p, f"decoder.blocks.{i}."), decoder_heads)
    for i, state in enumerate(reversed(range(last))):
        b = below(p, f"decoder.cross_blocks.{i}.")
        qkv, proj = ((b[f"self_attn.{part}.weight"], b[f"self_attn.{part}.bias"]) for part in ("qkv", "proj"))
        y = y + attention(norm(y, b, "norm0"), decoder_heads, *qkv, *proj)
        kv = linear(linear(states[recipe.states[state]], p, f"decoder.embed.{state}"), b, "cross_attn.kv")
        q, k, v = (
            t.unflatten(2, (decoder_heads, -1)).transpose(1, 2)
            for t in (linear(norm(y, b, "norm1"), b, "cross_attn.q"), *kv.chunk(2, 2))
        )
        y = y + linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), b, "cross_attn.proj")
        y = y + linear(F.gelu(linear(norm(y, b, "norm2"), b, "mlp.fc1")), b, "mlp.fc2")
    pred = linear(norm(y[:, -hidden.shape[1] :], p, "decoder.norm"), p, "decoder.pred")
    target = volumes
    for axis, side in enumerate(patch, 2):
        target = target.unfold(axis, side, side)  # [B, C, D', H', W', pd, ph, pw]
    target = target.permute(0, 2, 3, 4, 5, 6, 7, 1).flatten(1, 3).flatten(2)[mask].view(pred.shape)
    if recipe.norm == "layernorm":
        target = F.layer_norm(target, target.shape[2:], eps=1e-6)
    return {"voxels": F.mse_loss(pred, target)}
