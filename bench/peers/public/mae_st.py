"""The structure of facebookresearch/mae_st's MaskedAutoencoderViT (Feichtenhofer et al., 2022), from a description.

Same attributes, methods, parameter names and maths. Attention has three projections; positions are one table, or with
`sep_pos_embed` the sum of one for space and one for time; a class token only with `cls_embed`. The loss looks at
`pred_t_dim` of the frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.public.mae import Mlp
from maefast.bench.peers.public.videomae import DropPath


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, input_size: tuple = (4, 14, 14)) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        self.input_size = input_size

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = (q @ k.mT * self.scale).softmax(-1) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Videos [B, C, T, H, W] to [B, T / t, H / p * W / p, D]."""

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, frames: int, t_patch_size: int
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.frames, self.t_patch_size = frames, t_patch_size
        self.grid_size, self.t_grid_size = img_size // patch_size, frames // t_patch_size
        self.input_size = (self.t_grid_size, self.grid_size, self.grid_size)
        self.num_patches = self.t_grid_size * self.grid_size**2
        size = (t_patch_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=size, stride=size)

    def forward(self, x: Tensor) -> Tensor:
        assert tuple(x.shape[2:]) == (self.frames, *self.img_size), "videos of another size"
        return self.proj(x).flatten(3).permute(0, 2, 3, 1)


class MaskedAutoencoderViT(nn.Module):
    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
        num_frames: int = 16,
        t_patch_size: int = 4,
        no_qkv_bias: bool = False,
        sep_pos_embed: bool = False,
        cls_embed: bool = False,
        pred_t_dim: int = 8,
    ) -> None:
        super().__init__()
        self.sep_pos_embed, self.cls_embed, self.pred_t_dim = sep_pos_embed, cls_embed, pred_t_dim
        self.t_pred_patch_size = t_patch_size * pred_t_dim // num_frames
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, num_frames, t_patch_size)
        self.input_size = self.patch_embed.input_size
        width = decoder_embed_dim
        if cls_embed:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.decoder_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self._add_positions("", embed_dim)
        bias = not no_qkv_bias
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, bias) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        self.decoder_embed = nn.Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self._add_positions("decoder_", width)
        self.decoder_blocks = nn.ModuleList(
            Block(width, decoder_num_heads, mlp_ratio, bias) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, self.t_pred_patch_size * patch_size**2 * in_chans)
        self.norm_pix_loss = norm_pix_loss
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)

    def _add_positions(self, side: str, width: int) -> None:
        time, height, breadth = self.input_size
        if self.sep_pos_embed:
            counts = {"spatial": height * breadth, "temporal": time, **({"class": 1} if self.cls_embed else {})}
        else:
            counts = {"": self.patch_embed.num_patches + self.cls_embed}
        for name, count in counts.items():
            name = "_".join(filter(None, (f"{side}pos_embed", name)))
            setattr(self, name, nn.Parameter(torch.zeros(1, count, width)))

    def patchify(self, imgs: Tensor) -> Tensor:
        """[N, C, T, H, W] -> [N, L, u * p * p * C], a patch in (time, row, column, channel) order."""
        N, C, T, H, W = imgs.shape
        p, u = self.patch_embed.patch_size[0], self.t_pred_patch_size
        assert H == W, "videos that are not square"
        assert H % p == 0, "videos of another size"
        assert T % u == 0, "videos of another length"
        t, h, w = T // u, H // p, W // p
        self.patch_info = (N, T, H, W, p, u, t, h, w)
        return imgs.view(N, C, t, u, h, p, w, p).permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(N, t * h * w, -1)

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        N, L, D = x.shape
        keep = int(L * (1 - mask_ratio))
        noise = torch.rand(N, L, device=x.device)
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        ids_keep = ids_shuffle[:, :keep]
        kept = x.gather(1, ids_keep[..., None].expand(-1, -1, D))
        return kept, (ids_restore >= keep).to(noise.dtype), ids_restore, ids_keep

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        x = self.patch_embed(x)
        N, _, _, C = x.shape
        x, mask, ids_restore, ids_keep = self.random_masking(x.flatten(1, 2), mask_ratio)
        first = int(self.cls_embed)
        if self.cls_embed:
            x = torch.cat([self.cls_token.expand(N, -1, -1), x], dim=1)
        if self.sep_pos_embed:
            pos = self.pos_embed_spatial.repeat(1, self.input_size[0], 1) + self.pos_embed_temporal.repeat_interleave(
                self.input_size[1] * self.input_size[2], dim=1
            )
            front = self.pos_embed_class if self.cls_embed else None
        else:
            pos, front = self.pos_embed[:, first:], self.pos_embed[:, :1] if self.cls_embed else None
        pos = pos.expand(N, -1, -1).gather(1, ids_keep[..., None].expand(-1, -1, C))
        if front is not None:
            pos = torch.cat([front.expand(N, -1, -1), pos], dim=1)
        x = x + pos
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, first:], mask, ids_restore

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        N, time, side = x.shape[0], self.patch_embed.t_grid_size, self.patch_embed.grid_size
        x = self.decoder_embed(x)
        missing = time * side * side - x.shape[1]
        x = torch.cat([x, self.mask_token.expand(N, missing, -1).to(x.dtype)], dim=1)
        x = x.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))
        if self.cls_embed:
            x = torch.cat([self.decoder_cls_token.expand(N, -1, -1).to(x.dtype), x], dim=1)
        if self.sep_pos_embed:
            table = self.decoder_pos_embed_temporal.repeat_interleave(self.input_size[1] * self.input_size[2], dim=1)
            pos = self.decoder_pos_embed_spatial.repeat(1, self.input_size[0], 1) + table
            if self.cls_embed:
                pos = torch.cat([self.decoder_pos_embed_class, pos], dim=1)
        else:
            pos = self.decoder_pos_embed
        x = x + pos
        attn = self.decoder_blocks[0].attn
        spread = hasattr(attn, "requires_t_shape") and attn.requires_t_shape
        if spread:
            x = x.view(N, time, side * side, -1)
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_pred(self.decoder_norm(x))
        if spread:
            x = x.flatten(1, 2)
        return x[:, int(self.cls_embed) :]

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        frames = torch.linspace(0, imgs.shape[2] - 1, self.pred_t_dim).long().to(imgs.device)
        target = self.patchify(imgs.index_select(2, frames))
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        each = F.mse_loss(pred, target, reduction="none").mean(dim=-1)
        mask = mask.view(each.shape)
        return (each * mask).sum() / mask.sum()

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask
