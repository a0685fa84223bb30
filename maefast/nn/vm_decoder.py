"""NViST's decoder (Jang & Agapito, CVPR 2024): one learned token, repeated for every cell of three planes and three
lines, looks at an image's tokens and at all cells in turn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maefast.nn.init import init_tokens_, init_weights_
from maefast.nn.layers import LayerNorm, Linear
from maefast.nn.modulated import ModulatedBlock, fourier
from maefast.nn.positions import sincos_1d


class VMDecoder(nn.Module):
    """Args:
        tokens: N of the image. resolution: R, of planes and lines. patch: of a cell, divides R. channels: C.
        dim, depth, num_heads: of the blocks, as wide as the image's tokens; even ones look at those, odd ones at all
            cells. camera: how many numbers condition every block. freqs: of their Fourier code.

    Attributes:
        cells: 3 (R / patch)^2 of planes, then 3 R / patch of lines.
    """

    def __init__(
        self,
        tokens: int,
        resolution: int = 48,
        patch: int = 3,
        channels: int = 32,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        camera: int = 2,
        freqs: int = 4,
    ) -> None:
        super().__init__()
        if resolution % patch:
            raise ValueError(f"resolution must be a multiple of patch, got {resolution} and {patch}")
        side = resolution // patch
        self.side, self.patch, self.freqs = side, patch, freqs
        self.cells = 3 * side * side + 3 * side
        self.output_token = nn.Parameter(torch.empty(1, 1, dim))
        # As published: positions of a grid of 3 side rows and side + 1 columns, row by row, in which neither cells of
        # planes, which have `side` columns, nor those of lines, which come last, stand where they lie.
        at = torch.arange(self.cells)
        table = torch.cat([sincos_1d(dim // 2, at % (side + 1) + 0.5), sincos_1d(dim // 2, at // (side + 1) + 0.5)], 1)
        table = torch.cat([torch.zeros(1, dim), table.float()])[None]
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        self.encoded_patches_pos_embed = nn.Parameter(torch.randn(1, tokens, dim) * 1e-2)
        self.camera_params_embed = nn.Sequential(
            Linear(camera * (1 + 2 * freqs), dim), nn.ReLU(), Linear(dim, dim)
        )  # fmt: skip
        self.blocks = nn.ModuleList(ModulatedBlock(dim, num_heads, cross=index % 2 == 0) for index in range(depth))
        self.decoder_out_norm, self.decoder_vector_norm = (
            nn.Sequential(LayerNorm(dim, eps=1e-6), nn.GELU()) for _ in range(2)
        )
        self.decoder_pred = nn.ModuleList(Linear(dim, patch * patch * channels) for _ in range(3))
        self.decoder_vector_pred = nn.ModuleList(Linear(dim, patch * channels) for _ in range(3))
        init_tokens_(self.output_token)
        init_weights_(self)

    def forward(self, latent: Tensor, camera: Tensor) -> tuple[Tensor, Tensor]:
        """latent [B, 1 + N, dim], class token first, camera [B, numbers] -> planes [B, 3, C, R, R] and lines
        [B, 3, C, R]."""
        first, image = latent[:, :1], latent[:, 1:] + self.encoded_patches_pos_embed
        x = torch.cat([first, self.output_token.expand(len(first), self.cells, -1)], 1) + self.decoder_pos_embed
        condition = self.camera_params_embed(torch.cat([camera, fourier(camera, self.freqs, torch.pi)], -1))
        for index, block in enumerate(self.blocks):
            x = block(x, condition, image if index % 2 == 0 else None)
        side, patch = self.side, self.patch
        planes, lines = x[:, 1:].split([3 * side * side, 3 * side], 1)
        planes, lines = self.decoder_out_norm(planes).chunk(3, 1), self.decoder_vector_norm(lines).chunk(3, 1)
        planes = torch.stack([head(part) for head, part in zip(self.decoder_pred, planes)], 1)
        lines = torch.stack([head(part) for head, part in zip(self.decoder_vector_pred, lines)], 1)
        planes = planes.unflatten(3, (patch, patch, -1)).unflatten(2, (side, side))  # [B, 3, side, side, p, p, C]
        planes = planes.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)
        lines = lines.unflatten(3, (patch, -1)).permute(0, 1, 4, 2, 3).flatten(3)
        return planes, lines
