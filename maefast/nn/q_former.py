"""Learned queries that look at features of any number: the Q-Former of Q-Former Autoencoder (Dalmonte et al., WACV
2026, arXiv:2507.18481), whose blocks have no residual connections, and the decoder behind it.

Parameter names within blocks are those of the public checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.nn.encoder import make_blocks, run_blocks, run_norm
from maefast.nn.layers import LayerNorm, Linear

EPS = 1e-5  # of all norms


class MultiQueryAttention(nn.Module):
    """Self-attention whose heads share one key and one value for each token (Shazeer, 2019).

    Args:
        causal: token i looks at tokens 0 ... i alone.
    """

    def __init__(self, dim: int, num_heads: int, causal: bool = False) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} must be a multiple of the number of heads, got {num_heads}")
        self.num_heads, self.causal = num_heads, causal
        self.Wqkv = Linear(dim, dim + 2 * dim // num_heads)
        self.out_proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D]."""
        heads = self.Wqkv(x).unflatten(-1, (self.num_heads + 2, -1))
        q, k, v = heads.split([self.num_heads, 1, 1], 2)
        qkv = torch.stack([q, k.expand_as(q), v.expand_as(q)], 2)
        return self.out_proj(ops.attention(qkv, causal=self.causal).flatten(2))


class NullAttention(nn.Module):
    """Tokens look at others, or at nothing: a key and a value that are learned stand before those of the others.

        norm(proj(attention(to_q(norm(x)), [null | to_kv(context)])))

    Args:
        dim: D. num_heads: of `head_dim` values each, whatever D is.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int = 64) -> None:
        super().__init__()
        inner, self.num_heads = num_heads * head_dim, num_heads
        self.norm = LayerNorm(dim, eps=EPS)
        self.null_kv = nn.Parameter(torch.randn(2, head_dim))
        self.to_q, self.to_kv = Linear(dim, inner, bias=False), Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Sequential(Linear(inner, dim, bias=False), LayerNorm(dim, eps=EPS))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, S, D], or [1, S, D] for all samples, context [B, C, D] -> [B, S, D]."""
        q = self.to_q(self.norm(x)).unflatten(-1, (self.num_heads, -1)).expand(len(context), -1, -1, -1)
        kv = self.to_kv(context).unflatten(-1, (2, self.num_heads, -1))
        null = self.null_kv.to(kv.dtype)[None, None, :, None].expand(len(context), 1, -1, self.num_heads, -1)
        return self.to_out(ops.attention(q, torch.cat([null, kv], 1)).flatten(2))


class QFormerBlock(nn.Module):
    """``mlp(norm(cross_attn(attn(x), context)))``; without `cross`, ``mlp(norm(attn(x)))``."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, dropout: float, causal: bool, cross: bool, head_dim: int
    ) -> None:
        super().__init__()
        self.attn = MultiQueryAttention(dim, num_heads, causal)
        self.cross_attn = NullAttention(dim, num_heads, head_dim) if cross else None
        hidden = int(dim * mlp_ratio)
        self.projection = nn.Sequential(
            LayerNorm(dim, eps=EPS), Linear(dim, hidden), nn.GELU(), Linear(hidden, dim), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.attn(x)
        if self.cross_attn is not None:
            x = self.cross_attn(x, context)
        norm, first, _, second, drop = self.projection
        return drop(second(ops.bias_gelu(first(norm(x), bias=False), first.bias)))


class QFormer(nn.Module):
    """`count` learned queries to as many tokens that tell of features [B, C, D], C being any number.

    In the first block the queries, and their attention to each other, are the same for all samples and computed once.

    Args:
        dim: D. count: queries. num_heads, mlp_ratio: of the blocks. depth: of them; every other one, the first
            among them, looks at the features. dropout: behind each block. head_dim: of a head that looks at features.
        causal: queries look at themselves and those before them alone, as in the authors' release. Otherwise all
            start with one mean, and nothing tells one from another.
    """

    def __init__(
        self,
        dim: int,
        count: int,
        num_heads: int = 8,
        depth: int = 1,
        mlp_ratio: float = 4.0,
        dropout: float = 0.01,
        causal: bool = True,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        if depth < 1 or count < 1:
            raise ValueError(f"a Q-Former has at least one block and one query, got {depth} and {count}")
        self.queries = nn.Parameter(torch.randn(1, count, dim) * 1e-3)
        self.blocks = nn.ModuleList(
            QFormerBlock(dim, num_heads, mlp_ratio, dropout, causal, index % 2 == 0, head_dim) for index in range(depth)
        )

    def forward(self, context: Tensor) -> Tensor:
        """[B, C, D] -> [B, count, D]."""
        x = self.queries
        for block in self.blocks:
            x = block(x, context)
        return x


class TokenDecoder(nn.Module):
    """Tokens [B, N, dim] to predictions [B, N, K]: positions, registers and a class token in front, transformer blocks.

    Args:
        dim: of the tokens. out_dim: K. positions: [N, width], fixed. width, depth, num_heads, mlp_ratio: of the blocks.
        registers: how many.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        positions: Tensor,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        registers: int = 4,
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 1e-3)
        self.reg_tokens = nn.Parameter(torch.randn(1, registers, width) * 1e-3) if registers else None
        self.embed = Linear(dim, width)
        self.register_buffer("pos_embed", positions, persistent=False)
        self.blocks = make_blocks(width, depth, num_heads, mlp_ratio, EPS)
        self.norm = LayerNorm(width, eps=EPS)
        self.pred = Linear(width, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.pos_embed.to(x.dtype)
        lead = [token for token in (self.reg_tokens, self.cls_token) if token is not None]
        lead = torch.cat(lead, 1).to(x.dtype)
        x = torch.cat([lead.expand(len(x), -1, -1), x], 1)
        x, delta = run_blocks(self.blocks, x)
        skip = lead.shape[1]  # of which nothing is predicted
        return self.pred(run_norm(self.norm, x[:, skip:], None if delta is None else delta[:, skip:]))
