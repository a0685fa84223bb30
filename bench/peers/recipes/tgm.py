from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import linear, parameters
from maefast.bench.peers.recipes.videomae import embedded, latents, predictions, targets
from maefast.data.captioned_clips import CaptionedClipBatch
from maefast.recipe import View


def batch(size: int) -> CaptionedClipBatch:
    clips = torch.randint(0, 256, (size, 3, 16, 224, 224), dtype=torch.uint8)
    return CaptionedClipBatch(clips, torch.randn(size, 512), torch.rand(size, 8, 196))


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """TGM (Fan et al., 2024)."""
    p, mask, video, text = parameters(recipe), view.plan.mask, view.target, view.text
    seen = latents(p, recipe, embedded(p, recipe, video), ~mask)
    pred = predictions(p, recipe, seen, ~mask, mask)
    terms = {"pixels": F.mse_loss(pred, targets(recipe, video)[mask].view(pred.shape))}
    if recipe.weight:
        clip = linear(seen.mean(1), p, "project") if "project.weight" in p else seen.mean(1)
        text = linear(text, p, "project_text") if "project_text.weight" in p else text
        cosines = F.cosine_similarity(clip[:, None], text[None], dim=-1) / recipe.temperature
        own = torch.arange(len(text), device=text.device)
        both = F.cross_entropy(cosines, own) + F.cross_entropy(cosines.t(), own)
        terms["contrast"] = recipe.weight * both / 2
    return terms
