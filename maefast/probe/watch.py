"""`--probe-every`: k-NN accuracy on the way, in a CSV file, without a trace in the training."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from maefast.data.runs import complete_rows
from maefast.data.written import naming, write_whole
from maefast.errors import ConfigError
from maefast.recipe import Recipe

from .accuracy import Accuracy, accuracy
from .data import held_back, labelled
from .features import extract, no_features
from .knn import knn
from .samples import Samples, batches

COLUMNS = ("step", "knn", "low", "high", "samples", "seconds")
SHARE = 0.2  # of each class that is held back
_BATCH = 64


class Watch:
    """Features of all samples with a class are computed, and a fifth of each class is looked up among the rest: what
    `maefast probe` does with the same seed. One process does it; others wait for it at their next step.

    Args:
        samples, spec: see `maefast.probe.data.labelled`. path: of the CSV file. done: steps that are done; rows beyond
            belong to steps that will be taken again, and are dropped.
        keep: bytes of decoded samples that stay in memory; where that is not enough, they are read each time.

    Raises:
        ConfigError: the recipe has no features, or the samples no classes to be probed.
    """

    what, tag = "k-NN accuracy", "probe/knn"  # for people, and in TensorBoard

    def __init__(
        self,
        recipe: Recipe,
        samples: Samples,
        spec: str,
        path: Path,
        done: int,
        *,
        seed: int,
        workers: int = 0,
        keep: int = 0,
        skip_bad: bool = False,
        say: Callable[[str], object] = print,
    ) -> None:
        if reason := no_features(recipe):
            raise ConfigError(f"--probe-every: {reason}")
        self._how = {"workers": workers, "skip_bad": skip_bad}
        self._data = labelled(samples, spec, "--probe-labels")
        self._seed, self._path, self._keep, self._kept = seed, path, keep, None
        held_back(self._data, SHARE, seed, "--probe-labels")  # whether there is something to hold back
        for line in self._data.notes:
            say(f"--probe-data: {line}")
        self.rows = [row for row in read_rows(path) if int(row["step"]) <= done] if path.exists() else []
        self.last: tuple[int, Accuracy] | None = None
        write_whole(path, self._write)

    def _write(self, path: Path) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def __call__(self, recipe: Recipe, step: int, device: torch.device | str) -> Accuracy:
        """The accuracy of the recipe after `step` steps, written down."""
        began = time.perf_counter()
        features = extract(recipe, self._batches(), device)
        data = self._data.only(features.index)  # what could not be read is left out
        train, test = held_back(data, SHARE, self._seed, "--probe-labels")
        pooled = features.pooled("mean")
        found = knn(pooled[train], data.labels[train], pooled[test], device=device)
        answer = accuracy(found, data.labels[test])
        row = (step, answer.value, *answer.interval, answer.count, time.perf_counter() - began)
        self.rows.append(dict(zip(COLUMNS, map(repr, row))))
        with naming(self._path), open(self._path, "a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(self.rows[-1])
            file.flush()
            os.fsync(file.fileno())
        self.last = step, answer
        return answer

    def _batches(self):
        """The batches with the samples, from memory if they all fit there."""
        if self._kept is not None:
            yield from self._kept
            return
        held, room = [], self._keep
        for entry in batches(self._data.samples, self._data.which, _BATCH, **self._how):
            room -= _size(entry[0])
            if room >= 0:
                held.append(entry)
            else:
                held.clear()
            yield entry
        if room >= 0:
            self._kept = held


def _size(batch: object) -> int:
    values = vars(batch).values() if batch is not None else ()
    return sum(value.nbytes for value in values if isinstance(value, (torch.Tensor, np.ndarray)))


def read_rows(path: Path) -> list[dict[str, str]]:
    """`complete_rows` of a probe.csv."""
    return [dict(zip(COLUMNS, cells)) for cells in complete_rows(path)[1]]
