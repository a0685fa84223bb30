"""The training samples: cached, augmented images, each with its place in the run."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from maefast import seeds
from maefast.data.records import Records
from maefast.data.source import failure
from maefast.errors import BadImage, TrainError, Unreachable

from .augment import Augment
from .batch import ImageBatch
from .pixels import Decoder, Image, to_array


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
        self._cache: dict[int, Image.Image] = {}
        self._cached = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, where: tuple[int, int, int]):
        position, epoch, index = where
        image, bad = self._readable(index)
        rng = seeds.generator(self.seed, seeds.AUGMENT, epoch, index)
        pixels = None
        if image is not None:
            pixels = to_array(self.augment(image, rng), self.decoder.channels, self.decoder.bits)
        return pixels, position, bad

    def _readable(self, index: int) -> tuple[Image.Image | None, list[tuple[str, str]]]:
        bad = []
        for offset in range(len(self.images) if self.skip_bad else 1):
            try:
                return self._decode((index + offset) % len(self.images)), bad
            except BadImage as error:
                bad.append((str(error.path), error.reason))
            except Unreachable as error:
                return None, [*bad, (str(error.path), error.reason)]
        return None, bad

    def _decode(self, index: int) -> Image.Image:
        image = self._cache.get(index)
        if image is None:
            image = self.decoder(self.images.path(index))
            size = image.width * image.height * (1 if image.mode == "L" else 4)  # PIL keeps RGB in 32 bits
            # Fill up, never evict: with a fresh permutation each epoch any evicting cache would only churn.
            if self._cached + size <= self.cache_bytes:
                self._cache[index] = image
                self._cached += size
        return image

    def collate(self, samples: list) -> tuple[ImageBatch | None, list[tuple[str, str]]]:
        bad = [entry for sample in samples for entry in sample[2]]
        pixels = [sample[0] for sample in samples]
        if any(p is None for p in pixels):
            return None, bad
        key = np.array([sample[1] for sample in samples], dtype=np.int64)
        return ImageBatch(torch.from_numpy(np.stack(pixels)), key=key), bad

    def failure(self, bad: list[tuple[str, str]]) -> TrainError:
        return failure(bad, self, self.skip_bad, BadImage)
