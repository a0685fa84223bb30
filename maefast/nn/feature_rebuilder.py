"""Cells of an encoder's feature maps are hidden and made anew from the others (Zhou et al., 2025, arXiv:2509.13801)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.nn.encoder import make_blocks, run_blocks, run_norm
from maefast.nn.init import init_tokens_, init_weights_
from maefast.nn.layers import LayerNorm, Linear
from maefast.nn.positions import sincos_2d
from maefast.ops import _checks

SCALES = (1, 2, 4, 8)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W], at each place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeatureRebuilder(nn.Module):
    """The Rebuilder of MFM (later MRM): tokens of the last map on a grid, a learned token at the hidden cells, a few
    transformer blocks; from these every map is made anew where it is hidden,

        z = blocks(where(mask, token, embed(f_last)) + positions);  g_i = where(mask, project_i(z), f_i)

    It stands between any encoder and decoder while they are trained, and is left out afterwards.

    Args:
        channels: of the maps, one or more, the last of which makes the tokens. scales: side of each map over that of
            the grid: 1, 2, 4 or 8. grid: (rows, columns) of cells. The last map is resized to it (bilinear) if its
            scale is not 1.
        embed_dim, depth, num_heads, mlp_ratio, norm_eps: of the transformer.

    Raises:
        ValueError: not as many scales as channels, or a scale that is not known.
    """

    def __init__(
        self,
        channels: Sequence[int],
        scales: Sequence[int],
        grid: tuple[int, int] = (16, 16),
        embed_dim: int = 512,
        depth: int = 2,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if not channels or len(channels) != len(scales) or any(scale not in SCALES for scale in scales):
            raise ValueError(f"channels and scales (1, 2, 4 or 8) must be of the same maps, got {channels}, {scales}")
        self.channels, self.scales, self.grid = tuple(channels), tuple(scales), _checks.grid("grid", grid)
        self.embed = Linear(channels[-1], embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        # As in the authors' code the first half of the width encodes the row, where MAE's encodes the column.
        positions = sincos_2d(embed_dim, self.grid).roll(embed_dim // 2, 1)
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = make_blocks(embed_dim, depth, num_heads, mlp_ratio, norm_eps)
        self.norm = LayerNorm(embed_dim, eps=norm_eps)
        init_tokens_(self.mask_token)
        init_weights_(self)
        self.projectors = nn.ModuleList(projector(embed_dim, *of) for of in zip(channels, scales))

    def forward(self, maps: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        """Maps [B, C_i, rows * s_i, columns * s_i] and bool [B, rows, columns], True where hidden -> maps of the same
        shapes, bit by bit the same where nothing is hidden."""
        self._check(maps, mask)
        x = self.embed(maps[-1].flatten(2).transpose(1, 2))
        if self.scales[-1] != 1:
            x = x.transpose(1, 2).unflatten(2, maps[-1].shape[2:])
            x = F.interpolate(x, self.grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
        x = torch.where(mask.flatten(1)[..., None], self.mask_token.to(x.dtype), x) + self.pos_embed
        x = run_norm(self.norm, *run_blocks(self.blocks, x), dtype=x.dtype)
        x = x.transpose(1, 2).unflatten(2, self.grid)
        return [
            # The map comes first: the result then has its memory format, and so have the convolutions behind it.
            torch.where(~_enlarged(mask, scale)[:, None], given, project(x).to(given.dtype))
            for given, project, scale in zip(maps, self.projectors, self.scales)
        ]

    def _check(self, maps: Sequence[Tensor], mask: Tensor) -> None:
        if len(maps) != len(self.channels):
            raise ValueError(f"maps must be {len(self.channels)}, got {len(maps)}")
        for index, (given, channels, scale) in enumerate(zip(maps, self.channels, self.scales)):
            _checks.tensor(f"maps[{index}]", given, ndim=4)
            want = (channels, *(side * scale for side in self.grid))
            if tuple(given.shape[1:]) != want:
                raise ValueError(f"maps[{index}] must be [B, {', '.join(map(str, want))}], got {tuple(given.shape)}")
        _checks.tensor("mask", mask, ndim=3, floating=False)
        if mask.dtype is not torch.bool or tuple(mask.shape) != (len(maps[-1]), *self.grid):
            want = [len(maps[-1]), *self.grid]
            raise ValueError(f"mask must be bool {want}, True where hidden, got {mask.dtype} {tuple(mask.shape)}")


def projector(width: int, channels: int, scale: int) -> nn.Sequential:
    """From the grid to a map `scale` times as large: transposed convolutions of 4 x 4 at stride 2, a convolution of 1 x
    1, a norm over the channels."""
    widths = {1: [], 2: [width // 2], 4: [width // 2, width // 4], 8: [width // 2, width // 4, width // 4]}[scale]
    layers: list[nn.Module] = []
    for step, out in enumerate(widths):
        if step:
            layers += [ChannelNorm(width, eps=1e-6), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, out, 4, 2, 1))
        width = out
    return nn.Sequential(*layers, nn.Conv2d(width, channels, 1), ChannelNorm(channels, eps=1e-6))


def _enlarged(mask: Tensor, scale: int) -> Tensor:
    """[B, rows, columns] -> [B, rows * scale, columns * scale]."""
    return mask if scale == 1 else mask.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
