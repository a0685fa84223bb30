"""Embeddings that are given, such as a frozen model's features, as tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.nn.layers import Linear
from maefast.ops import TokenMask, _dispatch
from maefast.ops.embed import _place


class GivenTokens(nn.Module):
    """The visible embeddings of each sample, plus positions, after the prefix tokens. What the plan hides or leaves
    absent is not read.

    Args:
        in_dim: of the embeddings. embed_dim: D; a Linear maps one to the other. None: the embeddings are the tokens.
    """

    def __init__(self, in_dim: int, embed_dim: int | None = None) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.proj = None if embed_dim is None else Linear(in_dim, embed_dim)
        if embed_dim is not None:
            nn.init.xavier_uniform_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)

    def forward(
        self,
        x: Tensor,
        plan: TokenMask | None = None,
        *,
        pos: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """[B, N, in_dim] -> [B, P + keep, D], or packed [B*P + T, D] for a ragged plan; all tokens without one.

        pos: [N, D]. prefix: [P, D]; a leading 1 is allowed in both.
        """
        if x.ndim != 3 or x.shape[2] != self.in_dim:
            raise ValueError(f"embeddings must be [B, N, {self.in_dim}], got {tuple(x.shape)}")
        if self.proj is not None:  # patches of 1 x in_dim of an image of one channel
            weight = self.proj.weight[:, None, None]
            return ops.patch_embed(x[:, None], weight, self.proj.bias, plan, pos=pos, prefix=prefix)
        if plan is None:
            plan = TokenMask.all_visible(*x.shape[:2], x.device)
        rows = ops.gather_tokens(x, plan).reshape(-1, self.in_dim)
        pos, prefix = (None if t is None else t.reshape(-1, self.in_dim) for t in (pos, prefix))
        dtype = rows.dtype if pos is None else torch.promote_types(rows.dtype, pos.dtype)
        return _place(rows, plan, pos, prefix, _dispatch.choose("patch_rows", x.device.type, dtype))
