"""What `dropin_vits`, `dropin_hf` and `dropin_convnets` say of each public system, and `dropin_models` runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """One public system.

    Attributes:
        title: for tables. presets: name -> sizes; "batch" is the default batch.
        public: sizes -> model, from the package or a checkout. own: the same from our description.
        inputs: sizes, batch, generator -> what a step is given.
        loss: model, *inputs -> scalar, as its training loop has it. fast_loss: where the loop is to call maefast.
        tune: give the model's attention its other form; variant: the peer that this makes.
        package: the package of `public`, where there is one. needs: what must be checked out in its place.
        convnet: run in channels-last memory.
    """

    title: str
    presets: dict[str, dict]
    public: Callable[[dict], nn.Module]
    own: Callable[[dict], nn.Module] | None
    inputs: Callable[[dict, int, torch.Generator], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    fast_loss: Callable[..., Tensor] | None = None
    tune: Callable[[nn.Module], None] | None = None
    variant: str = "tuned"
    package: str | None = None
    needs: str = ""
    convnet: bool = False

    def sizes(self, preset: str) -> dict:
        return {key: value for key, value in self.presets[preset].items() if key != "batch"}


def images(sizes: dict, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """What most of them are given."""
    return (torch.randn(batch, 3, sizes["img_size"], sizes["img_size"], generator=generator),)
