"""Stochastic depth."""

from __future__ import annotations

from torch import Tensor, nn

from maefast.nn.cells import Cells


class DropPath(nn.Module):
    """Drop a residual branch of whole samples (Huang et al., 2016), the others scaled by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"the rate of a drop path must lie in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor | Cells) -> Tensor | Cells:
        """[B, ...] or Cells."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        return x * (x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep) / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"
