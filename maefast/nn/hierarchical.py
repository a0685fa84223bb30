"""A decoder that looks at states of the encoder, a deep one first (Hi-End-MAE, Tang et al., 2025, arXiv:2502.08347)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.nn.block import Attention, Mlp
from maefast.nn.cross_block import ContextAttention
from maefast.nn.encoder import make_blocks, run_blocks, run_norm
from maefast.nn.init import init_tokens_, init_weights_
from maefast.nn.layers import LayerNorm, Linear
from maefast.ops import TokenMask


class HierarchicalBlock(nn.Module):
    """With c the tokens that are looked at, taken as they are,

        x = x + self_attn(norm0(x));  x = x + cross_attn(norm1(x), c);  x = x + mlp(norm2(x))

    Args:
        dim: D, of both. num_heads: divides D. mlp_ratio, eps: as of `Block`.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm0, self.norm1, self.norm2 = (LayerNorm(dim, eps=eps) for _ in range(3))
        self.self_attn, self.cross_attn = Attention(dim, num_heads), ContextAttention(dim, dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self, x: Tensor, context: Tensor, delta: Tensor | None = None, pending: bool = False, count: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, S, D], context [B, C, D] -> [B, S, D]; with `count` the last tokens of it, [B, count, D], computing no
        more than they need. `delta`, `pending`: see `Block.forward`."""
        x, y = (x, self.norm0(x)) if delta is None else self.norm0(x, delta)
        if count is None:
            seen = self.self_attn(y)
        else:
            x, seen = x[:, -count:], self.self_attn.of_some(y[:, -count:], y)
        x, y = self.norm1(x, seen)
        x, y = self.norm2(x, self.cross_attn(y, context))
        delta = self.mlp(y)
        return (x, delta) if pending else x + delta


class HierarchicalDecoder(nn.Module):
    """Blocks of self-attention on visible and mask tokens, then one block for each state of the encoder, the deepest
    first, whose visible tokens and prefix it looks at, without a norm and without positions.

    Args:
        latent_dim: width of the encoder. out_dim: K, values predicted for a token.
        positions: [P + N, D], fixed. states: how many of them there are. depth: blocks in front, perhaps none.
        embed_dim, num_heads, mlp_ratio: of the transformer. prefix: P. norm_eps: of every LayerNorm.

    Attributes:
        embed: linear maps to the decoder's width, of the states from the shallowest to the deepest, and of the latents.
    """

    def __init__(
        self,
        latent_dim: int,
        out_dim: int,
        positions: Tensor,
        states: int = 3,
        embed_dim: int = 384,
        depth: int = 2,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        prefix: int = 1,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if states < 1:
            raise ValueError(f"a hierarchical decoder looks at one state or more, got {states}")
        self.prefix = prefix
        self.embed = nn.ModuleList(Linear(latent_dim, embed_dim) for _ in range(states + 1))
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.register_buffer("pos_embed", positions, persistent=False)
        self.blocks = make_blocks(embed_dim, depth, num_heads, mlp_ratio, norm_eps)
        self.cross_blocks = nn.ModuleList(
            HierarchicalBlock(embed_dim, num_heads, mlp_ratio, norm_eps) for _ in range(states)
        )
        self.norm = LayerNorm(embed_dim, eps=norm_eps)
        self.pred = Linear(embed_dim, out_dim)
        init_tokens_(self.mask_token)
        init_weights_(self)

    def forward(self, latent: Tensor, plan: TokenMask, states: Sequence[Tensor]) -> Tensor:
        """Latents [B, P + keep, latent_dim] and states of the same shape, the shallowest first -> [B, masked, K].

        Raises:
            ValueError: too many or too few states; samples with different numbers of tokens, or none of them masked.
        """
        if len(states) != len(self.cross_blocks):
            raise ValueError(f"the decoder looks at {len(self.cross_blocks)} states, got {len(states)}")
        if plan.keep is None or not plan.hide:
            raise ValueError("as many visible and masked tokens are wanted in every sample, and at least one masked")
        *maps, embed = self.embed
        x = ops.restore_tokens(
            embed(latent), plan, self.mask_token, pos=self.pos_embed, prefix=self.prefix, order="visible_first"
        )
        x, delta = run_blocks(self.blocks, x)
        contexts = [to_width(state) for to_width, state in zip(maps, states)]
        for block in self.cross_blocks:
            last = block is self.cross_blocks[-1]  # of whose output only masked tokens are wanted
            x, delta = block(x, contexts.pop(), delta, pending=True, count=plan.hide if last else None)
        return self.pred(run_norm(self.norm, x, delta))
