"""Transformers on scales of point groups: `ScaleEncoder` from fine to coarse, `ScaleDecoder` back (Point-M2AE, Zhang et
al., NeurIPS 2022, arXiv:2205.14401).

The encoder sees visible groups only, of which every sample may have another number on each scale; they are packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import ops
from maefast.nn.block import Block, Packing
from maefast.nn.encoder import run_blocks
from maefast.nn.init import init_tokens_, init_weights_
from maefast.nn.layers import LayerNorm, Linear
from maefast.nn.point_groups import CentrePositions, PointEmbed, PointNet, PointScales, flat_members
from maefast.ops import TokenMask


class ScaleStage(nn.Module):
    """The blocks of one scale, with positions added to the input of each. rates: drop path of each block."""

    def __init__(self, dim: int, num_heads: int, rates: Sequence[float], eps: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads, eps=eps, bias="none", drop_path=rate) for rate in rates)

    def forward(self, x: Tensor, each: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
        """The output as a pending sum, see `maefast.nn.block`."""
        return run_blocks(self.blocks, x, packing, each=each)


def _stages(dims: Sequence[int], depths: Sequence[int], num_heads: int, drop_path: float, eps: float) -> nn.ModuleList:
    """A stage for each width; drop path rises linearly from 0 to the value given over the blocks of all of them."""
    if len(depths) != len(dims) or min(depths, default=0) < 1:
        raise ValueError(f"depths must name at least one block for each of {len(dims)} scales, got {list(depths)}")
    total = sum(depths)
    rates = iter([drop_path * i / max(total - 1, 1) for i in range(total)])
    return nn.ModuleList(
        ScaleStage(dim, num_heads, [next(rates) for _ in range(depth)], eps) for dim, depth in zip(dims, depths)
    )


class ScaleEncoder(nn.Module):
    """Blocks on the groups of the finest scale; then their members' tokens make the tokens of the next scale's groups
    (a `PointNet`), and so on.

    Args:
        dims, depths: widths and blocks of each scale, the finest first. num_heads: of all. drop_path: of the last
            block, 0 of the first, linear between.
        embed_all: groups that the plan hides become tokens too and are then dropped, so that the statistics of the
            batch norms are those of all groups, as published; see `PointEmbed`.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: int,
        drop_path: float = 0.0,
        embed_all: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.embed_all = embed_all
        self.embeds = nn.ModuleList([PointEmbed(dims[0], embed_all)])
        self.embeds.extend(PointNet(below, dim, (below, below, dim)) for below, dim in pairwise(dims))
        self.pos_embeds = nn.ModuleList(CentrePositions(dim, dim) for dim in dims)
        self.stages = _stages(dims, depths, num_heads, drop_path, norm_eps)
        self.norms = nn.ModuleList(LayerNorm(dim, eps=norm_eps) for dim in dims)

    def forward(self, scales: PointScales, plans: Sequence[TokenMask] | None = None) -> list[Tensor]:
        """Normed latents of each scale, [B, visible, D], packed [T, D] where a plan is ragged; [B, G, D] without plans.

        plans: one for each scale, the finest first. All members of a visible group are visible, as
        `maefast.masking.children` has it.
        """
        plans = [None] * len(self.stages) if plans is None else plans
        out, rows, below, width = [], None, None, 0
        for groups, index, plan, embed, positions, stage, norm in zip(
            *scales, plans, self.embeds, self.pos_embeds, self.stages, self.norms, strict=True
        ):
            batch, count, _ = groups.centres.shape
            early = plan is not None and not self.embed_all
            if rows is None:
                made = embed(groups, plan if early else None)
            else:
                index = flat_members(index, width)
                if early:  # rows are the visible ones
                    index = below.slot[index[plan.visible.long()]].long()
                made = embed.tokens(rows, index)
                if not early or plan.keep is not None:
                    made = made.unflatten(0, (batch, -1))
            x, centres = made, groups.centres
            if plan is not None:
                x, centres = made if early else ops.gather_tokens(made, plan), ops.gather_tokens(centres, plan)
            x, normed = norm(*stage(x, positions(centres), _packing(plan)))
            out.append(normed)
            below, width = plan, count
            rows = x.reshape(-1, x.shape[-1])
            if plan is not None and not early:  # what was not encoded stays as it was embedded
                rows = made.reshape(-1, x.shape[-1]).index_copy(0, plan.visible.long(), rows.to(made.dtype))
        return out


def _packing(plan: TokenMask | None) -> Packing | None:
    return None if plan is None or plan.keep is not None else Packing.of(plan)


