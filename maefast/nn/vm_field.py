"""Radiance fields of planes and lines (vector-matrix factors of TensoRF: Chen et al., ECCV 2022, arXiv:2203.09517),
seen along rays; in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.nn.layers import Linear
from maefast.nn.modulated import fourier
from maefast.ops import _checks

PLANES = ((0, 1), (2, 0), (1, 2))  # (column, row) axes of each plane
LINES = (2, 1, 0)  # the axis of its line


class Rendered(NamedTuple):
    """colours: [B, N, 3]. depth: [B, N]. weights, middles, widths: of the samples, [B, N, S], [B, 1, S], [B, 1, S]."""

    colours: Tensor
    depth: Tensor
    weights: Tensor
    middles: Tensor
    widths: Tensor


def sample_vm(planes: Tensor, lines: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """What planes and lines hold at points, linearly between cells, zero outside.

    Args:
        planes: [B, 3, C, R, R]. lines: [B, 3, C, R]. points: [B, P, 3] in [-1, 1]; they get no gradient.

    Returns:
        Both as [B, 3, C, P].

    Raises:
        TypeError, ValueError: shapes do not fit.
    """
    _checks.tensor("planes", planes, ndim=5)
    _checks.tensor("lines", lines, ndim=4)
    _checks.tensor("points", points, ndim=3)
    if planes.shape[1] != 3 or lines.shape != planes.shape[:4] or points.shape[::2] != (len(planes), 3):
        raise ValueError(
            f"planes [B, 3, C, R, R], lines [B, 3, C, R] and points [B, P, 3] are wanted, "
            f"got {tuple(planes.shape)}, {tuple(lines.shape)} and {tuple(points.shape)}"
        )
    points = points.detach()
    on_planes = torch.stack([points[..., axes] for axes in PLANES], 1)  # [B, 3, P, 2]
    along = torch.stack([points[..., axis] for axis in LINES], 1)
    on_lines = torch.stack([torch.zeros_like(along), along], -1)
    found = []
    for values, where in ((planes, on_planes), (lines[..., None], on_lines)):
        read = F.grid_sample(values.flatten(0, 1), where.flatten(0, 1)[:, :, None], align_corners=False)
        found.append(read.squeeze(-1).unflatten(0, (-1, 3)))
    return found[0], found[1]


class VMRenderer(nn.Module):
    """Volume rendering of a field, density and colour:

        density = relu(sum over planes and channels of plane * line),  colour = MLP(plane * line, direction)
        weight_i = (1 - exp(-density_i width_i)) prod_{j<i} exp(-density_j width_j)

    Args:
        box: half of the side of the cube that the field fills, around the origin.
        density_dim, colour_dim: channels of each. hidden: of the MLPs. freqs: of directions.
    """

    def __init__(
        self, box: float = 0.8, density_dim: int = 8, colour_dim: int = 24, hidden: int = 64, freqs: int = 4
    ) -> None:
        super().__init__()
        self.box, self.split, self.freqs = box, (density_dim, colour_dim), freqs
        self.rgb_matrix = nn.Sequential(nn.GELU(), Linear(3 * colour_dim, hidden), nn.GELU())
        self.rgb_mlp = nn.Sequential(Linear(hidden + 3 + 6 * freqs, hidden), nn.GELU(), Linear(hidden, 3))

    def forward(self, planes: Tensor, lines: Tensor, origins: Tensor, directions: Tensor, edges: Tensor) -> Rendered:
        """planes [B, 3, C, R, R], lines [B, 3, C, R], origins and directions of unit length [B, N, 3], edges of the
        samples [B, S + 1], distances from the origins that do not fall."""
        middles, widths = (edges[:, 1:] + edges[:, :-1])[:, None] / 2, edges.diff(dim=1)[:, None]
        points = origins[:, :, None] + directions[:, :, None] * middles[..., None]  # [B, N, S, 3]
        plane, line = sample_vm(planes, lines, (points / self.box).flatten(1, 2))
        density, colour = (plane * line).split(self.split, 2)
        density = density.sum((1, 2)).relu().unflatten(1, points.shape[1:3])
        features = self.rgb_matrix(colour.flatten(1, 2).transpose(1, 2)).unflatten(1, points.shape[1:3])
        seen = torch.cat([fourier(directions, self.freqs), directions], -1)[:, :, None].expand(*points.shape[:3], -1)
        colours = self.rgb_mlp(torch.cat([features, seen.to(features)], -1)).to(density.dtype).sigmoid()
        alpha = 1 - torch.exp(-density * widths)
        passed = torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha[..., :-1] + 1e-10], -1).cumprod(-1)
        weights = alpha * passed
        depth = (weights * middles).sum(-1).detach()
        return Rendered((weights[..., None] * colours).sum(2), depth, weights, middles, widths)


def distortion(weights: Tensor, middles: Tensor, widths: Tensor) -> Tensor:
    """Mean over rays of sum_ij w_i w_j |m_i - m_j| + sum_i w_i^2 width_i / 3, which draws what a ray meets together
    (Mip-NeRF 360: Barron et al., CVPR 2022, arXiv:2111.12077), in linear time (Sun et al., CVPR 2022).

    Args:
        weights, middles, widths: of samples along rays, [..., S], or as many as are broadcast; middles in rising order.
    """
    moments = weights * middles
    before, moments_before = weights.cumsum(-1) - weights, moments.cumsum(-1) - moments
    apart = 2 * (moments * before - weights * moments_before).sum(-1)
    return (apart + (weights.square() * widths).sum(-1) / 3).mean()
