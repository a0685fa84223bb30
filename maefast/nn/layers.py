"""Linear and LayerNorm on maefast's ops: torch's modules, parameters and names, with a fused way through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maefast import ops


class Linear(nn.Linear):
    """`torch.nn.Linear` through `maefast.ops.linear`."""

    def forward(self, x: Tensor, bias: bool = True) -> Tensor:
        """[..., K] -> [..., N]; `bias=False` leaves the bias to the op that follows."""
        return ops.linear(x, self.weight, self.bias if bias else None)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension, with the residual addition in front of it fused (`add_norm`)."""

    def forward(
        self, x: Tensor, delta: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Without `delta`: norm(x). With it: (r, norm(r)) for r = x + delta. `dtype` of the norm: see `add_norm`."""
        residual, y = ops.add_norm(x, delta, self.weight, self.bias, self.eps, dtype=dtype)
        return y if delta is None else (residual, y)