def interpolation(fine: Tensor, coarse: Tensor, k: int = 3, eps: float = 1e-8) -> Tensor:
    """Weights [B, N, S] of coarse points [B, S, 3] at fine ones [B, N, 3]: 1 / (squared distance + eps) of the `k`
    nearest, divided by their sum; 0 of all others (PointNet++, Qi et al., 2017).

    As a matrix, because its product with features, and the gradient of that, add in a fixed order. No gradient flows to
    the points. Of fewer than `k` coarse points all count.

    Raises:
        TypeError, ValueError: see `maefast.ops.knn`.
    """
    index, away = ops.knn(fine, coarse, min(k, coarse.shape[1]))
    near = 1 / (away + eps)
    weights = (near / near.sum(2, keepdim=True)).to(fine.dtype)
    return weights.new_zeros(*fine.shape[:2], coarse.shape[1]).scatter(2, index, weights)


class Residual(nn.Module):
    """GELU(net2(net1(x)) + x) of rows; net1: linear, batch norm, GELU; net2: linear, batch norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net1 = nn.Sequential(Linear(dim, dim), nn.BatchNorm1d(dim), nn.GELU())
        self.net2 = nn.Sequential(Linear(dim, dim), nn.BatchNorm1d(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.net2(self.net1(x)) + x)


class FeaturePropagation(nn.Module):
    """From a coarse scale to a finer one: [latents of visible groups, or 0 | interpolated coarse states] through a
    linear layer, batch norm and GELU, then `depth` residual layers (PointNet++, Qi et al., 2017; PointMLP, Ma et al.,
    2022).

    Args:
        dim: of the finer scale's latents and of the result. coarse_dim: of the coarse states.
    """

    def __init__(self, dim: int, coarse_dim: int, depth: int = 1) -> None:
        super().__init__()
        self.dims = dim, coarse_dim
        self.fuse = nn.ModuleDict({"net": nn.Sequential(Linear(dim + coarse_dim, dim), nn.BatchNorm1d(dim), nn.GELU())})
        self.extraction = nn.ModuleDict({"operation": nn.Sequential(*(Residual(dim) for _ in range(depth)))})

    def forward(self, latent: Tensor, plan: TokenMask, coarse: Tensor, weights: Tensor) -> Tensor:
        """latent: of visible groups, [B, visible, dim] or packed. coarse: [B, S, coarse_dim]. weights: of
        `interpolation`, [B, N, S]. -> [B, N, dim]."""
        lift, *rest = self.fuse["net"]
        # A linear layer of interpolated states is the interpolation of fewer rows, and one of zeros is zero.
        own, of_coarse = (part.contiguous() for part in lift.weight.split(self.dims, 1))
        x = ops.restore_tokens(ops.linear(latent, own), plan, torch.zeros_like(lift.bias))
        x = x + weights.to(x.dtype) @ ops.linear(coarse, of_coarse).to(x.dtype) + lift.bias
        rows = nn.Sequential(*rest)(x.flatten(0, 1))
        return self.extraction["operation"](rows).view_as(x)


class ScaleDecoder(nn.Module):
    """Mask tokens and blocks on the coarsest scale; then `FeaturePropagation` and blocks on finer ones.

    Args:
        dims, depths: widths and blocks of each scale, the coarsest first; widths are those of the encoder's scales, of
            which the finest may be left out. num_heads, drop_path: as in `ScaleEncoder`. up_depths: residual layers of
            each propagation.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: int,
        up_depths: Sequence[int],
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if len(up_depths) != len(dims) - 1:
            raise ValueError(f"up_depths must name {len(dims) - 1} propagations, got {list(up_depths)}")
        self.mask_token = nn.Parameter(torch.empty(1, dims[0]))
        self.stages = _stages(dims, depths, num_heads, drop_path, norm_eps)
        self.pos_embeds = nn.ModuleList(CentrePositions(dim, dim) for dim in dims)
        self.props = nn.ModuleList(
            FeaturePropagation(dim, coarse, depth) for coarse, dim, depth in zip(dims, dims[1:], up_depths)
        )
        self.norm = LayerNorm(dims[-1], eps=norm_eps)
        init_tokens_(self.mask_token)
        init_weights_(self.stages)

    def forward(
        self, latents: Sequence[Tensor], plans: Sequence[TokenMask], scales: PointScales, up: Sequence[Tensor]
    ) -> Tensor:
        """Normed states [B, G, D] of all groups of the decoder's finest scale.

        latents, plans, scales: of the encoder. up: `interpolation` from each scale's successor to it, for the decoder's
        scales but the coarsest, the finest first.
        """
        x = ops.restore_tokens(latents[-1], plans[-1], self.mask_token)
        x = self._stage(0, x, scales)
        for level in range(1, len(self.stages)):
            at = -1 - level
            x = self.props[level - 1](latents[at], plans[at], x, up[at + 1])
            x = self._stage(level, x, scales)
        return self.norm(x)

    def _stage(self, level: int, x: Tensor, scales: PointScales) -> Tensor:
        x, delta = self.stages[level](x, self.pos_embeds[level](scales.groups[-1 - level]))
        return x + delta
