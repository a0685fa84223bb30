from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import blocks, linear, norm, parameters
from maefast.bench.peers.recipes.dmae import encoder_input
from maefast.data.annotated import AnnotatedBatch
from maefast.recipe import View

__all__ = ["batch", "reference"]


def batch(size: int) -> AnnotatedBatch:
    images = torch.randint(0, 256, (size, 3, 224, 224), dtype=torch.uint8)
    return AnnotatedBatch(images, torch.randint(0, 2, (size, 12)).float(), torch.randint(0, 41, (size,)))


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """FMAE-IAT (Ning et al., 2024), in eval mode. The reversed branch is a difference of two: its value is the second
    head's, its gradient for the features -lambda times."""
    p = parameters(recipe)
    x = encoder_input(p, "encoder.", view.parts, recipe.encoder.patch_embed.patch_size)
    x = blocks(x, p, "encoder.blocks.", recipe.encoder.blocks[0].attn.num_heads)[-1]
    found, scale = norm(x[:, 1:].mean(1), p, "norm"), recipe.reversal
    terms = {"units": linear(found, p, "heads.units")}
    if scale:
        turned = (1 + scale) * found.detach() - scale * found
        terms["subjects"] = linear(turned, p, "heads.subjects")
    return {name: F.binary_cross_entropy_with_logits(term, view.target[name]) for name, term in terms.items()}
