"""Point clouds as tokens: a group of neighbours around each of some far-apart centres (Point-BERT, Point-MAE)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.nn.layers import Linear
from maefast.ops import TokenMask


class Groups(NamedTuple):
    """points: [B, G, K, 3], relative to the centre of their group, nearest first. centres: [B, G, 3]."""

    points: Tensor
    centres: Tensor


@torch.no_grad()
def group_points(points: Tensor, groups: int, size: int) -> Groups:
    """`groups` centres of each cloud [B, N, 3] by farthest-point sampling from the first point on, and the `size`
    points nearest to each. Groups may overlap."""
    rows = torch.arange(len(points), device=points.device)
    centres = points[rows[:, None], ops.farthest_points(points, groups)]
    nearest = ops.knn(centres, points, size)[0]
    return Groups(points[rows[:, None, None], nearest] - centres[:, :, None], centres)


class PointEmbed(nn.Module):
    """A small PointNet: each point through two layers, the largest values of the group, and the same once more (Qi et
    al., 2017; sizes of Point-MAE). Order of the points in a group does not matter.

    Args:
        dim: D, width of a token.
        embed_all: groups that the plan hides are embedded too and then dropped, so that the statistics of the batch
            norms are those of all groups, as published; without, a masked step costs less and is not quite the same.
    """

    def __init__(self, dim: int, embed_all: bool = True) -> None:
        super().__init__()
        self.embed_all = embed_all
        self.first_conv = nn.Sequential(Linear(3, 128), nn.BatchNorm1d(128), nn.ReLU(), Linear(128, 256))
        self.second_conv = nn.Sequential(Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), Linear(512, dim))

    def forward(self, parts: Groups, plan: TokenMask | None = None) -> Tensor:
        """[B, G, D], or the visible groups: [B, keep, D], packed [T, D] for a ragged plan."""
        points = parts.points
        size = points.shape[2]
        early = plan is not None and not self.embed_all
        if early:
            points = ops.gather_tokens(points.flatten(2), plan).unflatten(-1, (size, 3))
        tokens = self._embed(points.reshape(-1, size, 3)).unflatten(0, points.shape[:-2])
        return tokens if plan is None or early else ops.gather_tokens(tokens, plan)

    def _embed(self, points: Tensor) -> Tensor:
        """[R, K, 3] -> [R, D]."""
        count, size, _ = points.shape
        x = self.first_conv(points.flatten(0, 1)).unflatten(0, (count, size))
        # The second layer takes [largest of the group | point]: the first half is the same for all points of it.
        of_group, of_point = self.second_conv[0].weight.split(256, 1)
        group = ops.linear(x.amax(1), of_group, self.second_conv[0].bias)
        x = ops.linear(x, of_point) + group[:, None]
        return self.second_conv[1:](x.flatten(0, 1)).unflatten(0, (count, size)).amax(1)


class CentrePositions(nn.Sequential):
    """Positions of groups: two linear layers around a GELU, on their centres; parts -> [B, G, D]."""

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__(Linear(3, hidden), nn.GELU(), Linear(hidden, dim))

    def forward(self, parts: Groups) -> Tensor:
        return super().forward(parts.centres)
