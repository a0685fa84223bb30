"""Point clouds as tokens: a group of neighbours around each of some far-apart centres (Point-BERT, Point-MAE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import ops
from maefast.nn.layers import Linear
from maefast.ops import TokenMask


class Groups(NamedTuple):
    """points: [B, G, K, 3], relative to the centre of their group, nearest first. centres: [B, G, 3]."""

    points: Tensor
    centres: Tensor


class PointScales(NamedTuple):
    """A hierarchy of groups, the finest first: those of a scale are made of the centres of the scale before, those of
    the first of the cloud's points.

    groups: of each scale. index: int64 [B, G, K] of each scale, which centres (or points) of the scale before are the
    members, nearest first.
    """

    groups: tuple[Groups, ...]
    index: tuple[Tensor, ...]


def group_points(points: Tensor, groups: int, size: int) -> Groups:
    """`groups` centres of each cloud [B, N, 3] by farthest-point sampling from the first point on, and the `size`
    points nearest to each. Groups may overlap."""
    return _grouped(points, groups, size)[0]


def point_scales(points: Tensor, groups: Sequence[int], sizes: Sequence[int]) -> PointScales:
    """`group_points` of a cloud [B, N, 3], of the centres found, of theirs, and so on, as Point-M2AE has it (Zhang et
    al., 2022).

    Args:
        groups, sizes: how many groups, of how many members, a number for each scale.

    Raises:
        ValueError: see `check_scales`.
    """
    check_scales(points.shape[1], groups, sizes)
    found, members = [], []
    for count, size in zip(groups, sizes):
        made, nearest = _grouped(points, count, size)
        found.append(made)
        members.append(nearest)
        points = made.centres
    return PointScales(tuple(found), tuple(members))


def check_scales(points: int, groups: Sequence[int], sizes: Sequence[int]) -> None:
    """ValueError: no scales, not as many sizes as scales, or groups that a scale has too few points for."""
    if not groups or len(groups) != len(sizes):
        raise ValueError(f"groups and sizes must name as many scales, at least one, got {groups} and {sizes}")
    for count, size in zip(groups, sizes):
        if not 0 < max(count, size) <= points or min(count, size) < 1:
            raise ValueError(f"{count} groups of {size} points do not fit {points} points")
        points = count


def flat_members(index: Tensor, count: int) -> Tensor:
    """int64 [B * G, K]: `index` [B, G, K] of `PointScales`, as places among all samples' `count` tokens."""
    start = torch.arange(len(index), device=index.device)[:, None, None] * count
    return (index + start).flatten(0, 1)


@torch.no_grad()
def _grouped(points: Tensor, groups: int, size: int) -> tuple[Groups, Tensor]:
    rows = torch.arange(len(points), device=points.device)
    centres = points[rows[:, None], ops.farthest_points(points, groups)]
    nearest = ops.knn(centres, points, size)[0]
    return Groups(points[rows[:, None, None], nearest] - centres[:, :, None], centres), nearest


class PointNet(nn.Module):
    """Groups as tokens: each member through two layers, the largest values of the group, and the same once more (Qi et
    al., 2017). Order of the members does not matter.

    Args:
        in_dim: of a member. dim: D, width of a token. widths: hidden of the first pair of layers, out of it, hidden of
            the second.
    """

    def __init__(self, in_dim: int, dim: int, widths: tuple[int, int, int] = (128, 256, 512)) -> None:
        super().__init__()
        first, middle, second = widths
        self.first_conv = nn.Sequential(Linear(in_dim, first), nn.BatchNorm1d(first), nn.ReLU(), Linear(first, middle))
        self.second_conv = nn.Sequential(
            Linear(2 * middle, second), nn.BatchNorm1d(second), nn.ReLU(), Linear(second, dim)
        )

    def tokens(self, members: Tensor, index: Tensor | None = None) -> Tensor:
        """[R, K, in_dim] -> [R, D]; or rows [S, in_dim], of which `index`, int64 [R, K], names the members of each
        group, so that the first layer runs once for each."""
        if index is None:
            count, size, _ = members.shape
            x = self.first_conv(members.flatten(0, 1))
        else:
            count, size = index.shape
            # embedding and not indexing: its backward adds in one order.
            x = self.first_conv[1:](F.embedding(index.flatten(), self.first_conv[0](members)))
        x = x.unflatten(0, (count, size))
        # The second layer takes [largest of the group | member]: the first half is the same for all members of it.
        of_group, of_member = self.second_conv[0].weight.split(x.shape[-1], 1)
        group = ops.linear(x.amax(1), of_group, self.second_conv[0].bias)
        x = ops.linear(x, of_member) + group[:, None]
        return self.second_conv[1:](x.flatten(0, 1)).unflatten(0, (count, size)).amax(1)


class PointEmbed(PointNet):
    """A `PointNet` of points, in the sizes of Point-MAE.

    Args:
        dim: D, width of a token.
        embed_all: groups that the plan hides are embedded too and then dropped, so that the statistics of the batch
            norms are those of all groups, as published; without, a masked step costs less and is not quite the same.
    """

    def __init__(self, dim: int, embed_all: bool = True) -> None:
        super().__init__(3, dim)
        self.embed_all = embed_all

    def forward(self, parts: Groups, plan: TokenMask | None = None) -> Tensor:
        """[B, G, D], or the visible groups: [B, keep, D], packed [T, D] for a ragged plan."""
        points = parts.points
        size = points.shape[2]
        early = plan is not None and not self.embed_all
        if early:
            points = ops.gather_tokens(points.flatten(2), plan).unflatten(-1, (size, 3))
        tokens = self.tokens(points.reshape(-1, size, 3)).unflatten(0, points.shape[:-2])
        return tokens if plan is None or early else ops.gather_tokens(tokens, plan)


class CentrePositions(nn.Sequential):
    """Positions of groups: two linear layers around a GELU, on their centres; parts (or centres) -> [B, G, D]."""

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__(Linear(3, hidden), nn.GELU(), Linear(hidden, dim))

    def forward(self, parts: Groups | Tensor) -> Tensor:
        return super().forward(parts if isinstance(parts, Tensor) else parts.centres)
