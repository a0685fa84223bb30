"""The ViT encoder of a masked autoencoder: visible tokens only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from maefast.nn.block import Block, Packing
from maefast.nn.init import init_tokens_, init_weights_
from maefast.nn.layers import LayerNorm
from maefast.nn.patch_embed import PatchEmbed, pair
from maefast.nn.positions import sincos_2d
from maefast.ops import TokenMask


def position_table(positions: str, width: int, grid: tuple[int, int]) -> nn.Parameter:
    """[1, 1 + N, width] with the class token's row first: frozen sine-cosine (that row zero), or learned."""
    if positions == "sincos":
        return nn.Parameter(sincos_2d(width, grid, prefix=1)[None], requires_grad=False)
    if positions == "learned":
        table = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], width))
        init_tokens_(table)
        return table
    raise ValueError(f"positions must be 'sincos' or 'learned', got {positions!r}")


def patch_grid(img_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of patches."""
    if any(size % patch for size, patch in zip(img_size, patch_size)):
        raise ValueError(f"image size {img_size} is not a multiple of the patch size {patch_size}")
    return img_size[0] // patch_size[0], img_size[1] // patch_size[1]


def run_blocks(
    blocks: Iterable[Block], x: Tensor, packing: Packing | None = None, recompute: bool = False
) -> tuple[Tensor, Tensor | None]:
    """x through all blocks, as a pending sum (x, delta); see `maefast.nn.block`.

    With `recompute`, blocks keep their input alone for the backward.
    """
    delta = None
    for block in blocks:
        pending = not block._forward_hooks  # a hook shall see the block's whole output
        x = block(x, packing, delta, pending, keep="nothing" if recompute else None)
        x, delta = x if pending else (x, None)
    return x, delta


def run_norm(norm: LayerNorm, x: Tensor, delta: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """norm(x + delta)."""
    return norm(x, dtype=dtype) if delta is None else norm(x, delta, dtype)[1]


def run_encoder(
    images: Tensor,
    plan: TokenMask | None,
    *,
    patch_embed: PatchEmbed,
    cls_token: Tensor,
    pos_embed: Tensor,
    blocks: Iterable[Block],
    norm: LayerNorm,
    recompute: bool = False,
    features: bool = False,
) -> Tensor:
    """Latents of the class token and the visible tokens: [B, 1 + keep, D], or packed [B + T, D] for a ragged plan.

    Under autocast they come in its dtype, for the matrix product that follows; as `features`, in that of the residual
    stream.
    """
    cls_pos, pos = pos_embed.split([1, pos_embed.shape[1] - 1], 1)
    x = patch_embed(images, plan, pos=pos, prefix=cls_token + cls_pos)
    packing = Packing.of(plan, prefix=1) if plan is not None and plan.keep is None else None
    x, delta = run_blocks(blocks, x, packing, recompute)
    return run_norm(norm, x, delta, x.dtype if features else None)


class Encoder(nn.Module):
    """A ViT without a head that computes visible tokens only (He et al., 2021). Parameter names of timm's ViT.

    Args:
        img_size, patch_size: int or (height, width). in_chans: any number.
        embed_dim, depth, num_heads, mlp_ratio: of the transformer.
        positions: "sincos" (frozen, MAE's) or "learned".
        norm_eps: of every LayerNorm.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        positions: str = "sincos",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.grid_size = patch_grid(pair("img_size", img_size), pair("patch_size", patch_size))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = position_table(positions, embed_dim, self.grid_size)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, norm_eps) for _ in range(depth))
        self.norm = LayerNorm(embed_dim, eps=norm_eps)
        init_tokens_(self.cls_token)
        init_weights_(self.blocks)

    def forward(self, images: Tensor, plan: TokenMask | None = None) -> Tensor:
        """images [B, C, H, W] -> [B, 1 + keep, D] (packed [B + T, D] for a ragged plan); all tokens without a plan."""
        return run_encoder(
            images,
            plan,
            patch_embed=self.patch_embed,
            cls_token=self.cls_token,
            pos_embed=self.pos_embed,
            blocks=self.blocks,
            norm=self.norm,
            features=True,
        )
