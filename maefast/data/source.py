"""What a trainer sees of its data, whatever they are of. A recipe's `wants` opens a `Source`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from maefast.errors import SKIP_BAD, BadFile, TrainError, Unreachable
from maefast.recipe import Batch

_TRIED = 12  # samples, before --skip-bad is advised


class Samples(Protocol):
    """What loader processes read samples from. Errors travel as data: raised in a worker they would lose their type.

    One whose batches get ready on the device has a method ``finish`` too, which takes a batch of `collate` in the main
    process and gives what `collate` would.
    """

    unit: str

    def __len__(self) -> int: ...

    def __getitem__(self, where: tuple[int, int, int]) -> Any:
        """The sample at (position in the run, epoch, index), a function of these alone."""

    def collate(self, samples: list) -> tuple[Batch | None, list[tuple[str, str]]]:
        """A batch, or None where it has a hole, and (name, reason) of everything that could not be read."""

    def failure(self, bad: list[tuple[str, str]]) -> Exception:
        """What is raised for a batch with a hole."""


class Source(Protocol):
    """The data of a run.

    Attributes:
        name: as a person knows it. unit: what one sample is called. notes: lines for the user.
        settled: options of the run that were left to the data, as what they came to.
    """

    name: str
    unit: str
    notes: Sequence[str]
    settled: Mapping[str, Any]

    def __len__(self) -> int: ...

    def resume(self, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Take over from a checkpoint (its configuration and `record`) what must not be found out anew."""

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, in plain JSON types."""

    def changes(self, record: Mapping[str, Any]) -> list[str]:
        """What is not as it was when `record` was made, in lines."""

    def samples(self) -> Samples:
        """The training samples."""

    def examples(self, count: int) -> tuple[Batch, list[str]]:
        """Up to `count` fixed samples to be shown, the i-th with the key i, and their names."""


def failure(bad: list[tuple[str, str]], samples: Samples, skip_bad: bool, error: type[BadFile] = BadFile) -> TrainError:
    """`Samples.failure`: the first of `bad`, as `error`; with `skip_bad`, that none is good; or what gave no answer."""
    path, reason = bad[-1]
    if reason.startswith(Unreachable.START):
        return Unreachable(path, reason, "the same command goes on from here")
    path, reason = bad[0]
    if skip_bad:
        if len(samples) == 1:
            return TrainError(f"the only {samples.unit} cannot be read: {path}: {reason}")
        return TrainError(f"none of the {len(samples)} {samples.unit}s can be read; the first: {path}: {reason}")
    return error(path, reason, advice(len(samples), samples.unit, partial(_read, samples)))


def advice(total: int, unit: str, read: Callable[[int], object]) -> str:
    """What to do where a sample cannot be read: skip such files, unless they are all like it. `read` raises BadFile."""
    tried = np.linspace(0, total, min(total, _TRIED), endpoint=False).astype(int).tolist()
    if any(_readable(read, index) for index in tried):
        return SKIP_BAD
    if len(tried) < total:
        return f"none of {len(tried)} {unit}s that were tried can be read, so --skip-bad would leave few or none"
    return f"it is the only {unit}" if total == 1 else f"none of the {total} {unit}s can be read: look at --data"


def _readable(read: Callable[[int], object], index: int) -> bool:
    try:
        read(index)
    except BadFile as error:
        return isinstance(error, Unreachable)  # which is no fault of the sample
    return True


def _read(samples: Samples, index: int) -> None:
    made, _, bad, *_ = samples[(0, 0, index)]
    if made is None:
        path, reason = bad[-1]
        raise (Unreachable if reason.startswith(Unreachable.START) else BadFile)(path, reason)
