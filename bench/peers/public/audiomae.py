"""The structure of AudioMAE's MaskedAutoencoderViT (Huang et al., 2022), from a description.

MAE of spectrograms [B, 1, T, F]: `forward_encoder` takes `mask_2d` and returns four values, `forward_decoder` returns
three, the loss takes `norm_pix_loss`. Decoder blocks are global (`decoder_mode` 0), or attend within windows and see no
class token (1). The original makes its last output, a zero, on the GPU alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maefast.bench.peers.public.mae import Attention, Block, Mlp
from maefast.bench.peers.public.mae import MaskedAutoencoderViT as MAE


class PatchEmbed(nn.Module):
    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size, self.patch_size = tuple(img_size), (patch_size, patch_size)
        self.patch_hw = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.patch_hw[0] * self.patch_hw[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class WindowBlock(nn.Module):
    """Attention within windows of the grid, which may be shifted."""

    def __init__(
        self, dim: int, num_heads: int, feat_size: tuple[int, int], window_size: tuple[int, int], shift: int
    ) -> None:
        super().__init__()
        self.feat_size, self.window_size, self.shift_size = feat_size, window_size, shift
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def windows(self, x: Tensor) -> Tensor:
        (h, w), (a, b) = self.feat_size, self.window_size
        x = self.norm1(x).unflatten(1, (h, w)).roll(-self.shift_size, 1)
        x = x.unflatten(2, (w // b, b)).unflatten(1, (h // a, a)).transpose(2, 3)
        x = self.attn(x.reshape(-1, a * b, x.shape[-1])).view(x.shape).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2).roll(self.shift_size, 1).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.windows(x)
        return x + self.mlp(self.norm2(x))


class MaskedAutoencoderViT(nn.Module):
    def __init__(
        self,
        img_size: tuple[int, int] = (1024, 128),
        patch_size: int = 16,
        in_chans: int = 1,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = True,
        decoder_mode: int = 0,
        mask_2d: bool = False,
        mask_t_prob: float = 0.6,
        mask_f_prob: float = 0.5,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        tokens = 1 + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        width = decoder_embed_dim
        self.decoder_embed = nn.Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, width), requires_grad=False)
        self.decoder_mode = decoder_mode
        grid = self.patch_embed.patch_hw
        self.decoder_blocks = nn.ModuleList(
            WindowBlock(width, decoder_num_heads, grid, (4, 4), i % 2 * 2)
            if decoder_mode
            else Block(width, decoder_num_heads, mlp_ratio)
            for i in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, patch_size**2 * in_chans)
        self.norm_pix_loss = norm_pix_loss
        self.mask_2d, self.mask_t_prob, self.mask_f_prob = mask_2d, mask_t_prob, mask_f_prob
        for parameter in (self.cls_token, self.mask_token, self.pos_embed, self.decoder_pos_embed):
            nn.init.normal_(parameter, std=0.02)

    patchify, random_masking = MAE.patchify, MAE.random_masking

    def random_masking_2d(self, x: Tensor, mask_t_prob: float, mask_f_prob: float) -> tuple[Tensor, Tensor, Tensor]:
        """Whole rows and columns of the grid are masked."""
        N, _, D = x.shape
        time, freq = self.patch_embed.patch_hw
        left = [int(time * (1 - mask_t_prob)), int(freq * (1 - mask_f_prob))]
        ranks = [torch.rand(N, size, device=x.device).argsort(1).argsort(1) for size in (time, freq)]
        rows, columns = (rank >= count for rank, count in zip(ranks, left))
        mask = (rows[:, :, None] | columns[:, None]).flatten(1)
        ids_shuffle = mask.to(x.dtype).argsort(dim=1, stable=True)
        kept = x.gather(1, ids_shuffle[:, : left[0] * left[1], None].expand(-1, -1, D))
        return kept, mask.to(torch.get_default_dtype()), ids_shuffle.argsort(1)

    def forward_encoder(self, x: Tensor, mask_ratio: float, mask_2d: bool = False):
        x = self.patch_embed(x) + self.pos_embed[:, 1:]
        if mask_2d:
            x, mask, ids_restore = self.random_masking_2d(x, self.mask_t_prob, self.mask_f_prob)
        else:
            x, mask, ids_restore = self.random_masking(x, mask_ratio)
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore, None

    def forward_decoder(self, x: Tensor, ids_restore: Tensor):
        x = self.decoder_embed(x)
        missing = ids_restore.shape[1] - (x.shape[1] - 1)
        tokens = torch.cat([x[:, 1:], self.mask_token.expand(len(x), missing, -1).to(x.dtype)], dim=1)
        tokens = tokens.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed
        if self.decoder_mode != 0:
            x = x[:, 1:]
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))
        if self.decoder_mode == 0:
            pred = pred[:, 1:]
        return pred, None, None

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor, norm_pix_loss: bool = False) -> Tensor:
        target = self.patchify(imgs)
        if norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        each = (pred - target).square().mean(dim=-1)
        return (each * mask).sum() / mask.sum()

    def forward(self, imgs: Tensor, mask_ratio: float = 0.8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        latent, mask, ids_restore, _ = self.forward_encoder(imgs, mask_ratio, mask_2d=self.mask_2d)
        pred, _, _ = self.forward_decoder(latent, ids_restore)
        loss = self.forward_loss(imgs, pred, mask, norm_pix_loss=self.norm_pix_loss)
        return loss, pred, mask, torch.zeros(1, device=imgs.device)
