"""The structure of timm's `VisionTransformer`, blocks and `PatchDropout`, from a description of them: same attributes,
methods, parameter names and maths; plain eager torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerScale(nn.Module):
    def __init__(self, dim: int, value: float, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)


class Attention(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = nn.Identity()
        self.fused_attn = True
        self.gate = nn.Linear(dim, dim) if gated else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        rate = self.attn_drop.p if self.training else 0.0
        if self.fused_attn or attn_mask is not None or is_causal:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, dropout_p=rate, is_causal=is_causal, scale=self.scale
            )
        else:
            out = self.attn_drop((q * self.scale @ k.mT).softmax(-1)) @ v
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, act: type = nn.GELU, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int = 2,
        init_values: float | None = None,
        inplace: bool = False,
        drop_path: float = 0.0,
        drop: float = 0.0,
        act: type = nn.GELU,
        **attention,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, proj_drop=drop, **attention)
        self.ls1 = LayerScale(dim, init_values, inplace) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 2 * dim, act, drop)
        self.ls2 = LayerScale(dim, init_values, inplace) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    def __init__(self, img_size: int, patch_size: int, dim: int, flatten: bool) -> None:
        super().__init__()
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.flatten, self.strict_img_size = flatten, flatten
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.strict_img_size:
            assert tuple(x.shape[2:]) == self.img_size, f"images of {tuple(x.shape[2:])}, a model for {self.img_size}"
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2) if self.flatten else x.permute(0, 2, 3, 1))


class PatchDropout(nn.Module):
    def __init__(self, prob: float, num_prefix_tokens: int = 1, ordered: bool = False) -> None:
        super().__init__()
        self.prob, self.num_prefix_tokens, self.ordered = prob, num_prefix_tokens, ordered

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.prob == 0:
            return x
        first, x = x.tensor_split([self.num_prefix_tokens], 1)
        batch, length, width = x.shape
        keep = max(1, int(length * (1 - self.prob)))
        index = torch.randn(batch, length, device=x.device).argsort(-1)[:, :keep]
        index = index.sort(-1).values if self.ordered else index
        return torch.cat([first, x.gather(1, index[..., None].expand(-1, -1, width))], 1)


class VisionTransformer(nn.Module):
    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 8,
        embed_dim: int = 32,
        depth: int = 2,
        num_heads: int = 2,
        num_classes: int = 5,
        class_token: bool = True,
        reg_tokens: int = 0,
        no_embed_class: bool = False,
        pre_norm: bool = False,
        dynamic_img_size: bool = False,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        ordered: bool = False,
        global_pool: str = "token",
        **block,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.embed_dim, self.global_pool = embed_dim, global_pool
        self.has_class_token, self.no_embed_class, self.dynamic_img_size = class_token, no_embed_class, dynamic_img_size
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim, not dynamic_img_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02) if class_token else None
        self.reg_token = nn.Parameter(torch.randn(1, reg_tokens, embed_dim) * 0.02) if reg_tokens else None
        length = self.patch_embed.num_patches + (0 if no_embed_class else self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(torch.randn(1, length, embed_dim) * 0.02)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        dropout = PatchDropout(patch_drop_rate, self.num_prefix_tokens, ordered)
        self.patch_drop = dropout if patch_drop_rate else nn.Identity()
        self.norm_pre = nn.LayerNorm(embed_dim) if pre_norm else nn.Identity()
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, **block) for _ in range(depth)))
        pooled = global_pool == "avg"
        self.norm = nn.Identity() if pooled else nn.LayerNorm(embed_dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6) if pooled else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes)

    def _pos_embed(self, x: Tensor) -> Tensor:
        if self.dynamic_img_size:
            x = x.flatten(1, 2)
        first = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        if self.no_embed_class:
            x = torch.cat([*first, x + self.pos_embed], 1)
        else:
            x = torch.cat([*first, x], 1) + self.pos_embed
        return self.pos_drop(x)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        if attn_mask is not None or is_causal:
            for block in self.blocks:
                x = block(x, attn_mask=attn_mask, is_causal=is_causal)
        elif self.grad_checkpointing:
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        x = x[:, self.num_prefix_tokens :].mean(1) if self.global_pool == "avg" else x[:, 0]
        return self.head(self.fc_norm(x))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.forward_head(self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal))
