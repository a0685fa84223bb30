"""What a trainer sees of a masked-modelling system, whatever it learns from:

    batch ─► prepare ─► View ─► forward ─► Output
             all that is random, geometric     all that learns
             or free of gradients

`prepare` stays outside of autograd, DDP and CUDA graphs, so a batch may be prepared ahead of its step; `forward` has
nothing left to decide, so a step can be captured, wrapped in DDP and replayed. A recipe says which batches it `wants`,
and that finds them; the trainer knows no more of either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from maefast.seeds import Draw

if TYPE_CHECKING:
    from maefast.data.source import Source

__all__ = ["Batch", "Draw", "Output", "Picture", "Progress", "Recipe", "View", "Wants"]


class Progress(NamedTuple):
    """Where a run is: `step` of `total` steps are done, and `epoch` passes over the data."""

    step: int
    total: int
    epoch: float


@dataclass
class Batch:
    """Samples as they are loaded. Subclasses add tensors [B, ...].

    Attributes:
        key: int64 [B], each sample's place in the run, which its random numbers are a function of; stays on the host.
    """

    key: np.ndarray

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return replace(self, **{name: change(value) for name, value in found.items() if isinstance(value, Tensor)})


@dataclass(frozen=True)
class View:
    """What `prepare` makes and `forward` reads: tensors, numbers and strings, in dataclasses, tuples, lists or dicts.

    Attributes:
        parts: what tokens are made of. plan: who is seen. target: what predictions are held against; None where the
            parts are.
    """

    parts: Any
    plan: Any
    target: Any = None


@dataclass(frozen=True)
class Output:
    """What `forward` makes of a view.

    Attributes:
        terms: the weighted parts of the loss, each a scalar with a name. pred: what was predicted, in plan order.
    """

    terms: Mapping[str, Tensor]
    pred: Any
    view: View

    @property
    def loss(self) -> Tensor:
        """The sum of the terms, in float32 at least."""
        return reduce(add, (term.to(torch.promote_types(term.dtype, torch.float32)) for term in self.terms.values()))


class Picture(Protocol):
    """What a person looks at. `caption`: what must be known of it, in one or more lines."""

    caption: str

    def save(self, path: Path, title: str) -> None:
        """Write it under a title, atomically."""

    def pixels(self) -> Tensor:
        """The same without words: uint8 [C, H, W]."""


class Wants(Protocol):
    """The kind of batch that a recipe takes."""

    def open(self, options: Any) -> Source:
        """The data that the options of a run name (see `maefast.train.PretrainConfig`), as such batches.

        Raises:
            TrainError: there are none, or they are of another kind.
        """


class Recipe(nn.Module):
    """A masked-modelling system, as a trainer sees it. A subclass defines `prepare` and `forward`, and sets `wants`.

    Attributes:
        wants: which batches it takes.
        settled: options of the run that were left to the recipe, as what they came to.
    """

    wants: Wants
    settled: Mapping[str, Any] = {}

    @property
    def network(self) -> nn.Module:
        """What is trained and saved, under its own parameter names: the recipe itself, unless it wraps a model."""
        return self

    def prepare(self, batch: Batch, draw: Draw, progress: Progress) -> View:
        """The view of a batch that lies on the recipe's device. Called without gradients; must not wait for the device,
        and draws from `draw` alone."""
        raise NotImplementedError

    def forward(self, view: View) -> Output:
        raise NotImplementedError

    def picture(self, view: View, names: Sequence[str]) -> Picture | None:
        """What the recipe makes of a view of examples with these names. Called without gradients, in eval mode."""
        return None

    def after_step(self, progress: Progress) -> None:
        """Called when the optimizer has stepped, without gradients; for running averages of weights and the like. Its
        state is saved if it lies in buffers or parameters."""
