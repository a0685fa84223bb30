"""Training samples with their classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from maefast.data.source import Source, failure
from maefast.errors import BadFile, TrainError, Unreachable
from maefast.recipe import Batch

from .began import BEGAN, Began

RECORD = "classes"  # of what a checkpoint keeps


@dataclass
class LabelledBatch(Batch):
    """inputs: a batch. labels: int64 [B]."""

    inputs: Batch
    labels: Tensor

    def _each(self, change: Callable[[Tensor], Tensor]) -> LabelledBatch:
        return replace(self, inputs=self.inputs._each(change), labels=change(self.labels))


class LabelledSource(Dataset):
    """Some samples of a source, each with a class: both a `Source` and its `Samples`.

    Args:
        source: whose samples are augmented as its options say. which: int [n], of its samples. labels: int [n].
        skip_bad: in the place of one that cannot be read the next of `which` stands, with its own class.

    Its `began` goes into checkpoints.
    """

    def __init__(self, source: Source, which: np.ndarray, labels: np.ndarray, skip_bad: bool = False) -> None:
        self.source, self.which, self.labels, self.skip_bad = source, which, labels, skip_bad
        self.name, self.unit, self.notes = source.name, source.unit, source.notes
        self.began: Began | None = None
        self._inner: Any = None

    def __len__(self) -> int:
        return len(self.which)

    # --- as a source

    @property
    def settled(self) -> Mapping[str, Any]:
        return self.source.settled

    def resume(self, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        self.source.resume(config, record)

    def record(self) -> dict[str, Any]:
        began = {} if self.began is None else {BEGAN: self.began.record()}
        return {**self.source.record(), RECORD: self._digest(), **began}

    def changes(self, record: Mapping[str, Any]) -> list[str]:
        same = record.get(RECORD) == self._digest()
        return [*self.source.changes(record), *([] if same else ["the samples that are learnt from, or their classes"])]

    def _digest(self) -> str:
        lines = np.stack([self.which, self.labels]).astype(np.int64)
        return hashlib.sha256(lines.tobytes()).hexdigest()[:16]

    def samples(self) -> LabelledSource:
        self._inner = self.source.samples()
        self._inner.skip_bad = False  # its stand-ins would have other classes
        return self

    def examples(self, count: int) -> tuple[Batch, list[str]]:
        raise NotImplementedError("a classifier draws no pictures")

    # --- as samples

    def __getitem__(self, where: tuple[int, int, int]) -> tuple:
        return self._labelled(where, self._inner[self._of(where)])

    def __getitems__(self, places: list[tuple[int, int, int]]) -> list[tuple]:
        inner = [self._of(where) for where in places]
        together = getattr(self._inner, "__getitems__", None)
        found = together(inner) if together else [self._inner[where] for where in inner]
        return [self._labelled(*both) for both in zip(places, found, strict=True)]

    def _of(self, where: tuple[int, int, int]) -> tuple[int, int, int]:
        position, epoch, index = where
        return position, epoch, int(self.which[index])

    def _labelled(self, where: tuple[int, int, int], sample: tuple) -> tuple:
        """(what was read or None, position, what could not be, class)."""
        position, epoch, index = where
        made, _, bad = sample
        for _ in range(len(self) - 1 if self.skip_bad else 0):
            if made is not None or bad[-1][1].startswith(Unreachable.START):
                break
            index = (index + 1) % len(self)
            made, _, more = self._inner[self._of((position, epoch, index))]
            bad = [*bad, *more]
        return made, position, bad, int(self.labels[index])

    def collate(self, samples: list) -> tuple[LabelledBatch | None, list[tuple[str, str]]]:
        inputs, bad = self._inner.collate([sample[:3] for sample in samples])
        if inputs is None:
            return None, bad
        return LabelledBatch(inputs, torch.tensor([sample[3] for sample in samples]), key=inputs.key), bad

    def failure(self, bad: list[tuple[str, str]]) -> TrainError:
        return failure(bad, self, self.skip_bad, BadFile)
