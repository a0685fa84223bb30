"""Latents of several depths in one."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from maefast.nn.init import init_weights_
from maefast.nn.layers import LayerNorm, Linear


class LayerFusion(nn.Module):
    """``x + sum_i linear_i(norm_i(h_i))``: what an encoder gives, and outputs of its blocks.

    Args:
        dim: D. count: how many blocks. eps: of the LayerNorms.

    Raises:
        ValueError: as many states as `count` are wanted, and others are given.
    """

    def __init__(self, dim: int, count: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm(dim, eps=eps) for _ in range(count))
        self.maps = nn.ModuleList(Linear(dim, dim) for _ in range(count))
        init_weights_(self)

    def forward(self, x: Tensor, states: Iterable[Tensor]) -> Tensor:
        """x and every state [..., D], of any floating dtype -> [..., D] in that of x."""
        states = list(states)
        if len(states) != len(self.maps):
            raise ValueError(f"states must be those of {len(self.maps)} blocks, got {len(states)}")
        for norm, layer, state in zip(self.norms, self.maps, states):
            x = x + layer(norm(state)).to(x.dtype)
        return x
