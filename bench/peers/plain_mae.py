"""A plain eager masked autoencoder, as a user would write it from the paper: the baseline that maefast is timed and
tested against.

Written from He et al. (2021), with torch alone and no ops of maefast. Every patch is embedded by a strided convolution,
gathers use int64 indices expanded to the full width, the decoder un-shuffles by repeat, concatenation and gather, every
patch is predicted, and the target is materialised. Attention is torch's scaled_dot_product_attention. Parameter names
are those of the original, so weights move between this model and `maefast.models.MaskedAutoencoderViT` as a state dict.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sine_table(width: int, grid: tuple[int, int]) -> np.ndarray:
    """[1 + rows * columns, width]: zero for the class token, then columns (first half of the width) and rows."""
    rows, columns = grid
    quarter = width // 4
    frequency = 1.0 / 10000.0 ** (np.arange(quarter) / quarter)
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    parts = []
    for position in (x, y):
        angle = np.outer(position.ravel(), frequency)
        parts += [np.sin(angle), np.cos(angle)]
    return np.vstack([np.zeros((1, width)), np.hstack(parts)]).astype(np.float32)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = self.qkv(x).reshape(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, s, d))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchProjection(nn.Module):
    def __init__(self, patch: tuple[int, int], channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class PlainMAE(nn.Module):
    """Arguments as `maefast.models.MaskedAutoencoderViT`; build one from its config with `from_config`."""

    def __init__(
        self,
        img_size=(224, 224),
        patch_size=(16, 16),
        in_chans=3,
        embed_dim=768,
        depth=12,
        num_heads=12,
        decoder_embed_dim=512,
        decoder_depth=8,
        decoder_num_heads=16,
        mlp_ratio=4.0,
        norm_pix_loss=False,
        positions="sincos",
        norm_eps=1e-6,
    ) -> None:
        super().__init__()
        img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        self.patch, self.channels, self.norm_pix_loss = patch_size, in_chans, norm_pix_loss
        self.grid = (img_size[0] // patch_size[0], img_size[1] // patch_size[1])
        count = self.grid[0] * self.grid[1]
        learned = positions == "learned"

        self.patch_embed = PatchProjection(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + count, embed_dim), requires_grad=learned)
        self.blocks = nn.ModuleList(TransformerBlock(embed_dim, num_heads, mlp_ratio, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)

        width = decoder_embed_dim
        self.decoder_embed = nn.Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + count, width), requires_grad=learned)
        self.decoder_blocks = nn.ModuleList(
            TransformerBlock(width, decoder_num_heads, mlp_ratio, norm_eps) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=norm_eps)
        self.decoder_pred = nn.Linear(width, patch_size[0] * patch_size[1] * in_chans)

        for table in (self.pos_embed, self.decoder_pos_embed):
            if learned:
                nn.init.normal_(table, std=0.02)
            else:
                table.data.copy_(torch.from_numpy(sine_table(table.shape[-1], self.grid)))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    @classmethod
    def from_config(cls, config: dict) -> PlainMAE:
        """From the `config` of a maefast model."""
        return cls(**{key: value for key, value in config.items() if key != "name"})

    def patchify(self, images: Tensor) -> Tensor:
        b, (gh, gw), (ph, pw) = images.shape[0], self.grid, self.patch
        x = images.reshape(b, self.channels, gh, ph, gw, pw)
        return torch.einsum("bcipjq->bijpqc", x).reshape(b, gh * gw, ph * pw * self.channels)

    def random_masking(self, x: Tensor, mask_ratio: float, noise: Tensor | None):
        b, n, d = x.shape
        keep = int(n * (1 - mask_ratio))
        if noise is None:
            noise = torch.rand(b, n, device=x.device)
        shuffle = torch.argsort(noise, dim=1)
        restore = torch.argsort(shuffle, dim=1)
        x = torch.gather(x, 1, shuffle[:, :keep].unsqueeze(-1).expand(-1, -1, d))
        mask = torch.ones(b, n, device=x.device)
        mask[:, :keep] = 0
        return x, torch.gather(mask, 1, restore), restore

    def encode(
        self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> latents [B, 1 + keep, D], mask [B, N] with 1 where removed, ids_restore [B, N]."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        x, mask, restore = self.random_masking(x, mask_ratio, noise)
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, restore

    def forward(
        self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> loss, pred [B, N, K], mask [B, N] with 1 where removed."""
        x, mask, restore = self.encode(images, mask_ratio, noise)
        x = self.decoder_embed(x)
        b, n = restore.shape
        fill = self.mask_token.repeat(b, n + 1 - x.shape[1], 1)
        tokens = torch.cat([x[:, 1:], fill], dim=1)
        tokens = torch.gather(tokens, 1, restore.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]

        target = self.patchify(images)
        if self.norm_pix_loss:
            mean = target.mean(dim=-1, keepdim=True)
            var = target.var(dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        loss = ((pred - target) ** 2).mean(dim=-1)
        return (loss * mask).sum() / mask.sum(), pred, mask
