"""Samples with classes, in a training part and one that is held back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maefast.errors import ConfigError

from .accuracy import split
from .labels import read_labels
from .samples import Samples


@dataclass(frozen=True)
class Labelled:
    """which: int [n], the samples that have a class. labels: int [n], their classes as numbers; classes: their names.
    notes: lines for the user."""

    samples: Samples
    which: np.ndarray
    labels: np.ndarray
    classes: Sequence[str]
    notes: Sequence[str]

    def only(self, index: Sequence[int]) -> Labelled:
        """Those of the samples `index`, which all have a class."""
        places = {sample: place for place, sample in enumerate(self.which.tolist())}
        chosen = [places[sample] for sample in index]
        return Labelled(self.samples, self.which[chosen], self.labels[chosen], self.classes, self.notes)


def labelled(samples: Samples, spec: str, option: str, classes: Sequence[str] | None = None) -> Labelled:
    """The samples that have a class, see `read_labels`.

    Args:
        classes: those of the training part, where `samples` are held back.

    Raises:
        ConfigError: fewer than two classes; one that the training part has not.
    """
    found, notes = read_labels(spec, samples.names, option)
    which = np.array([i for i, label in enumerate(found) if label is not None])
    names = sorted({label for label in found if label is not None})
    if classes is None:
        classes = names
        if len(classes) < 2:
            raise ConfigError(f"{option} {spec}: a probe needs two classes or more, and all samples are {classes[0]!r}")
    elif strange := sorted(set(names) - set(classes)):
        more = ", ..." if len(strange) > 5 else ""
        raise ConfigError(
            f"{option} {spec}: the training part has none of {len(strange)} classes: {', '.join(strange[:5])}{more}"
        )
    number = {name: place for place, name in enumerate(classes)}
    labels = np.array([number[found[i]] for i in which], dtype=np.int64)
    return Labelled(samples, which, labels, classes, notes)


def held_back(data: Labelled, share: float, seed: int, option: str) -> tuple[np.ndarray, np.ndarray]:
    """(training part, held back), see `accuracy.split`. ConfigError: no class has two samples."""
    train, test = split(data.labels, share, seed)
    if not len(test):
        raise ConfigError(f"{option}: each of the {len(data.classes)} classes has one sample; nothing can be held back")
    return train, test
