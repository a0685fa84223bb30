"""The pre-norm transformer block of ViT, with parameter names of timm and MAE, and ways to run a part of it.

Tokens come as [B, S, D], or packed [T, D] with `Packing`. Attention goes through the one seam, `maefast.ops.attention`.

Blocks hand on a pending sum: (x, delta) stands for x + delta, which the next norm adds in the pass that it makes
anyway. `Block.forward` hides this unless asked for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.nn.layers import LayerNorm, Linear
from maefast.ops import TokenMask


class Packing(NamedTuple):
    """Where packed sequences start, int32 [B+1], and the longest one, known on the host (no sync)."""

    cu_seqlens: Tensor
    max_seqlen: int

    @staticmethod
    def of(plan: TokenMask, prefix: int = 0) -> Packing:
        """Of the visible tokens, each sample behind its prefix tokens."""
        starts = torch.arange(plan.batch + 1, dtype=torch.int32, device=plan.device) * prefix
        return Packing(plan.cu_visible + starts, plan.max_visible + prefix)


class Attention(nn.Module):
    """Multi-head self-attention with one qkv projection (weight [3D, D], rows q, k, v) and an output projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} must be a multiple of the number of heads, got {num_heads}")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D], or packed [T, D] -> [T, D]."""
        cu_seqlens, longest = packing or (None, None)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self.proj(ops.attention(qkv, cu_seqlens_q=cu_seqlens, max_seqlen_q=longest).flatten(-2))

    def project(self, queries: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """q [..., H, D/H] of some tokens and kv [..., 2, H, D/H] of all, from one qkv weight."""
        dim = x.shape[-1]
        # split, not two slices: its backward writes the gradient of the weight once.
        weight_q, weight_kv = self.qkv.weight.split([dim, 2 * dim])
        bias_q, bias_kv = self.qkv.bias.split([dim, 2 * dim])
        q = ops.linear(queries, weight_q, bias_q).unflatten(-1, (self.num_heads, -1))
        return q, ops.linear(x, weight_kv, bias_kv).unflatten(-1, (2, self.num_heads, -1))


class Mlp(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ops.bias_gelu(self.fc1(x, bias=False), self.fc1.bias))


class Block(nn.Module):
    """``x += attn(norm1(x)); x += mlp(norm2(x))`` (Dosovitskiy et al., 2021).

    Args:
        dim: D. num_heads: divides D. mlp_ratio: hidden width of the MLP over D. eps: of the LayerNorms.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self, x: Tensor, packing: Packing | None = None, delta: Tensor | None = None, pending: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, S, D] -> [B, S, D], or packed [T, D] -> [T, D].

        The input is x + delta if `delta` is given; with `pending` the result is a pair whose sum is the output.
        """
        x, y = self._enter(x, delta)
        x, y = self.norm2(x, self.attn(y, packing))
        return self._leave(x, self.mlp(y), pending)

    def forward_tail(
        self, x: Tensor, count: int, delta: Tensor | None = None, pending: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The last `count` tokens of the output, computing no more than they need: [B, S, D] -> [B, count, D].

        The other tokens give keys and values only; their queries, output projection and MLP are left out.
        """
        if not 1 <= count <= x.shape[1]:
            raise ValueError(f"count must lie in [1, {x.shape[1]}] (the number of tokens), got {count}")
        if count == x.shape[1]:
            return self(x, delta=delta, pending=pending)
        x, y = self._enter(x, delta)
        q, kv = self.attn.project(y[:, -count:], y)
        x, y = self.norm2(x[:, -count:], self.attn.proj(ops.attention(q, kv).flatten(-2)))
        return self._leave(x, self.mlp(y), pending)

    def forward_masked(
        self, x: Tensor, plan: TokenMask, prefix: int = 0, delta: Tensor | None = None, pending: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The masked tokens of the output, packed, for samples that mask different numbers of tokens.

        [B, prefix + N, D] in place -> [M, D] in plan order. As in `forward_tail`, the other tokens give keys and
        values only.
        """

        def take(tokens: Tensor) -> Tensor:
            rows = ops.gather_tokens(tokens, plan, "masked", prefix=prefix, keep_prefix=False)
            return rows.reshape(-1, tokens.shape[-1])

        x, y = self._enter(x, delta)
        q, kv = self.attn.project(take(y), y.flatten(0, 1))
        length = x.shape[1]
        out = ops.attention(
            q,
            kv,
            cu_seqlens_q=plan.cu_masked,
            cu_seqlens_k=torch.arange(plan.batch + 1, dtype=torch.int32, device=plan.device) * length,
            max_seqlen_q=plan.max_masked,
            max_seqlen_k=length,
        )
        x, y = self.norm2(take(x), self.attn.proj(out.flatten(-2)))
        return self._leave(x, self.mlp(y), pending)

    def _enter(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + delta, its norm)."""
        return (x, self.norm1(x)) if delta is None else self.norm1(x, delta)

    def _leave(self, x: Tensor, delta: Tensor, pending: bool) -> Tensor | tuple[Tensor, Tensor]:
        return (x, delta) if pending else x + delta
