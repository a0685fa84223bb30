"""CLIP's image transformer (Radford et al., 2021, arXiv:2103.00020), of visible patches only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.nn.block import Packing
from maefast.nn.encoder import make_blocks, run_blocks, run_norm
from maefast.nn.layers import LayerNorm
from maefast.nn.patch_embed import pair, patch_grid
from maefast.ops import TokenMask


class ClipEncoder(nn.Module):
    """Patches without a bias, learned positions, a norm in front of the blocks and one behind them; blocks with
    `quick_gelu`. Names of CLIP's `visual`, but for the blocks (see `maefast.names.clip_blocks`).

    Args:
        img_size, patch_size: int or (height, width). embed_dim, depth, num_heads: of the transformer.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
    ) -> None:
        super().__init__()
        patch = pair("patch_size", patch_size)
        rows, columns = patch_grid(pair("img_size", img_size), patch)
        # A container of the weights: its own forward, over all patches, is never called.
        self.conv1 = nn.Conv2d(3, embed_dim, patch, stride=patch, bias=False)
        scale = embed_dim**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(embed_dim))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + rows * columns, embed_dim))
        self.ln_pre = LayerNorm(embed_dim, eps=1e-5)
        self.blocks = make_blocks(embed_dim, depth, num_heads, 4.0, 1e-5, activation="quick_gelu")
        self.ln_post = LayerNorm(embed_dim, eps=1e-5)
        for block in self.blocks:  # as CLIP starts them
            nn.init.normal_(block.attn.qkv.weight, std=scale)
            nn.init.zeros_(block.attn.qkv.bias)
            nn.init.zeros_(block.attn.proj.bias)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * embed_dim) ** -0.5)
            for last in (block.attn.proj, block.mlp.fc2):
                nn.init.normal_(last.weight, std=scale * (2 * max(depth, 1)) ** -0.5)

    def forward(self, images: Tensor, plan: TokenMask | None = None) -> Tensor:
        """Images [B, 3, H, W] -> [B, 1 + visible, D], class token first (packed for a ragged plan)."""
        lead, pos = self.positional_embedding.split([1, len(self.positional_embedding) - 1])
        prefix = self.class_embedding + lead
        x = ops.patch_embed(images, self.conv1.weight, None, plan, pos=pos, prefix=prefix)
        packing = Packing.of(plan, prefix=1) if plan is not None and plan.keep is None else None
        x = self.ln_pre(x, dtype=x.dtype)
        return run_norm(self.ln_post, *run_blocks(self.blocks, x, packing))
