"""Accuracy of a classifier on samples that are held back, on the way and at the end, in a CSV file."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from maefast.data.runs import complete_rows
from maefast.data.written import write_whole
from maefast.errors import TrainError
from maefast.probe.accuracy import Accuracy, accuracy
from maefast.probe.data import Labelled
from maefast.probe.features import undisturbed
from maefast.probe.samples import batches

from .recipe import Classify

COLUMNS = ("step", "accuracy", "low", "high", "samples", "seconds", "without average")


class Judge:
    """Each sample once, whole, in its centre crop. One process does it; others wait for it at their next step.

    Args:
        held: the samples that are held back. path: of the CSV file. done: steps that are done; rows beyond belong to
            steps that will be taken again, and are dropped.
        autocast: the context that answers are computed in, or None.
    """

    what, tag = "accuracy", "held back/accuracy"

    def __init__(
        self,
        held: Labelled,
        path: Path,
        done: int = 0,
        *,
        batch_size: int = 64,
        workers: int = 0,
        skip_bad: bool = False,
        autocast: Callable | None = None,
    ) -> None:
        self.held, self._path, self._size = held, path, batch_size
        self._how = {"workers": workers, "skip_bad": skip_bad}
        self._autocast = autocast
        self.found: dict[str, Accuracy] = {}
        self.at: int | None = None
        self.rows = []
        if path.exists():
            self.rows = [cells for cells in complete_rows(path)[1] if int(cells[0]) <= done]
        write_whole(path, self._write)

    def _write(self, path: Path) -> None:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *self.rows])
            file.flush()
            os.fsync(file.fileno())

    def __call__(self, recipe: Classify, step: int, device: torch.device | str) -> Accuracy:
        """The accuracy after `step` steps, that of the average where there is one, written down."""
        began = time.perf_counter()
        networks = recipe.networks()
        answers, places = answers_of(recipe, networks, self._batches(), device, self._autocast)
        if not places:
            raise TrainError(f"none of the {len(self.held.which)} samples that are held back can be read")
        true = self.held.only(places).labels
        self.found, self.at = {name: accuracy(given, true) for name, given in answers.items()}, step
        best = self.found[list(networks)[-1]]
        plain = repr(self.found["model"].value) if len(networks) > 1 else ""
        seconds = time.perf_counter() - began
        self.rows = [row for row in self.rows if int(row[0]) < step]
        self.rows.append([*map(repr, (step, best.value, *best.interval, best.count, seconds)), plain])
        write_whole(self._path, self._write)
        return best

    def _batches(self):
        return batches(self.held.samples, self.held.which, self._size, **self._how)


@torch.no_grad()
def answers_of(
    recipe: Classify,
    networks: dict[str, nn.Module],
    read,
    device: torch.device | str,
    autocast: Callable | None = None,
) -> tuple[dict[str, np.ndarray], list[int]]:
    """(the most likely class of each sample by each network, which samples these are); the run around it undisturbed.

    read: as `maefast.probe.samples.batches` gives them.
    """
    found: dict[str, list] = {name: [] for name in networks}
    places: list[int] = []
    with undisturbed(recipe):
        for batch, index, _ in read:
            if batch is None:
                continue
            images = recipe.images(batch.to(device))
            places += index
            for name, network in networks.items():
                if autocast is None:
                    logits = network(images)
                else:
                    with autocast():
                        logits = network(images)
                found[name].append(logits.argmax(1).cpu().numpy())
    return {name: np.concatenate([*parts, np.zeros(0, int)]) for name, parts in found.items()}, places
