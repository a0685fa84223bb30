"""CAE's latent regressor (Chen et al., 2022): mask tokens that look at visible latents and at each other, by
cross-attention, and become latents of hidden patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.nn.block import Mlp
from maefast.nn.drop_path import DropPath
from maefast.nn.init import init_weights_
from maefast.nn.layers import LayerNorm, Linear


class CrossAttention(nn.Module):
    """Queries [B, M, D] look at keys and values [B, S, D], which are given apart. Biases of queries and values only."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} must be a multiple of the number of heads, got {num_heads}")
        self.num_heads = num_heads
        self.q, self.k, self.v = (Linear(dim, dim, bias=False) for _ in range(3))
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = Linear(dim, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, M, D]."""
        q, k, v = (
            ops.linear(x, layer.weight, bias).unflatten(-1, (self.num_heads, -1))
            for x, layer, bias in ((q, self.q, self.q_bias), (k, self.k, None), (v, self.v, self.v_bias))
        )
        return self.proj(ops.attention(q, torch.stack([k, v], 2)).flatten(2))


class RegressorBlock(nn.Module):
    """With y the queries, z the tokens that they look at, p and r the positions of both:

        y = y + gamma_1 * attention(norm_q(y + p), norm_k(z + r), norm_v(z));  y = norm(y);  y = y + gamma_2 * mlp(y)

    The second norm sits on the stream itself, as published.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v, self.norm2_cross = (LayerNorm(dim, eps=1e-6) for _ in range(4))
        self.cross_attn = CrossAttention(dim, num_heads)
        self.mlp_cross = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1_cross, self.gamma_2_cross = (nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2))
        self.drop = DropPath(drop_path)

    def forward(self, y: Tensor, z: Tensor, p: Tensor, r: Tensor) -> Tensor:
        seen = self.cross_attn(self.norm1_q(y + p), self.norm1_k(z + r), self.norm1_v(z))
        y = self.norm2_cross(y + self.drop(self.gamma_1_cross * seen))
        return y + self.drop(self.gamma_2_cross * self.mlp_cross(y))


class Regressor(nn.Module):
    """`depth` blocks of width `dim`, and a norm. `drop_path` rises linearly to the value given; `layer_scale` is where
    the scale of each branch starts."""

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        rates = [drop_path * index / max(depth - 1, 1) for index in range(depth)]
        self.blocks = nn.ModuleList(RegressorBlock(dim, num_heads, mlp_ratio, layer_scale, rate) for rate in rates)
        self.norm = LayerNorm(dim, eps=1e-6)
        init_weights_(self)

    def forward(self, masked: Tensor, visible: Tensor, masked_pos: Tensor, visible_pos: Tensor) -> Tensor:
        """masked [B, M, D], visible [B, V, D], and the positions of both -> [B, M, D]."""
        positions = torch.cat([visible_pos, masked_pos], 1)
        for block in self.blocks:
            masked = block(masked, torch.cat([visible, masked], 1), masked_pos, positions)
        return self.norm(masked)
