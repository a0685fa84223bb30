"""The encoder of ConvMAE (Gao et al., NeurIPS 2022, arXiv:2205.03892): two stages of masked convolutions at strides 4
and 8, then a transformer on tokens of 16 x 16 pixels. All of it on visible tokens: the stages run on packed cells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.nn.block import Packing
from maefast.nn.cells import Cells
from maefast.nn.encoder import make_blocks, position_table, run_blocks, run_norm
from maefast.nn.init import init_weights_
from maefast.nn.layers import LayerNorm, Linear
from maefast.ops import CellMask, TokenMask

STRIDES = (4, 2, 2)
PATCH = 16
EPS = 1e-5  # of the LayerNorms of the stages


class ConvEmbed(nn.Module):
    """A strided convolution without overlap, LayerNorm, GELU."""

    def __init__(self, in_chans: int, width: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, stride, stride=stride)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor | Cells) -> Tensor | Cells:
        return F.gelu(_over_channels(self.norm, self.proj(x)))


class ConvMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor | Cells) -> Tensor | Cells:
        return self.fc2(F.gelu(self.fc1(x)))


class ConvBlock(nn.Module):
    """``x += conv2(attn(mask * conv1(norm1(x)))); x += mlp(norm2(x))`` with a 5 x 5 depthwise convolution `attn`.

    On `Cells`, that multiplication is in the convolution, which reads zeros at masked sites.
    """

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor | Cells) -> Tensor | Cells:
        x = x + self.conv2(self.attn(self.conv1(_over_channels(self.norm1, x))))
        return x + self.mlp(_over_channels(self.norm2, x))


class ConvViT(nn.Module):
    """Args:
        grid: (rows, columns) of tokens of 16 x 16 pixels. in_chans: C.
        conv_dims, conv_depths: widths and blocks of the two stages. conv_mlp_ratio: of their MLPs.
        embed_dim, depth, num_heads, mlp_ratio: of the transformer. norm_eps: of its LayerNorms.

    Parameter names are those of the authors' code.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        in_chans: int = 3,
        conv_dims: Sequence[int] = (256, 384),
        conv_depths: Sequence[int] = (2, 2),
        embed_dim: int = 768,
        depth: int = 11,
        num_heads: int = 12,
        conv_mlp_ratio: float = 8.0,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if len(conv_dims) != 2 or len(conv_depths) != 2:
            raise ValueError(f"conv_dims and conv_depths must be of two stages, got {conv_dims} and {conv_depths}")
        (first, second), self.grid = conv_dims, grid
        self.patch_embed1 = ConvEmbed(in_chans, first, STRIDES[0])
        self.patch_embed2 = ConvEmbed(first, second, STRIDES[1])
        self.patch_embed3 = ConvEmbed(second, embed_dim, STRIDES[2])
        self.patch_embed4 = Linear(embed_dim, embed_dim)
        self.stage1_output_decode = nn.Conv2d(first, embed_dim, 4, stride=4)
        self.stage2_output_decode = nn.Conv2d(second, embed_dim, 2, stride=2)
        self.pos_embed = position_table("sincos", embed_dim, grid, prefix=0)
        self.blocks1, self.blocks2 = (
            nn.ModuleList(ConvBlock(dim, conv_mlp_ratio) for _ in range(count))
            for dim, count in zip(conv_dims, conv_depths)
        )
        self.blocks3 = make_blocks(embed_dim, depth, num_heads, mlp_ratio, norm_eps)
        self.norm = LayerNorm(embed_dim, eps=norm_eps)
        init_weights_(self)
        nn.init.xavier_uniform_(self.patch_embed3.proj.weight.view(embed_dim, -1))

    def forward(
        self,
        images: Tensor,
        plan: TokenMask | None = None,
        taps: dict[int, Tensor | None] | None = None,
        features: bool = True,
    ) -> Tensor:
        """Images [B, C, H, W] -> latents of the visible tokens in plan order, [B, keep, D], or packed [T, D] for a
        ragged plan; of all tokens without one. `taps` (of the transformer) and `features`: see `run_encoder`."""
        size = tuple(side * PATCH for side in self.grid)
        if images.ndim != 4 or tuple(images.shape[2:]) != size:
            raise ValueError(f"images must be [B, C, {size[0]}, {size[1]}], got {tuple(images.shape)}")
        x = images if plan is None else Cells.pack(images, CellMask(plan, self.grid))
        x = _through(self.blocks1, self.patch_embed1(x))
        skip = _tokens(self.stage1_output_decode(x))
        x = _through(self.blocks2, self.patch_embed2(x))
        skip = skip + _tokens(self.stage2_output_decode(x))
        x = self.patch_embed4(_tokens(self.patch_embed3(x)))
        x = x + (self.pos_embed if plan is None else _of_visible(self.pos_embed, plan))
        packing = Packing.of(plan) if plan is not None and plan.keep is None else None
        x, delta = run_blocks(self.blocks3, x, packing, taps=taps)
        return run_norm(self.norm, x if delta is None else x + delta, skip, x.dtype if features else None)


def _over_channels(norm: nn.LayerNorm, x: Tensor | Cells) -> Tensor | Cells:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _through(blocks: nn.ModuleList, x: Tensor | Cells) -> Tensor | Cells:
    for block in blocks:
        x = block(x)
    return x


def _tokens(x: Tensor | Cells) -> Tensor:
    """Of a map with one site for each token: [B, N, D], or of cells those of the plan, [B, keep, D] or [T, D]."""
    if isinstance(x, Cells):
        keep = x.plan.tokens.keep
        return x.rows.flatten(0, 2) if keep is None else x.rows.view(x.plan.batch, keep, -1)
    return x.flatten(2).transpose(1, 2)


def _of_visible(table: Tensor, plan: TokenMask) -> Tensor:
    """Rows of [1, N, D] in plan order, [B, keep, D] or packed [T, D]."""
    rows = table[0][torch.remainder(plan.visible.long(), plan.num_tokens)]
    return rows if plan.keep is None else rows.view(plan.batch, plan.keep, -1)
