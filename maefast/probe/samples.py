"""The inputs that a probe looks at: each sample of a source once, as it is, with its name."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from maefast.data.collection import Collection
from maefast.data.images.source import ImageSource
from maefast.data.source import Source
from maefast.errors import SKIP_BAD, BadFile
from maefast.recipe import Batch


class Samples:
    """What a probe reads: see `fixed`. A subclass gives `names` and `unit`, and defines the rest.

    Attributes:
        names: as labels know them, relative to the folder of the data. unit: what one sample is called.
    """

    names: Sequence[str]
    unit: str

    def load(self, index: int) -> Any:
        """BadFile: it cannot be read."""
        raise NotImplementedError

    def collate(self, loaded: list) -> Batch:
        raise NotImplementedError

    def identity(self) -> list[str]:
        """What the samples are a function of, in words: names, sizes and times of files, and how they are decoded."""
        raise NotImplementedError


class _Images(Samples):
    """Centre crops in the size that the model takes."""

    unit = "image"

    def __init__(self, source: ImageSource) -> None:
        self._images, self.decoder, self._size = source.images, source.decoder, source.wants.size
        self._data = source.options.data
        files = self._images.files if getattr(self._images, "root", "") else None  # of a folder
        self.names = [self._images.name(i) if files is None else files[i] for i in range(len(source))]

    def load(self, index: int) -> np.ndarray:
        from maefast.data.images.pictures import load_images

        return load_images([self._images.path(index)], self._size, self.decoder)[0].numpy()

    def collate(self, loaded: list) -> Batch:
        from maefast.data.images.batch import ImageBatch

        return ImageBatch(torch.from_numpy(np.stack(loaded)), key=np.arange(len(loaded)))

    def identity(self) -> list[str]:
        paths = (self._images.path(index) for index in range(len(self.names)))
        return [repr(self.decoder), str(self._size), *map(_stamp, (self._data, *paths))]


class _Entries(Samples):
    """Of a `Collection`, which knows what a sample is without anything random."""

    def __init__(self, source: Collection) -> None:
        self._kind, self._entries, self.unit = source.kind, source.entries, source.unit
        self.names = [self._entries.label(index) for index in range(len(source))]

    def load(self, index: int) -> Any:
        try:
            return self._kind.example(self._entries[index])
        except ValueError as error:
            raise BadFile(self.names[index], str(error)) from error

    def collate(self, loaded: list) -> Batch:
        return self._kind.collate(loaded, np.arange(len(loaded)))

    def identity(self) -> list[str]:
        root = getattr(self._entries, "root", self._entries.name)
        files = [Path(root, name) for name in self.names]
        how = re.sub(r" at 0x[0-9a-f]+", "", f"{self._kind!r} {vars(self._kind)}")  # the same in the next process
        return [how, *map(_stamp, (root, *files))]


class _Examples(Samples):
    """Of any other source: its examples, all of them at once."""

    def __init__(self, source: Source) -> None:
        self.unit, self._source = source.unit, source
        self._batch, self.names = source.examples(len(source))

    def load(self, index: int) -> int:
        return index

    def collate(self, loaded: list[int]) -> Batch:
        if len(loaded) == len(self.names):
            return self._batch
        return replace(self._batch._each(lambda tensor: tensor[loaded]), key=np.arange(len(loaded)))

    def identity(self) -> list[str]:
        return [str(sorted(self._source.record().items())), *self.names]


def fixed(source: Source) -> Samples:
    """The samples of a source without anything random."""
    if isinstance(source, ImageSource) and hasattr(source.images, "path"):
        return _Images(source)
    return _Entries(source) if isinstance(source, Collection) else _Examples(source)


def batches(
    samples: Samples, which: Sequence[int], size: int, *, workers: int = 0, skip_bad: bool = False
) -> Iterator[tuple[Batch | None, list[int], list[tuple[str, str]]]]:
    """(batch, indices of what is in it, (name, reason) of what could not be read) of the samples `which`, in order.

    Raises:
        BadFile: one cannot be read, without `skip_bad`.
    """
    loader = DataLoader(
        _Listed(samples, list(which)),
        batch_size=size,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_alone,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    for loaded in loader:
        bad = [error for _, _, error in loaded if error is not None]
        if bad and not skip_bad:
            cls, path, reason = bad[0]
            raise cls(path, reason, SKIP_BAD)
        good = [(index, sample) for index, sample, error in loaded if error is None]
        made = samples.collate([sample for _, sample in good]) if good else None
        yield made, [index for index, _ in good], [(path, reason) for _, path, reason in bad]


class _Listed(Dataset):
    def __init__(self, samples: Samples, which: list[int]) -> None:
        self._samples, self._which = samples, which

    def __len__(self) -> int:
        return len(self._which)

    def __getitem__(self, place: int) -> tuple[int, Any, tuple[type[BadFile], str, str] | None]:
        index = self._which[place]
        try:
            return index, self._samples.load(index), None
        except BadFile as error:  # as data: raised in a worker it would lose its type
            return index, None, (type(error), str(error.path), error.reason)


def _alone(_: int) -> None:
    torch.set_num_threads(1)


def _stamp(where: object) -> str:
    """The name of a file, or of what lies within one, with the size and time of what there is."""
    try:
        status = Path(str(where)).expanduser().stat()
    except (OSError, ValueError):  # such as what is made
        return str(where)
    return f"{where} {status.st_size} {status.st_mtime_ns}"
