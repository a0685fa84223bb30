"""The data of most recipes: samples that are read or made one by one, and a recipe's `wants` that knows their kind."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from maefast import seeds
from maefast.data.records import Names, Paths, Records, inside, is_url, no_column, open_records
from maefast.data.source import failure
from maefast.errors import BadFile, ConfigError, TrainError, Unreachable
from maefast.recipe import Batch

DEMO = "demo"  # --data demo: what ships with a dependency, or is made


class Kind(Protocol):
    """A kind of samples; a recipe's `wants` is one.

    Attributes:
        unit: what one sample is called.
    """

    unit: str

    def sample(self, raw: Any, rng: np.random.Generator) -> Any:
        """A training sample of what was read: cropped, augmented. BadFile's reason as a ValueError: it cannot be."""

    def example(self, raw: Any) -> Any:
        """The same without anything random."""

    def collate(self, samples: Sequence[Any], key: np.ndarray) -> Batch:
        """A batch of samples."""


class Entries(Protocol):
    """What can be read, in a fixed order. `name`: as a person knows them. `notes`: lines for the user."""

    name: str
    notes: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """BadFile: it cannot be read."""

    def label(self, index: int) -> str: ...


class Read:
    """Records and how they are read.

    Args:
        read: a path or a `Blob` -> what is in it; a ValueError or OSError says why it cannot be read.
    """

    def __init__(self, records: Records, read: Callable[[Any], Any]) -> None:
        self.records, self._read = records, read
        self.name, self.notes = records.source, tuple(records.notes)
        self.root = Path(records.root) if records.root and not is_url(records.root) else None  # that labels are of

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        where = self.records.path(index)
        try:
            return self._read(where)
        except (ValueError, OSError, EOFError) as error:
            raise BadFile(where, str(error)) from error

    def label(self, index: int) -> str:
        return self.records.name(index)

    def fingerprint(self) -> str:
        return self.records.fingerprint()


class Files(Read):
    """The files below a folder with one of these endings, in the order of their relative paths, or what else `data`
    names, see `maefast.data.records.open_records`: lists of files, members of tars with these endings, tables.

    Args:
        read: see `Read`. options: of the run: `column`, `skip_bad`.

    Raises:
        ConfigError: nothing there, or nothing that fits in it.
    """

    def __init__(
        self, data: str | Path, endings: Sequence[str], read: Callable[[Any], Any], what: str, options: Any = None
    ) -> None:
        super().__init__(open_records(data, endings, options) or self._folder(data, endings, what, options), read)

    def _folder(self, data: str | Path, endings: Sequence[str], what: str, options: Any) -> Records:
        root = Path(data).expanduser()
        if not root.is_dir():
            raise ConfigError(f"--data {data}: no such folder (give a folder of {what}, or '{DEMO}'; a list or tars)")
        found = (path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in endings)
        seen = (path for path in found if not any(part.startswith(".") for part in path.parts))
        files = sorted({self._entry(path).as_posix() for path in seen})
        if files:
            no_column(data, options)
            return Paths(str(data), str(root), Names(files))
        if (records := inside(root, endings, options)) is not None:
            return records
        raise ConfigError(f"--data {data}: no {what} in it (looked at any depth for {' '.join(endings)})")

    def _entry(self, path: Path) -> Path:
        """What a file belongs to: itself."""
        return path


class Made:
    """`count` samples that a function of their index makes, the same ones every time."""

    notes = ()

    def __init__(self, name: str, count: int, make: Callable[[int], Any], label: Callable[[int], str]) -> None:
        self.name, self._count, self._make, self.label = name, count, make, label

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._make(index)


class Collection(Dataset):
    """Entries of a kind as a run's data: both a `Source` and the `Samples` of it, see `maefast.data.source`."""

    settled: Mapping[str, Any] = {}

    def __init__(self, kind: Kind, entries: Entries, options: Any) -> None:
        self.kind, self.entries, self.seed, self.skip_bad = kind, entries, options.seed, options.skip_bad
        self._streamed = getattr(options, "stream", False)
        self.name, self.unit, self.notes = entries.name, kind.unit, tuple(entries.notes)

    def __len__(self) -> int:
        return len(self.entries)

    # --- as a source

    def resume(self, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Nothing is found out about the data that a resumed run would have to take over."""

    def record(self) -> dict[str, Any]:
        return {f"{self.unit}s": len(self), "fingerprint": self._fingerprint}

    @cached_property
    def _fingerprint(self) -> str:
        if isinstance(self.entries, Read):
            return self.entries.fingerprint()
        labels = "\n".join(self.entries.label(index) for index in range(len(self)))
        return hashlib.sha256(labels.encode()).hexdigest()[:16]

    def changes(self, record: Mapping[str, Any]) -> list[str]:
        count, now = f"{self.unit}s", self.record()
        if all(record.get(name) == now[name] for name in now):
            return []
        return [f"{count}: {record.get(count)} -> {len(self)} (the list of them is another)"]

    def samples(self) -> Collection:
        if not self._streamed:
            return self
        alone = copy.copy(self)
        alone.skip_bad = False  # what stands in for a bad one is the next of its stream
        return alone

    def examples(self, count: int) -> tuple[Batch, list[str]]:
        samples, names = [], []
        for index in np.linspace(0, len(self), min(count, len(self)), endpoint=False).astype(int).tolist():
            made, index, bad = self._readable(index, self.kind.example)
            if made is None:
                raise self.failure(bad)
            samples.append(made)
            names.append(self.entries.label(index))
        return self.kind.collate(samples, np.arange(len(samples))), names

    # --- as samples

    def __getitem__(self, where: tuple[int, int, int]) -> tuple[Any, int, list[tuple[str, str]]]:
        position, epoch, index = where
        rng = seeds.generator(self.seed, seeds.AUGMENT, epoch, index)
        made, _, bad = self._readable(index, lambda raw: self.kind.sample(raw, rng))
        return made, position, bad

    def _readable(self, index: int, make: Callable[[Any], Any]) -> tuple[Any, int, list[tuple[str, str]]]:
        """With `skip_bad` the next readable entry stands in for a bad one."""
        bad = []
        for offset in range(len(self) if self.skip_bad else 1):
            at = (index + offset) % len(self) if offset else index
            try:
                try:
                    return make(self.entries[at]), at, bad
                except ValueError as error:
                    raise BadFile(self.entries.label(at), str(error)) from error
            except Unreachable as error:
                return None, index, [*bad, (str(error.path), error.reason)]
            except BadFile as error:
                bad.append((str(error.path), error.reason))
        return None, index, bad

    def collate(self, samples: list) -> tuple[Batch | None, list[tuple[str, str]]]:
        made, positions, bad = zip(*samples)
        bad = [entry for entries in bad for entry in entries]
        if any(sample is None for sample in made):
            return None, bad
        return self.kind.collate(made, np.array(positions, dtype=np.int64)), bad

    def failure(self, bad: list[tuple[str, str]]) -> TrainError:
        return failure(bad, self, self.skip_bad)
