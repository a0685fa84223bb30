"""What a run shows of what it learns: pictures of its examples, its loss on them beside that of a trivial predictor,
and probes. All processes call these methods; the main one alone shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from maefast import seeds
from maefast.errors import TrainError
from maefast.recipe import Batch, Recipe, View

if TYPE_CHECKING:
    from maefast.probe.watch import Watch

    from .sharding import Gathered


@dataclass
class Show:
    """Args:
    recipe: what is trained. gathered: where that lies in shards, what takes its weights to be looked at.
    title, unit: for captions and lines. main: whether this is the main process.
    examples: (batch, names), on the main process. rows: how many there are, on all of them.
    prepared: (batch, purpose of `maefast.seeds`, recipe) -> view. say: tells a line.
    writers: TensorBoard's and others with its methods. watch: of `--probe-every`, on the main process.
    """

    recipe: Recipe
    title: str
    unit: str
    main: bool
    rows: int
    examples: tuple[Batch, list[str]] | None
    prepared: Callable[[Batch, int, Recipe], View]
    say: Callable[[str], object]
    gathered: Gathered | None = None
    writers: Sequence[Any] = ()
    watch: Watch | None = None

    @contextmanager
    def _whole(self) -> Iterator[Recipe]:
        """The recipe with all of its weights."""
        if self.gathered is None:
            yield self.recipe
            return
        try:
            yield self.gathered.fill(self.recipe.network)
        finally:
            self.gathered.rest()

    @contextmanager
    def _showing(self) -> Iterator[Recipe | None]:
        """The same in eval mode, without gradients; None where there are no examples."""
        if not self.rows:
            yield None
            return
        with self._whole() as recipe:
            if self.examples is None:
                yield None
                return
            training = recipe.training
            recipe.eval()
            try:
                with torch.no_grad():
                    yield recipe
            finally:
                recipe.train(training)

    def picture(self, path: Path, step: int) -> None:
        """Of the examples, where the recipe draws one."""
        with self._showing() as recipe:
            if recipe is None:
                return
            batch, names = self.examples
            picture = recipe.picture(self.prepared(batch, seeds.PICTURE, recipe), names)
        if picture is None:
            return
        picture.save(path, f"{self.title}, step {step}, {picture.caption}")
        for writer in self.writers:
            writer.add_image("reconstruction", picture.pixels(), step)

    def baseline(self) -> tuple[float, float] | None:
        """(loss, loss of a trivial predictor), of the terms that both have, on the examples; said too."""
        if type(self.recipe).baseline is Recipe.baseline:
            return None
        with self._showing() as recipe:
            if recipe is None:
                return None
            view = self.prepared(self.examples[0], seeds.PICTURE, recipe)
            mine, trivial = recipe.compute(view), recipe.baseline(view)
        same = {name: mine.terms[name] for name in trivial.terms}  # of the terms that it has
        what = "loss" if same.keys() == mine.terms.keys() else " + ".join(same)
        found, words = (replace(mine, terms=same).loss.item(), trivial.loss.item()), self.recipe.spec.baseline
        self.say(f"on the {self.unit}s of the picture: {what} {found[0]:.4g}; {words}: {found[1]:.4g}")
        return found

    def probe(self, step: int, device: torch.device, first: bool = False) -> None:
        """k-NN accuracy of this step. Only of the `first` one an error ends the run: later on a file that is gone is no
        reason."""
        with self._whole() as recipe:
            if self.watch is None:
                return
            try:
                found = self.watch(recipe, step, device)
            except (TrainError, OSError) as error:
                if first:
                    raise
                self.say(f"no probe of step {step}: {error}")
                return
        for writer in self.writers:
            writer.add_scalar(self.watch.tag, found.value, step)
        text = f"{str(found).strip()} on {found.count} {self.unit}s held back"
        self.say(f"step {step}: {self.watch.what} {text}")
