"""The structure of CrossMAE's MaskedAutoencoderViT (Fu et al., 2024) and its cross-attention, from a description.

Same attributes, methods, parameter names and maths. The decoder's queries are the masked tokens alone, in the order of
their positions; keys and values are the encoder's output, or for each decoder block a weighted sum of the outputs of
the encoder's blocks (`weight_fm`; the original makes no `norm`, and so runs with it alone). The class token has no
position. `kept_mask_ratio` is the share of all tokens that is predicted, `coords` are None.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.public.mae import MaskedAutoencoderViT as MAE
from maefast.bench.peers.public.mae import Mlp, PatchEmbed
from maefast.bench.peers.public.videomae import DropPath


class Attention(nn.Module):
    """`attn_drop` is a rate, no module, and drops in evaluation too."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class CrossAttention(nn.Module):
    def __init__(
        self, encoder_dim: int, decoder_dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (decoder_dim // num_heads) ** -0.5
        self.q = nn.Linear(decoder_dim, decoder_dim)
        self.kv = nn.Linear(encoder_dim, 2 * decoder_dim)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(decoder_dim, decoder_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(y).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, attn_drop)
        self.drop_path = nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CrossAttentionBlock(nn.Module):
    """`self_attn` is False, or the attention itself."""

    def __init__(
        self,
        encoder_dim: int,
        decoder_dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        if self.self_attn:
            self.norm0 = nn.LayerNorm(decoder_dim, eps=1e-6)
            self.self_attn = Attention(decoder_dim, num_heads, attn_drop, drop)
        self.norm1 = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.cross_attn = CrossAttention(encoder_dim, decoder_dim, num_heads, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.mlp = Mlp(decoder_dim, int(decoder_dim * mlp_ratio))
        self.mlp.drop.p = drop

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.self_attn:
            x = x + self.drop_path(self.self_attn(self.norm0(x)))
        x = x + self.drop_path(self.cross_attn(self.norm1(x), y))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class WeightedFeatureMaps(nn.Module):
    """Outputs of k encoder blocks, each [B, S, D], to weighted sums for the decoder's blocks: [B, S, D, blocks]."""

    def __init__(self, k: int, decoder_depth: int) -> None:
        super().__init__()
        self.linear = nn.Linear(k, decoder_depth, bias=False)
        nn.init.normal_(self.linear.weight, std=k**-0.5)

    def forward(self, feature_maps: list[Tensor]) -> Tensor:
        assert len(feature_maps) == self.linear.weight.shape[1], "another number of feature maps"
        return self.linear(torch.stack(feature_maps, dim=-1))


class MaskedAutoencoderViT(nn.Module):
    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 12,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
        weight_fm: bool = False,
        use_fm: tuple[int, ...] = (-1,),
        use_input: bool = False,
        self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        tokens = 1 + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim), requires_grad=False)
        self.weight_fm, self.use_input = weight_fm, use_input
        self.use_fm = list(range(depth)) if tuple(use_fm) == (-1,) else [i % depth for i in use_fm]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        if weight_fm:
            self.dec_norms = nn.ModuleList(nn.LayerNorm(embed_dim, eps=1e-6) for _ in range(decoder_depth))
            self.wfm = WeightedFeatureMaps(len(self.use_fm) + use_input, decoder_depth)
        else:
            self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        width = decoder_embed_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, width), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            CrossAttentionBlock(embed_dim, width, decoder_num_heads, mlp_ratio, self_attn=self_attn)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, patch_size**2 * in_chans)
        self.norm_pix_loss = norm_pix_loss
        for parameter in (self.cls_token, self.mask_token, self.pos_embed, self.decoder_pos_embed):
            nn.init.normal_(parameter, std=0.02)

    patchify, unpatchify = MAE.patchify, MAE.unpatchify

    def random_masking(self, x: Tensor, mask_ratio: float, kept_mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """The mask is 1 where a token is predicted: behind the visible ones come those that are neither."""
        N, L, D = x.shape
        keep, left = int(L * (1 - mask_ratio)), int(L * (mask_ratio - kept_mask_ratio))
        noise = torch.rand(N, L, device=x.device)
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        kept = x.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, D))
        mask = torch.ones(N, L, device=x.device)
        mask[:, : keep + left] = 0
        return kept, mask.gather(1, ids_restore), ids_restore

    def grid_patchify(self, x: Tensor) -> Tensor:
        return self.patch_embed(x) + self.pos_embed[:, 1:]

    def forward_encoder(self, x: Tensor, mask_ratio: float, kept_mask_ratio: float):
        """Latents [B, 1 + keep, D], or with `weight_fm` a list of them, the mask, ids_restore and coords."""
        x, mask, ids_restore = self.random_masking(self.grid_patchify(x), mask_ratio, kept_mask_ratio)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        maps = [x] if self.use_input else []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.weight_fm and i in self.use_fm:
                maps.append(x)
        return (maps if self.weight_fm else self.norm(x)), mask, ids_restore, None

    def mask_tokens_grid(self, mask: Tensor, ids_restore: Tensor) -> Tensor:
        pos = self.decoder_pos_embed[:, 1:].masked_select(mask.bool()[..., None])
        return pos.view(len(ids_restore), -1, self.mask_token.shape[-1]) + self.mask_token

    def forward_decoder(
        self,
        y: Tensor | list[Tensor],
        mask: Tensor,
        ids_restore: Tensor,
        coords: None,
        mask_ratio: float,
        kept_mask_ratio: float,
    ) -> tuple[Tensor, None]:
        x = self.mask_tokens_grid(mask, ids_restore)
        if self.weight_fm:
            y = self.wfm(y)
        for i, block in enumerate(self.decoder_blocks):
            x = block(x, self.dec_norms[i](y[..., i])) if self.weight_fm else block(x, y)
        return self.decoder_pred(self.decoder_norm(x)), None

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor, coords: None) -> Tensor:
        target = self.patchify(imgs)
        target = target.masked_select(mask.bool()[..., None]).view(len(target), -1, target.shape[-1])
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return (pred - target).square().mean()

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75, kept_mask_ratio: float = 0.5) -> Tensor:
        latent, mask, ids_restore, coords = self.forward_encoder(imgs, mask_ratio, kept_mask_ratio)
        pred, _ = self.forward_decoder(latent, mask, ids_restore, coords, mask_ratio, kept_mask_ratio)
        return self.forward_loss(imgs, pred, mask, coords)
