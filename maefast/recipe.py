"""What a trainer sees of a masked-modelling system, whatever it learns from:

    batch ─► prepare ─► View ─► compute ─► Output
             all that is random, geometric     all that learns
             or free of gradients

`prepare` stays outside of autograd, DDP and CUDA graphs, so a batch may be prepared ahead of its step; `compute` has
nothing left to decide, so a step can be captured, wrapped in DDP and replayed. A recipe says which batches it `wants`,
and that finds them; the trainer knows no more of either. A loop of your own may leave all that to the recipe:

    loss = recipe(ClipBatch(clips)).loss
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from maefast.names import Names
from maefast.nn.teachers import Frozen, autocast_for_teachers_only
from maefast.seeds import Draw

if TYPE_CHECKING:
    from maefast.data.source import Source

__all__ = ["Batch", "Draw", "Output", "Picture", "Progress", "Recipe", "Spec", "View", "Wants"]


class Progress(NamedTuple):
    """Where a run is: `step` of `total` steps are done, and `epoch` passes over the data."""

    step: int
    total: int
    epoch: float


START = Progress(0, 1, 0.0)


@dataclass
class Batch:
    """Samples as they are loaded. Subclasses add tensors [B, ...].

    Attributes:
        key: int64 [B], each sample's place in the run, which its random numbers are a function of; stays on the host.
            None: the recipe takes a number from torch's global generator.
    """

    key: np.ndarray | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        """B."""
        found = (getattr(self, entry.name) for entry in fields(self))
        return next((len(value) for value in found if isinstance(value, Tensor)), 0)

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


@dataclass(frozen=True)
class Spec:
    """What is known of a recipe before it is built; `maefast.recipes.list` and `maefast recipes` show it.

    Attributes:
        name: of the recipe, and of its module. title: of the system. paper: authors, venue, arXiv number.
        modality: what a sample is. sizes: arguments of the recipe by the name of the size, the default first.
        training: options of the run (`maefast.train.PretrainConfig`) that the paper's differ in from the defaults.
        demo: options and, under "model_args", arguments of ``maefast pretrain --recipe NAME --demo``.
        baseline: what `Recipe.baseline` predicts, in words.
    """

    name: str
    title: str
    paper: str
    modality: str
    sizes: Mapping[str, Mapping[str, Any]]
    training: Mapping[str, Any] = field(default_factory=dict)
    demo: Mapping[str, Any] = field(default_factory=dict)
    baseline: str = "predicting the mean"


class Recipe(nn.Module):
    """A masked-modelling system, as a trainer sees it. A subclass defines `prepare` and `compute`, and sets `wants`.

    Attributes:
        spec: what the registry knows of it; None for a recipe outside of `maefast.recipes`.
        names: how the parameters are called in public checkpoints.
        wants: which batches it takes.
        settled: options of the run that were left to the recipe, as what they came to.
        config: plain dict, can be written as JSON; `maefast.recipes.create` sets and takes it.
        lead: how many tokens stand before the others in what `encode` gives, the class token first; None: as many as
            the encoder has.
    """

    spec: Spec | None = None
    names: Names = Names()
    wants: Wants
    settled: Mapping[str, Any] = {}
    config: Mapping[str, Any] = {}
    lead: int | None = None

    @property
    def network(self) -> nn.Module:
        """What is trained and saved, under its own parameter names: the recipe itself, unless it wraps a model."""
        return self

    def prepare(self, batch: Batch, draw: Draw, progress: Progress) -> View:
        """The view of a batch that lies on the recipe's device. Called without gradients; must not wait for the device,
        and draws from `draw` alone."""
        raise NotImplementedError

    def compute(self, view: View) -> Output:
        """All that learns: the terms of the loss of a view. Nothing random, but what the modules draw (drop path)."""
        raise NotImplementedError

    def forward(self, given: View | Batch) -> Output:
        """`compute` of a view, or of a batch that is prepared here first."""
        if isinstance(given, Batch):
            given = self.view(given)
        elif not isinstance(given, View):
            if check := getattr(getattr(self, "wants", None), "check", None):
                check(given)  # which says by its name what batch is wanted
            raise TypeError(f"a Batch or a View is wanted, got {type(given).__name__}")
        return self.compute(given)

    @torch.no_grad()
    def prepared(self, batch: Batch, draw: Draw, progress: Progress) -> View:
        """`prepare` as loops call it: without gradients, and in full precision under autocast too, but for teachers."""
        device = next((parameter.device.type for parameter in self.parameters()), "cpu")
        with autocast_for_teachers_only(device):
            return self.prepare(batch, draw, progress)

    def view(self, batch: Batch, seed: int | None = None, progress: Progress = START) -> View:
        """`prepared` for loops of your own: without a seed, one is drawn from torch's global generator."""
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        key = np.arange(len(batch)) if batch.key is None else batch.key
        return self.prepared(batch, Draw(seed, key), progress)

    def encode(self, batch: Batch) -> Tensor:
        """Features of whole inputs, nothing masked, for a probe or an export."""
        raise NotImplementedError(f"{type(self).__name__} gives no features")

    def baseline(self, view: View) -> Output:
        """What a trivial predictor (`Spec.baseline`) makes of a view, to be held against `compute`'s terms of the same
        names; it may have fewer. Called without gradients, and only where a recipe defines it."""
        raise NotImplementedError(f"{type(self).__name__} has no trivial predictor")

    def picture(self, view: View, names: Sequence[str]) -> Picture | None:
        """What the recipe makes of a view of examples with these names. Called without gradients, in eval mode."""
        return None

    def missing(self) -> str | None:
        """What it cannot be trained without and was not given, in words; such as a teacher."""
        return None

    def require(self) -> None:
        """ValueError: something is `missing`."""
        if missing := self.missing():
            raise ValueError(f"{type(self).__name__} needs {missing}")

    def _apply(self, fn: Callable, recurse: bool = True) -> Recipe:
        """Of nn.Module, behind `to`, `cuda`, `double` ...: teachers go along."""
        for value in vars(self).values():
            if isinstance(value, Frozen):
                value.module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def after_loading(self, missing: Sequence[str]) -> None:
        """Called when weights have been loaded from a file that lacks some of `Names.optional`, with their names."""

    def after_step(self, progress: Progress) -> None:
        """Called when the optimizer has stepped, without gradients; for running averages of weights and the like. Its
        state is saved if it lies in buffers or parameters."""
