"""Blocks whose norms are shifted and scaled by a condition (adaLN of DiT: Peebles & Xie, ICCV 2023, arXiv:2212.09748),
and that look at themselves or at other tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import ops
from maefast.nn.block import Mlp
from maefast.nn.layers import LayerNorm, Linear

EPS = 1e-6


class SeparateAttention(nn.Module):
    """Attention whose queries, keys and values have linear layers of their own, all with biases."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} must be a multiple of the number of heads, got {num_heads}")
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (Linear(dim, dim) for _ in range(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, M, D], [B, S, D], [B, S, D] -> [B, M, D]."""
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)) for layer, x in ((self.q, q), (self.k, k), (self.v, v)))
        return self.proj(ops.attention(q, torch.stack([k, v], 2)).flatten(2))


class ModulatedBlock(nn.Module):
    """With s_1, m_1, g_1, s_2, m_2, g_2 = linear(silu(c)) of a condition c, and n a norm without weights,

        y = n(x) (1 + m_1) + s_1;   x = x + g_1 * attention(y; keys, values)
        y = n(x) (1 + m_2) + s_2;   x = x + g_2 * mlp(y)

    Keys and values are y, or with `cross` norm_k(z) and norm_v(z) of other tokens z.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, cross: bool = False) -> None:
        super().__init__()
        self.attn, self.mlp = SeparateAttention(dim, num_heads), Mlp(dim, int(dim * mlp_ratio))
        self.norm_k, self.norm_v = (LayerNorm(dim, eps=EPS) if cross else None for _ in range(2))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor, other: Tensor | None = None) -> Tensor:
        """x [B, M, D], condition [B, D], other [B, S, D] where the block looks at other tokens -> [B, M, D]."""
        if (other is None) != (self.norm_k is None):
            raise ValueError("other tokens must be given to a cross block, and to no other")
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, -1)
        y = _plain_norm(x) * (1 + scale) + shift
        k, v = (y, y) if other is None else (self.norm_k(other), self.norm_v(other))
        x = x + gate * self.attn(y, k, v)
        return x + gate2 * self.mlp(_plain_norm(x) * (1 + scale2) + shift2)


def _plain_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def fourier(values: Tensor, freqs: int, base: float = 1.0) -> Tensor:
    """[..., n] -> [..., 2 n freqs]: the sines, then the cosines of base * 2^k * value, k from 0, value by value."""
    angle = (values[..., None] * base * 2.0 ** torch.arange(freqs, device=values.device, dtype=values.dtype)).flatten(
        -2
    )
    return torch.cat([angle.sin(), angle.cos()], -1)
