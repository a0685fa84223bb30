"""The pre-norm transformer block of ViT, with parameter names of timm and MAE, and ways to run a part of it.

Tokens come as [B, S, D], or packed [T, D] with `cu_seqlens` int32 [B+1]. Attention goes through the one seam,
`maefast.ops.attention`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from maefast import ops
from maefast.ops import TokenMask


class Attention(nn.Module):
    """Multi-head self-attention with one qkv projection (weight [3D, D], rows q, k, v) and an output projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} must be a multiple of the number of heads, got {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def attend(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Attention without the output projection: [..., D] -> [..., D]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return ops.attention(qkv, cu_seqlens_q=cu_seqlens).flatten(-2)

    def attend_tail(self, x: Tensor, count: int) -> Tensor:
        """The same for queries of the last `count` tokens only, keys and values of all: [B, S, D] -> [B, count, D]."""
        dim = x.shape[-1]
        # split, not two slices: its backward writes the gradient of the weight once.
        weight_q, weight_kv = self.qkv.weight.split([dim, 2 * dim])
        bias_q, bias_kv = self.qkv.bias.split([dim, 2 * dim])
        q = F.linear(x[:, -count:], weight_q, bias_q).unflatten(-1, (self.num_heads, -1))
        kv = F.linear(x, weight_kv, bias_kv).unflatten(-1, (2, self.num_heads, -1))
        return ops.attention(q, kv).flatten(-2)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return self.proj(self.attend(x, cu_seqlens))


class Mlp(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """``x += attn(norm1(x)); x += mlp(norm2(x))`` (Dosovitskiy et al., 2021).

    Args:
        dim: D. num_heads: divides D. mlp_ratio: hidden width of the MLP over D. eps: of the LayerNorms.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D], or packed [T, D] -> [T, D] with `cu_seqlens`."""
        x = x + self.attn(self.norm1(x), cu_seqlens)
        return x + self.mlp(self.norm2(x))

    def forward_tail(self, x: Tensor, count: int) -> Tensor:
        """The last `count` tokens of ``forward(x)``, computing no more than they need: [B, S, D] -> [B, count, D].

        The other tokens give keys and values only; their queries, output projection and MLP are left out.
        """
        if not 1 <= count <= x.shape[1]:
            raise ValueError(f"count must lie in [1, {x.shape[1]}] (the number of tokens), got {count}")
        if count == x.shape[1]:
            return self(x)
        tail = x[:, -count:] + self.attn.proj(self.attn.attend_tail(self.norm1(x), count))
        return tail + self.mlp(self.norm2(tail))

    def forward_masked(self, x: Tensor, plan: TokenMask, prefix: int = 0) -> Tensor:
        """The masked tokens of ``forward(x)``, packed, for samples that mask different numbers of tokens.

        [B, prefix + N, D] in place -> [M, D] in plan order. Attention runs on whole samples, which keeps it dense;
        output projection and MLP run for masked tokens only.
        """

        def take(y: Tensor) -> Tensor:
            rows = ops.gather_tokens(y, plan, "masked", prefix=prefix, keep_prefix=False)
            return rows.reshape(-1, y.shape[-1])

        rows = take(x) + self.attn.proj(take(self.attn.attend(self.norm1(x))))
        return rows + self.mlp(self.norm2(rows))
