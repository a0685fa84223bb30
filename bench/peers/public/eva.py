"""The structure of timm's ViTs whose attention knows positions, from a description of them: `Eva` (EVA-02, and the ViTs
with rotary positions) and `VisionTransformerRelPos`. Same attributes, methods, parameter names and maths; plain torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.public.timm_vit import DropPath, LayerScale, Mlp


def rotated(x: Tensor, table: Tensor, half: bool) -> Tensor:
    """x [B, H, N, d] turned by sine and cosine, side by side in the table [..., N, 2 * d]: pairs of neighbours, or of
    the two halves."""
    sin, cos = table.chunk(2, -1)
    if half:
        turned = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


class EvaAttention(nn.Module):
    """One projection with biases of queries and values beside it, or three projections."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_fused: bool = True,
        num_prefix_tokens: int = 1,
        rotate_half: bool = False,
        gated: bool = False,
        scale_norm: bool = False,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.num_prefix_tokens, self.rotate_half = num_prefix_tokens, rotate_half
        self.fused_attn, self.qkv_bias_separate = True, False
        self.qkv = self.q_proj = self.k_proj = self.v_proj = self.q_bias = self.v_bias = None
        if qkv_fused:
            self.qkv = nn.Linear(dim, 3 * dim, bias=False)
            self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in "qv")
            self.register_buffer("k_bias", torch.zeros(dim), persistent=False)
        else:
            self.k_bias = None
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=name != "k") for name in "qkv")
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = nn.LayerNorm(dim) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, dim) if gated else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is None:
            parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            return tuple(part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        if self.q_bias is None:
            qkv = self.qkv(x)
        else:
            bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
            qkv = self.qkv(x) + bias if self.qkv_bias_separate else F.linear(x, self.qkv.weight, bias)
        return qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        gate = None if self.gate is None else self.gate(x).sigmoid()
        q, k, v = self.heads(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            front, half = self.num_prefix_tokens, self.rotate_half
            q, k = (torch.cat([t[:, :, :front], rotated(t[:, :, front:], rope, half)], 2).type_as(v) for t in (q, k))
        rate = self.attn_drop.p if self.training else 0.0
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=rate, is_causal=is_causal)
        else:
            scores = q * self.scale @ k.mT
            out = self.attn_drop((scores if attn_mask is None else scores + attn_mask).softmax(-1)) @ v
        out = self.norm(out.transpose(1, 2).flatten(2))
        out = out if gate is None else out * gate
        return self.proj_drop(self.proj(out))


class EvaBlock(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, init_values: float | None = None, drop_path: float = 0.0, **attention
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = EvaAttention(dim, num_heads, **attention)
        self.gamma_1, self.gamma_2 = (
            None if init_values is None else nn.Parameter(torch.full((dim,), init_values)) for _ in "12"
        )
        self.drop_path1, self.drop_path2 = (DropPath(drop_path) if drop_path else nn.Identity() for _ in "12")
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        out = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        out = out if self.gamma_1 is None else self.gamma_1 * out
        x = x + self.drop_path1(out)
        out = self.mlp(self.norm2(x))
        out = out if self.gamma_2 is None else self.gamma_2 * out
        return x + self.drop_path2(out)


def angles(side: int, width: int, half: bool) -> Tensor:
    """[side * side, 2 * width]: by the row in the first half of the pairs, by the column in the second."""
    at = torch.arange(side) / side
    bands = torch.arange(1, 1 + width // 4) * torch.pi
    rows, columns = (at[:, None, None] * bands).expand(-1, side, -1), (at[:, None] * bands).expand(side, -1, -1)
    found = torch.cat([rows, columns], -1).flatten(0, 1)
    found = found.tile(2) if half else found.repeat_interleave(2, -1)
    return torch.cat([found.sin(), found.cos()], -1)


class Eva(nn.Module):
    """Half of the patches are dropped where `patch_drop` says so: then each sample has a table of its own."""

    def __init__(
        self, dim: int = 32, depth: int = 2, num_heads: int = 2, img_size: int = 32, patch_size: int = 8, **block
    ) -> None:
        super().__init__()
        side = img_size // patch_size
        self.patch_drop = False
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = angles(side, dim // num_heads, block.get("rotate_half", False))
        self.register_buffer("rope", table, persistent=False)
        self.blocks = nn.ModuleList(EvaBlock(dim, num_heads, **block) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x, rope = self.patch_embed.proj(x).flatten(2).transpose(1, 2), self.rope
        if self.patch_drop:
            count = x.shape[1]
            kept = torch.rand(len(x), count, device=x.device).argsort(1)[:, : count // 2]
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
            rope = rope[kept][:, None]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, rope=rope)
        return self.head(self.norm(x)[:, 0])


class RelPosBias(nn.Module):
    """A table of relative rows and columns (Liu et al., 2021), with three more entries for a class token."""

    def __init__(self, window_size: tuple[int, int], num_heads: int, prefix_tokens: int = 0) -> None:
        super().__init__()
        height, width = window_size
        self.bias_shape = (height * width + prefix_tokens,) * 2 + (num_heads,)
        pairs = (2 * height - 1) * (2 * width - 1)
        self.relative_position_bias_table = nn.Parameter(torch.randn(pairs + 3 * prefix_tokens, num_heads) * 0.02)
        rows, columns = (t.flatten() for t in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
        index = (rows[:, None] - rows + height - 1) * (2 * width - 1) + columns[:, None] - columns + width - 1
        if prefix_tokens:
            index = F.pad(index, (1, 0, 1, 0), value=pairs)
            index[1:, 0], index[0, 0] = pairs + 1, pairs + 2
        self.register_buffer("relative_position_index", index.flatten(), persistent=False)

    def get_bias(self) -> Tensor:
        bias = self.relative_position_bias_table[self.relative_position_index]
        return bias.view(self.bias_shape).permute(2, 0, 1).unsqueeze(0).contiguous()

    def forward(self, attn: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        return attn + self.get_bias()


class RelPosAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, rel_pos: nn.Module | None = None) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = True
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.rel_pos = rel_pos
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
            rate = self.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate)
        else:
            scores = q * self.scale @ k.mT
            if self.rel_pos is not None:
                scores = self.rel_pos(scores, shared_rel_pos=shared_rel_pos)
            elif shared_rel_pos is not None:
                scores = scores + shared_rel_pos
            out = self.attn_drop(scores.softmax(-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class RelPosBlock(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, rel_pos: nn.Module | None = None, init_values: float | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RelPosAttention(dim, num_heads, rel_pos)
        self.ls1, self.ls2 = (LayerScale(dim, init_values) if init_values else nn.Identity() for _ in "12")
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), shared_rel_pos=shared_rel_pos)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformerRelPos(nn.Module):
    """shared: one table for all blocks."""

    def __init__(self, dim: int = 32, depth: int = 2, num_heads: int = 2, shared: bool = False, **block) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.shared_rel_pos = RelPosBias((4, 4), num_heads, 1) if shared else None
        own = (None if shared else RelPosBias((4, 4), num_heads, 1) for _ in range(depth))
        self.blocks = nn.ModuleList(RelPosBlock(dim, num_heads, table, **block) for table in own)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        shared = None if self.shared_rel_pos is None else self.shared_rel_pos.get_bias()
        for block in self.blocks:
            x = block(x, shared_rel_pos=shared)
        return self.head(self.norm(x)[:, 0])
