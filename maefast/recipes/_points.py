"""What recipes of point clouds share: groups as tokens, the distance of hidden groups, a picture of clouds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.data.points import PointBatch, Points, Scatter
from maefast.nn import Groups, group_points
from maefast.ops import TokenMask
from maefast.recipe import Recipe

DEMO = {
    "model_args": {
        "points": 512, "groups": 32, "group_size": 16, "embed_dim": 96, "depth": 4, "num_heads": 3, "decoder_depth": 2,
        "decoder_num_heads": 3, "drop_path": 0.0,
    },
    "steps": 300, "batch_size": 16, "lr": 1e-3, "warmup": 0.1, "picture_rows": 4,
}  # fmt: skip
TRAINING = {"lr": 1e-3, "betas": (0.9, 0.999), "epochs": 300, "warmup": 1 / 30, "batch_size": 128}


class GroupedPoints(Recipe):
    """Clouds of N `points` in G `groups` of K points, `group_size`. ValueError: they do not fit."""

    def __init__(self, points: int, groups: int, group_size: int) -> None:
        super().__init__()
        if not 0 < max(groups, group_size) <= points:
            raise ValueError(f"{groups} groups of {group_size} points do not fit clouds of {points}")
        self.wants, self.groups, self.group_size = Points(points), groups, group_size

    def cloud(self, batch: PointBatch) -> Tensor:
        self.wants.check(batch)
        return batch.points.to(next(self.parameters()).dtype)

    def parts(self, batch: PointBatch) -> Groups:
        return group_points(self.cloud(batch), self.groups, self.group_size)

    def distance(self, pred: Tensor, parts: Groups, plan: TokenMask) -> Tensor:
        """Chamfer distance of predicted hidden groups, in plan order, to the true ones."""
        true = ops.gather_tokens(parts.points.flatten(2), plan, "masked")
        pred, true = (groups.reshape(-1, self.group_size, 3) for groups in (pred, true))
        return ops.chamfer(pred.to(true.dtype), true)

    def mean_group(self, parts: Groups, plan: TokenMask) -> Tensor:
        """The mean of all groups, point by point in the order of their distances, for every hidden one."""
        return parts.points.mean((0, 1)).flatten().expand(plan.total_masked, -1)

    def scatter(self, pred: Tensor, parts: Groups, plan: TokenMask, names: Sequence[str]) -> Scatter:
        """Original, visible and predicted groups."""
        points, centres = parts
        seen, hidden = (ops.gather_tokens(centres, plan, which) for which in ("visible", "masked"))
        visible = ops.gather_tokens(points.flatten(2), plan).unflatten(2, (-1, 3)) + seen[:, :, None]
        made = pred.unflatten(-1, (-1, 3)) + hidden[:, :, None]
        clouds = [found.flatten(1, 2) for found in (points + centres[:, :, None], visible, made)]
        share = plan.total_masked / (plan.batch * plan.num_tokens)
        return Scatter(
            dict(zip(("original", "visible", "reconstruction"), clouds)), names, f"{share:.0%} of the groups masked"
        )

    def scatter_in_place(
        self, pred: Tensor, parts: Groups, plan: TokenMask, names: Sequence[str], caption: str
    ) -> Scatter:
        """All groups, the visible ones, and all with the hidden ones as predicted; of plans in order of position, which
        may be ragged."""
        points, centres = parts
        hidden = plan.mask[..., None, None]
        columns = {
            "original": points,
            "visible": points.masked_fill(hidden, torch.nan),
            "reconstruction": points.masked_scatter(hidden, pred.to(points.dtype)),
        }
        clouds = {name: (found + centres[:, :, None]).flatten(1, 2) for name, found in columns.items()}
        return Scatter(clouds, names, caption)


def start_as_published(module: nn.Module) -> None:
    """Linear layers of an encoder: normal, truncated, of standard deviation 0.02. (Decoders start as MAE's.)"""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
