from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import below, block, blocks, linear, norm, parameters
from maefast.data.audiovisual import AudioVisualBatch
from maefast.recipe import View


def batch(size: int) -> AudioVisualBatch:
    clips = torch.randint(0, 256, (size, 3, 16, 160, 160), dtype=torch.uint8)
    return AudioVisualBatch(clips, torch.randn(size, 1, 256, 128) * 4 - 4)


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """HiCMAE (Sun et al., 2024)."""
    p, heads = parameters(recipe), recipe.encoder.blocks[0].attn.num_heads
    names, masks = ("", "_audio"), [None if plan is None else plan.mask for plan in view.plan]
    latents, states, terms = [None, None], [None, None], {}
    for i, (name, x, mask) in enumerate(zip(names, view.parts, masks)):
        if x is not None:
            latents[i], states[i] = encoded(below(p, f"encoder{name}."), x, mask, heads, recipe.taps)
    if None not in view.parts:
        terms["contrast"] = torch.zeros(()).to(latents[0])
        for one, other in zip(*states):
            one, other = (t.mean(1) / t.mean(1).norm(dim=1, keepdim=True) for t in (one, other))
            scores, labels = one @ other.T / recipe.temperature, torch.arange(len(one), device=one.device)
            both = F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)
            terms["contrast"] = terms["contrast"] + recipe.contrast * both / 2
        for i in range(len(recipe.fusion.streams[0]["blocks"])):
            a, b = (below(p, f"fusion.streams.{s}.blocks.{i}.") for s in (0, 1))
            latents = [crossed(latents[0], latents[1], a, heads), crossed(latents[1], latents[0], b, heads)]
        latents = [norm(x, p, f"fusion.streams.{s}.norm") for s, x in enumerate(latents)]
    targets = [view.target if masks[0] is None else in_pairs(recipe, view.parts[0] * p["std"] + p["mean"], masks[0])]
    if view.parts[1] is not None:
        ph, pw = recipe.patch_size
        rows = view.parts[1][:, 0].unfold(1, ph, ph).unfold(2, pw, pw).flatten(1, 2).flatten(2)[..., None]
        targets.append(normalised(rows, recipe.norm)[masks[1]].flatten(1))
    for i, term in enumerate(("clips", "sound")):
        if latents[i] is not None:
            pred = decoded(below(p, f"decoder{names[i]}."), latents[i], states[i], masks[i], recipe)
            terms[term] = F.mse_loss(pred, targets[i].view(pred.shape))
    return terms


def encoded(
    p: Mapping[str, Tensor], x: Tensor, mask: Tensor, heads: int, taps: tuple[int, ...]
) -> tuple[Tensor, list[Tensor]]:
    convolve, kernel = (F.conv3d if x.ndim == 5 else F.conv2d), p["patch_embed.proj.weight"]
    x = convolve(x, kernel, p["patch_embed.proj.bias"], stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
    x = (x + p["pos_embed"])[~mask].view(len(x), -1, x.shape[2])
    found = [norm(state, p, "norm") for state in blocks(x, p, "blocks.", heads)]
    return found[-1], [found[tap] for tap in taps]


def crossed(x: Tensor, context: Tensor, p: Mapping[str, Tensor], heads: int) -> Tensor:
    """Cross-attention, then a block."""
    y, c = norm(x, p, "cross_norm1"), norm(context, p, "cross_norm2")
    q = F.linear(y, p["cross_attn.q.weight"], p["cross_attn.q_bias"])
    shift = torch.cat([torch.zeros_like(p["cross_attn.v_bias"]), p["cross_attn.v_bias"]])
    k, v = F.linear(c, p["cross_attn.kv.weight"], shift).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return block(x + linear(y, p, "cross_attn.proj"), p, heads)


def decoded(p: Mapping[str, Tensor], latent: Tensor, states: list[Tensor], mask: Tensor, recipe: nn.Module) -> Tensor:
    heads, size = recipe.decoder.blocks[0].attn.num_heads, len(latent)
    pos = p["pos_embed"].expand(size, -1, -1)
    shown, hidden = (pos[which].view(size, -1, pos.shape[2]) for which in (~mask, mask))
    x = torch.cat([linear(latent, p, "embed") + shown, p["mask_token"] + hidden], 1)
    x = block(x, below(p, "blocks.0."), heads)
    for i, state in enumerate(reversed(states), 1):
        x = crossed(x, linear(state, p, "embed") + shown, below(p, f"blocks.{i}."), heads)
    return linear(norm(x[:, -hidden.shape[1] :], p, "norm"), p, "pred")


def normalised(values: Tensor, how: str) -> Tensor:
    """[..., values, C], each channel."""
    if how == "none":
        return values
    return (values - values.mean(-2, keepdim=True)) / (values.var(-2, keepdim=True).sqrt() + 1e-6)


def in_pairs(recipe: nn.Module, clips: Tensor, mask: Tensor) -> Tensor:
    """Hidden tubelets of clips whose frames, but for the first of a group, are what they differ by from it."""
    (pt, ph, pw), _, group = recipe.groups
    x = clips.unfold(2, pt, pt).unfold(3, ph, ph).unfold(4, pw, pw)  # [B, C, T', H', W', pt, ph, pw]
    x = normalised(x.permute(0, 2, 3, 4, 5, 6, 7, 1).flatten(4, 6), recipe.norm)
    x = x.unflatten(4, (pt, ph, pw)).permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(1, 2)  # [B, T, H', ph, W', pw, C]
    diff = x.clone()
    for t in range(x.shape[1]):
        if t % group:
            diff[:, t] = x[:, t] - x[:, t // group * group]
    x = diff.unflatten(1, (-1, pt)).permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(1, 3).flatten(2)
    return x[mask]
