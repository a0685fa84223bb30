"""The blocks of white-box transformers, CRATE (Yu et al., 2023, arXiv:2306.01129; Pai et al., 2024, arXiv:2404.02446).

`CompressBlock` moves tokens towards a few subspaces and makes them sparse; `ExpandBlock` is its mirror image for a
decoder. Tokens come as [B, S, D], or packed [T, D] with `Packing`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.nn.block import Packing
from maefast.nn.init import init_weights_
from maefast.nn.layers import LayerNorm, Linear
from maefast.ops import _checks


class MSSA(nn.Module):
    """Multi-head subspace self-attention: one projection w = x U^T, in heads, is queries, keys and values at once,

        proj(softmax(w w^T / sqrt(D / heads)) w)

    Its weights are `subspaces.weight` [D, D] (U; no bias) and those of `proj`.

    Raises:
        ValueError: `dim` is no multiple of `num_heads`.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} must be a multiple of the number of heads, got {num_heads}")
        self.num_heads = num_heads
        self.subspaces = Linear(dim, dim, bias=False)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D], or packed [T, D] -> [T, D]."""
        cu_seqlens, longest = packing or (None, None)
        w = self.subspaces(x).unflatten(-1, (1, self.num_heads, -1))
        shared = w.expand(*w.shape[:-3], 3, *w.shape[-2:])  # one tensor seen three times; its gradients add up
        return self.proj(ops.attention(shared, cu_seqlens_q=cu_seqlens, max_seqlen_q=longest).flatten(-2))


class ISTA(nn.Module):
    """One step of iterative shrinkage-thresholding, with a non-negative result, towards a sparse code of u in the
    dictionary D = `weight` [dim, dim], from u itself as the first guess (Beck and Teboulle, 2009):

        relu(u + step * D^T (u - D u) - step * threshold)

    That is a step on ``|u - D z|^2 / 2 + threshold * sum(z)`` over z >= 0. There is no residual connection.

    Args:
        step: eta, positive. threshold: lambda, not negative.

    Raises:
        TypeError, ValueError: `step` or `threshold` is no such number.
    """

    def __init__(self, dim: int, step: float = 0.1, threshold: float = 0.5) -> None:
        super().__init__()
        _checks.positive("step", step)
        _checks.number("threshold", threshold)
        if not threshold >= 0:
            raise ValueError(f"threshold must not be negative, got {threshold}")
        self.step, self.threshold = float(step), float(threshold)
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, u: Tensor) -> Tensor:
        """[..., dim] -> [..., dim], in the dtype of u."""
        # D^T u - D^T D u as published, with a product less.
        left = u - ops.linear(u, self.weight)
        moved = torch.add(u, ops.linear(left, self.weight.t()), alpha=self.step)
        return torch.relu(moved - self.step * self.threshold)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, step={self.step}, threshold={self.threshold}"


class CompressBlock(nn.Module):
    """``h = x + attn(norm1(x)); out = ista(norm2(h))``: attention that compresses, then a sparse code, not negative.

    Args:
        dim: D. num_heads: divides D. step, threshold: see `ISTA`. eps: of the LayerNorms.
    """

    def __init__(self, dim: int, num_heads: int, step: float = 0.1, threshold: float = 0.5, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = MSSA(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.ista = ISTA(dim, step, threshold)
        init_weights_(self.attn)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D], or packed [T, D] -> [T, D]; in float32 where x is, under autocast too."""
        _, u = self.norm2(x, self.attn(self.norm1(x), packing), x.dtype)
        return self.ista(u)


class ExpandBlock(nn.Module):
    """``y = dictionary(norm1(x)); out = y - attn(norm2(y))``: a linear map, then attention that is taken away.

    Args:
        dim: D. num_heads: divides D. eps: of the LayerNorms.
    """

    def __init__(self, dim: int, num_heads: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.dictionary = Linear(dim, dim, bias=False)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.attn = MSSA(dim, num_heads)
        init_weights_(self.attn)
        nn.init.kaiming_uniform_(self.dictionary.weight)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D], or packed [T, D] -> [T, D]."""
        y = self.dictionary(self.norm1(x))
        return y - self.attn(self.norm2(y), packing)
