from __future__ import annotations

from torch import Tensor, nn

from maefast.bench.peers.plain import parameters
from maefast.bench.peers.recipes.videomae import batch, embedded, latents, predictions, targets
from maefast.recipe import View

__all__ = ["batch", "reference"]


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """VideoMAE V2 (Wang et al., 2023): mask tokens at every decoded position, a loss where the encoder was blind."""
    p, hidden, video = parameters(recipe), view.plan.mask, view.target
    visible, decoded = ~(hidden | view.plan.absent), hidden
    if view.again is not None:
        decoded = hidden.scatter(1, view.again, True)
    pred = predictions(p, recipe, latents(p, recipe, embedded(p, recipe, video), visible), visible, decoded)
    each = (pred - targets(recipe, video)[decoded].view(pred.shape)).square().mean(-1)
    counts = hidden[decoded].view(each.shape)
    return {"pixels": (each * counts).sum() / counts.sum()}
