"""The training samples: cached, augmented images, each with its place in the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from maefast import seeds
from maefast.data.records import Records
from maefast.data.source import failure
from maefast.errors import BadImage, TrainError, Unreachable

from .augment import Augment
from .batch import ImageBatch
from .jpeg import Jpeg, Whole, shrinkage
from .pixels import Decoder, Image, to_array

Sample = tuple[Tensor | None, int, list[tuple[str, str]]]


class TrainImages(Dataset):
    """Samples addressed by (position in the run, epoch, image index).

    A sample is (uint8 or uint16 [C, H, W], position, bad), where `bad` lists the files that could not be read as (path,
    reason). With `skip_bad` the next readable image in the list stands in for a bad one.
    Errors travel as data because an exception raised in a worker loses its type and its clean message.
    """

    unit = "image"

    def __init__(
        self,
        images: Records,
        augment: Augment,
        decoder: Decoder,
        *,
        seed: int,
        skip_bad: bool,
        cache: int,
    ):
        self.images, self.augment, self.seed = images, augment, seed
        self.decoder, self.skip_bad = decoder, skip_bad
        self.cache_bytes = cache
        self._cache: dict[int, Jpeg | Whole | Image.Image] = {}
        self._cached = 0
        self._rows: list[Tensor] = []  # of the batch that is being filled

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, where: tuple[int, int, int]) -> Sample:
        position, epoch, index = where
        out = self._rows.pop(0) if self._rows else self._empty(1)[0]
        bad = []
        for offset in range(len(self.images) if self.skip_bad else 1):
            try:
                rng = seeds.generator(self.seed, seeds.AUGMENT, epoch, index)
                self._fill(out, (index + offset) % len(self.images) if offset else index, rng)
                return out, position, bad
            except BadImage as error:
                bad.append((str(error.path), error.reason))
            except Unreachable as error:
                return None, position, [*bad, (str(error.path), error.reason)]
        return None, position, bad

    def __getitems__(self, places: list[tuple[int, int, int]]) -> list[Sample]:
        with self.batch_of(len(places)):
            return [self[where] for where in places]

    @contextmanager
    def batch_of(self, count: int) -> Iterator[None]:
        """The pixels of the next `count` samples lie one after another in one tensor."""
        self._rows = list(self._empty(count))
        try:
            yield
        finally:
            self._rows = []

    def _empty(self, count: int) -> Tensor:
        """For `count` images; in a process that loads them in memory that it shares with the main one."""
        shape = (count, self.decoder.channels, *self.augment.size)
        kind = torch.uint16 if self.decoder.bits == 16 else torch.uint8
        if get_worker_info() is None:
            return torch.empty(shape, dtype=kind)
        size = int(np.prod(shape)) * kind.itemsize
        storage = torch.UntypedStorage._new_shared(size, device="cpu")  # as torch's own collate takes it
        return torch.empty(0, dtype=kind).set_(storage, 0, shape)

    def _fill(self, out: Tensor, index: int, rng: np.random.Generator) -> None:
        if self.decoder.bits == 16:
            pixels = to_array(self.augment(self._kept(index), rng), self.decoder.channels, self.decoder.bits)
            out.copy_(torch.from_numpy(pixels))
            return
        state = rng.bit_generator.state
        try:
            self._place(out, self._kept(index), rng)
        except ValueError:  # of libjpeg: Pillow has the last word, and the words for it
            rng.bit_generator.state = state
            self.augment.into(out, self.decoder.whole(self.images.path(index)), rng)

    def _place(self, out: Tensor, image: Jpeg | Whole, rng: np.random.Generator) -> None:
        self.augment.into(out, image, rng)

    def _kept(self, index: int) -> Jpeg | Whole | Image.Image:
        """The image, from the cache if it is there. Decoded, where the cache has room for it; but of one so large that
        crops of it are decoded smaller the file is kept, so that a crop does not depend on what there was room for."""
        image = self._cache.get(index)
        if image is None:
            path = self.images.path(index)
            image = self.decoder(path) if self.decoder.bits == 16 else self.decoder.open(path)
            if isinstance(image, Jpeg) and self._room(image.width * image.height * image.channels):
                image = self._as_kept(image)
            size = image.nbytes if isinstance(image, (Jpeg, Whole)) else 4 * image.width * image.height
            # Fill up, never evict: with a fresh permutation each epoch any evicting cache would only churn.
            if self._room(size):
                self._cache[index] = image
                self._cached += size
        return image

    def _as_kept(self, image: Jpeg) -> Jpeg | Whole:
        exact = shrinkage(image.width, image.height, self.augment.size) == 1
        return Whole(image.decode()) if exact else image

    def _room(self, size: int) -> bool:
        return self._cached + size <= self.cache_bytes

    def collate(self, samples: list[Sample]) -> tuple[ImageBatch | None, list[tuple[str, str]]]:
        bad = [entry for sample in samples for entry in sample[2]]
        pixels = [sample[0] for sample in samples]
        if any(p is None for p in pixels):
            return None, bad
        key = np.array([sample[1] for sample in samples], dtype=np.int64)
        base = pixels[0]._base
        whole = base is not None and len(base) == len(pixels) and all(p._base is base for p in pixels)
        return ImageBatch(base if whole else torch.stack(pixels), key=key), bad

    def failure(self, bad: list[tuple[str, str]]) -> TrainError:
        return failure(bad, self, self.skip_bad, BadImage)
