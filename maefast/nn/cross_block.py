"""Tokens that look at others: blocks with cross-attention in front, two streams of them, and a decoder that looks at
states of the encoder (HiCMAE, Sun et al., 2024, arXiv:2401.05698)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.nn.block import BIASES, Block
from maefast.nn.decoder import Decoder
from maefast.nn.drop_path import DropPath
from maefast.nn.encoder import run_norm
from maefast.nn.init import init_weights_
from maefast.nn.layers import LayerNorm, Linear
from maefast.ops import TokenMask
from maefast.ops._checks import one_of


class ContextAttention(nn.Module):
    """Tokens [B, S, dim] look at others [B, C, context_dim], keys and values from one projection `kv`, rows k, v.

    Args:
        bias: "qkv", "qv" (parameters `q_bias` and `v_bias`) or "none", as of `Attention`.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int, bias: str = "qkv") -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} must be a multiple of the number of heads, got {num_heads}")
        one_of("bias", bias, BIASES)
        self.num_heads, own = num_heads, bias == "qv"
        self.q = Linear(dim, dim, bias=bias == "qkv")
        self.kv = Linear(context_dim, 2 * dim, bias=bias == "qkv")
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) if own else None for _ in range(2))
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, S, dim]."""
        if self.q_bias is None:
            q, kv = self.q(x), self.kv(context)
        else:
            q = ops.linear(x, self.q.weight, self.q_bias)
            kv = ops.linear(context, self.kv.weight, torch.cat([torch.zeros_like(self.v_bias), self.v_bias]))
        out = ops.attention(q.unflatten(-1, (self.num_heads, -1)), kv.unflatten(-1, (2, self.num_heads, -1)))
        return self.proj(out.flatten(-2))


class CrossBlock(Block):
    """With c the tokens that are looked at,

        x = x + cross_attn(cross_norm1(x), cross_norm2(c));  x = x + attn(norm1(x));  x = x + mlp(norm2(x))

    Args:
        dim, num_heads, mlp_ratio, eps, bias, drop_path: as of `Block`. context_dim: width of c.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        eps: float = 1e-6,
        *,
        bias: str = "qkv",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, mlp_ratio, eps, bias=bias, drop_path=drop_path)
        self.cross_attn = ContextAttention(dim, context_dim, num_heads, bias)
        self.cross_norm1, self.cross_norm2 = LayerNorm(dim, eps=eps), LayerNorm(context_dim, eps=eps)
        self.cross_drop = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        delta: Tensor | None = None,
        pending: bool = False,
        count: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, S, dim], context [B, C, context_dim] -> [B, S, dim]; with `count` the last tokens of it, [B, count,
        dim]. `delta`, `pending`: see `Block.forward`."""
        x, y = (x, self.cross_norm1(x)) if delta is None else self.cross_norm1(x, delta)
        seen = self.cross_drop(self.cross_attn(y, self.cross_norm2(context)))
        if count is None:
            return super().forward(x, None, seen, pending)
        return self.forward_tail(x, count, seen, pending)


class CrossFusion(nn.Module):
    """Two streams of tokens that look at each other: both blocks of a layer see what the layer before made, and each
    stream ends with a norm of its own.

    Args:
        dims: widths of both streams. depth: layers. block: further arguments of `CrossBlock`.
    """

    def __init__(self, dims: tuple[int, int], depth: int, num_heads: int, mlp_ratio: float = 4.0, **block: Any) -> None:
        super().__init__()
        self.streams = nn.ModuleList(
            nn.ModuleDict(
                {
                    "blocks": nn.ModuleList(CrossBlock(*widths, num_heads, mlp_ratio, **block) for _ in range(depth)),
                    "norm": LayerNorm(widths[0], eps=1e-6),
                }
            )
            for widths in (dims, dims[::-1])
        )
        init_weights_(self)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, dims[0]] and [B, C, dims[1]] -> the same shapes."""
        one, other = self.streams
        for mine, theirs in zip(one["blocks"], other["blocks"]):
            a, b = mine(a, b), theirs(b, a)
        return one["norm"](a), other["norm"](b)


class CrossDecoder(Decoder):
    """A `Decoder` without prefix tokens whose blocks behind the first are `CrossBlock`s: they look at states of the
    encoder, the deepest first, brought to the decoder's width by the map of the latents, with their positions.

    Args:
        arguments: of `Decoder`; no layer scale.
    """

    def __init__(
        self,
        latent_dim: int,
        out_dim: int,
        positions: Tensor,
        embed_dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        *,
        embed_bias: bool = True,
        bias: str = "qkv",
    ) -> None:
        super().__init__(
            latent_dim, out_dim, positions, embed_dim, depth, num_heads, mlp_ratio, prefix=0, embed_bias=embed_bias,
            bias=bias,
        )  # fmt: skip
        for index in range(1, depth):
            self.blocks[index] = CrossBlock(embed_dim, embed_dim, num_heads, mlp_ratio, bias=bias)
        init_weights_(self.blocks)

    def forward(self, latent: Tensor, plan: TokenMask, contexts: Sequence[Tensor] = ()) -> Tensor:
        """Latents of the visible tokens [B, V, latent_dim], and as many states of them of the same shape as blocks look
        at some, the shallowest first -> predictions of the masked ones [B, masked, K].

        Raises:
            ValueError: too many or too few states; samples with different numbers of tokens.
        """
        if len(contexts) != len(self.blocks) - 1:
            raise ValueError(f"{len(self.blocks)} blocks look at {len(self.blocks) - 1} states, got {len(contexts)}")
        if plan.keep is None or not plan.hide:
            raise ValueError("as many visible and masked tokens are wanted in every sample, and at least one masked")
        pos, last = self.pos_embed, len(self.blocks) - 1
        x = ops.restore_tokens(self.embed(latent), plan, self.mask_token, pos=pos, prefix=0, order="visible_first")
        shown = ops.gather_tokens(pos.expand(plan.batch, -1, -1), plan) if contexts else None
        if not last:
            x, delta = self.blocks[0].forward_tail(x, plan.hide, pending=True)
        else:
            x, delta = self.blocks[0](x, pending=True)
        for index, state in enumerate(reversed(contexts), 1):
            count = plan.hide if index == last else None  # of the others nothing is predicted
            x, delta = self.blocks[index](x, self.embed(state) + shown, delta, pending=True, count=count)
        return self.pred(run_norm(self.norm, x, delta))
