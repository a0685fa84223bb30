from __future__ import annotations

from torch import Tensor, nn

from maefast.bench.peers.plain import parameters
from maefast.bench.peers.recipes.dmae import autoencoder, batch, patches
from maefast.recipe import View

__all__ = ["batch", "reference"]


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """MAE (He et al., 2021) with a mask that is there."""
    model, plan = recipe.model, view.plan
    _, pred = autoencoder(parameters(recipe), "model.", model, view.parts, plan.ids_keep, plan.ids_restore)
    target = patches(view.parts, model.patch_size)
    if model.norm_pix_loss:
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    error = (pred - target).square().mean(2)
    return {"pixels": (error * plan.mask).sum() / plan.mask.sum()}
