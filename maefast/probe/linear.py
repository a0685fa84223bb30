"""A linear classifier on frozen features: logistic regression by scikit-learn, its weight decay chosen by itself."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from maefast.errors import need

from .accuracy import accuracy, split

DECAYS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_HELD, _STEPS, _PATIENCE = 0.2, 1000, 2


@dataclass(frozen=True)
class Linear:
    """found: int64 [m], the classes of the test samples. weight_decay: what was chosen. grid: (weight decay, accuracy
    on the held-back share of the training part); None where no class had two samples. converged: the solver's word."""

    found: np.ndarray
    weight_decay: float
    grid: Sequence[tuple[float, float | None]]
    converged: bool


def linear_probe(
    train: Tensor, labels: np.ndarray, test: Tensor, seed: int = 0, decays: Sequence[float] = DECAYS
) -> Linear:
    """Minimises mean cross-entropy + weight_decay / 2 * ||W||^2 over features that the training part's mean and
    standard deviation make standard.

    Of `decays` the one is taken whose classifier is best on a fifth of the training part, drawn class by class with
    `seed`, that it has not seen; of equal ones the strongest. They are tried from the strongest on, until two in a row
    were worse than the best: the weakest take longest. Then all of the training part is used.

    Args:
        train, test: float [n, D] and [m, D]. labels: int [n].
    """
    known, queries = (part.double().numpy() for part in (train, test))
    mean, std = known.mean(0), known.std(0)
    scale = np.where(std > 1e-6 * max(1e-12, float(std.max())), std, np.inf)  # constants carry nothing
    known, queries = (known - mean) / scale, (queries - mean) / scale
    inner, held = split(labels, _HELD, seed)
    decays, grid = sorted(decays, reverse=True), []
    if len(held) and len(np.unique(labels[inner])) > 1:
        solver = None
        for decay in decays:
            solver, _ = _fitted(known[inner], labels[inner], decay, solver)
            grid.append((decay, accuracy(solver.predict(known[held]), labels[held]).value))
            if len(grid) > _PATIENCE and max(entry[1] for entry in grid[-_PATIENCE:]) < max(entry[1] for entry in grid):
                break
        best = max(grid, key=lambda entry: entry[1])[0]
    else:
        best = decays[len(decays) // 2]
        grid = [(best, None)]
    solver, converged = _fitted(known, labels, best, None)
    return Linear(solver.predict(queries).astype(np.int64), best, grid, converged)


def _fitted(features: np.ndarray, labels: np.ndarray, decay: float, start: Any) -> tuple[Any, bool]:
    """(classifier, whether it converged); from the weights of `start`, whose decay was stronger, where there is one."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise need("scikit-learn", "A linear probe") from error
    # scikit-learn's sum of losses is weighted by C, its penalty by 1.
    strength = 1 / (decay * len(features))
    solver = start or LogisticRegression(max_iter=_STEPS, warm_start=True)
    solver.C = strength
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        solver.fit(features, labels)
    return solver, not any(issubclass(entry.category, ConvergenceWarning) for entry in caught)
