from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import blocks, linear, norm, parameters
from maefast.data.domains import DomainBatch
from maefast.recipe import View

ARGUMENTS = {"img_size": 512, "pseudo": "given"}


def batch(size: int) -> DomainBatch:
    images, target = torch.randint(0, 256, (2, size, 3, 512, 512), dtype=torch.uint8)
    labels, pseudo = torch.randint(0, 19, (2, size, 512, 512))
    return DomainBatch(images, labels, target, pseudo)


def conv(x: Tensor, p: Mapping[str, Tensor], name: str, **how: int) -> Tensor:
    return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **how)


def over_channels(x: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
    return norm(x.permute(0, 2, 3, 1), p, name).permute(0, 3, 1, 2)


def pyramid(p: Mapping[str, Tensor], x: Tensor, strides: Sequence[int]) -> list[Tensor]:
    maps = []
    for i, (before, stride) in enumerate(zip((1, *strides), strides)):
        name, step = f"encoder.stages.{i}", stride // before
        x = conv(x, p, f"{name}.down", stride=step, padding=step - 1)
        x = F.gelu(F.group_norm(x, 1, p[f"{name}.norm.weight"], p[f"{name}.norm.bias"]))
        x = x + conv(F.gelu(conv(x, p, f"{name}.conv1", padding=1)), p, f"{name}.conv2", padding=1)
        maps.append(x)
    return maps


def head(p: Mapping[str, Tensor], maps: Sequence[Tensor]) -> Tensor:
    size = maps[0].shape[2:]
    parts = [F.interpolate(conv(x, p, f"decoder.laterals.{i}"), size, mode="bilinear") for i, x in enumerate(maps)]
    return conv(F.gelu(conv(F.gelu(sum(parts)), p, "decoder.mix", padding=1)), p, "decoder.pred")


def rebuilt(p: Mapping[str, Tensor], recipe: nn.Module, maps: Sequence[Tensor], hidden: Tensor) -> list[Tensor]:
    """As the authors' code blends: maps times a mask of ones and zeros."""
    heads, keep = recipe.rebuilder.blocks[0].attn.num_heads, (~hidden)[:, None].to(maps[0].dtype)
    x = linear(maps[-1].permute(0, 2, 3, 1), p, "rebuilder.embed").permute(0, 3, 1, 2)
    x = F.interpolate(x, recipe.grid, mode="bilinear")
    x = x * keep + (1 - keep) * p["rebuilder.mask_token"].view(1, -1, 1, 1)
    x = x.flatten(2).transpose(1, 2) + p["rebuilder.pos_embed"]
    x = norm(blocks(x, p, "rebuilder.blocks.", heads, eps=1e-5)[-1], p, "rebuilder.norm", 1e-5)
    z, out = x.transpose(1, 2).unflatten(2, recipe.grid), []
    for i, given in enumerate(maps):
        name = f"rebuilder.projectors.{i}"
        last, x = max(int(key.split(".")[3]) for key in p if key.startswith(f"{name}.")), z
        for layer in range(0, last - 1, 3):
            weight, bias = p[f"{name}.{layer}.weight"], p[f"{name}.{layer}.bias"]
            x = F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
            if layer + 3 < last - 1:
                x = F.gelu(over_channels(x, p, f"{name}.{layer + 1}"))
        x = over_channels(conv(x, p, f"{name}.{last - 1}"), p, f"{name}.{last}")
        mask = F.interpolate(keep, given.shape[2:], mode="nearest")
        out.append(given * mask + x * (1 - mask))
    return out


def loss(logits: Tensor, labels: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    seen = labels != 255
    each = -logits.log_softmax(1).gather(1, labels.clamp_max(logits.shape[1] - 1)[:, None])[:, 0]
    return (each * seen * weight).mean()


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """MFM (Zhou et al., 2025), with the default encoder and decoder."""
    p, (source, target), (labels, pseudo, weight) = parameters(recipe), view.parts, view.target
    strides = [source.shape[2] // (recipe.grid[0] * scale) for scale in recipe.rebuilder.scales]
    maps = pyramid(p, target, strides)
    return {
        "source": loss(head(p, pyramid(p, source, strides)), labels),
        "target": recipe.uda * loss(head(p, maps), pseudo, weight),
        "rebuilt": recipe.mfm * loss(head(p, rebuilt(p, recipe, maps, view.plan)), pseudo, weight),
    }
