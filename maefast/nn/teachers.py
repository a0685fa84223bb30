"""Networks that a recipe learns from and does not train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Frozen:
    """A network that never learns, held so that the recipe's `parameters()`, state_dict, DDP and optimizer do not see
    it. `maefast.recipe.Recipe` takes it along to devices and dtypes. Always in eval mode; called without gradients.

    >>> teacher = Frozen(nn.Linear(2, 3))
    >>> teacher(torch.zeros(1, 2)).requires_grad
    False
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.module(*args, **options)

    @torch.no_grad()
    def states(self, *args: Any, **options: Any) -> Any:
        """Of the network, see `maefast.nn.Encoder.states`: no block behind the last one that is asked for is run."""
        return self.module.states(*args, **options)
