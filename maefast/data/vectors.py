"""Images with a vector that says what is in them, such as a recognition model's: arrays beside images; drawn flowers
and a code of their attributes as a demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maefast.data.arrays import load_array
from maefast.data.blob import Where
from maefast.data.collection import DEMO, Collection, Files, Made
from maefast.data.cropped import Cropped
from maefast.ops import _checks
from maefast.recipe import Batch

_DRAWN, _ATTRIBUTES = 1000, 6  # of the demo


@dataclass
class VectorBatch(Batch):
    """vectors: float32 [B, K]. images: uint8 [B, 3, H, W]."""

    vectors: Tensor
    images: Tensor


class Coded(NamedTuple):
    """What is read: pixels uint8 [H, W, 3], vector float32 [K]."""

    image: np.ndarray
    vector: np.ndarray


@dataclass(frozen=True)
class Vectors:
    """A recipe wants `VectorBatch`es: vectors of `dim` K numbers, and images of `size` (H, W).

    `--data` names a folder: beside each image lies its vector, a .npy of the same name, floating [K]. Images are
    cropped around the centre, unless the options of the run say otherwise, and not flipped.
    """

    dim: int = 512
    size: tuple[int, int] = (112, 112)
    unit = "image"
    options = ("crop_scale", "crop_ratio", "max_pixels")

    def __post_init__(self) -> None:
        _checks.integer("dim", self.dim, 1)

    def open(self, options: Any) -> Collection:
        kind = _Cropped(self, options)
        if options.data == DEMO:
            make = cache(lambda index: flower(index, self.dim, max(self.size)))
            return Collection(kind, Made("drawn flowers", _DRAWN, make, lambda index: f"flower {index}"), options)
        from maefast.data.images.files import EXTENSIONS

        read = partial(self.read, max_pixels=options.max_pixels)
        return Collection(kind, Files(options.data, EXTENSIONS, read, "images with vectors", options), options)

    def check(self, batch: Any) -> None:
        """Raise unless it is a batch of such vectors and images."""
        if not isinstance(batch, VectorBatch):
            raise TypeError(f"a VectorBatch is wanted, got {type(batch).__name__}")
        _checks.tensor("vectors", batch.vectors, ndim=2)
        _checks.tensor("images", batch.images, ndim=4, floating=False)
        if batch.vectors.shape[1] != self.dim or len(batch.vectors) != len(batch.images):
            want = f"[{len(batch.images)}, {self.dim}]"
            raise ValueError(f"vectors must be {want}, got {tuple(batch.vectors.shape)}")
        if batch.images.dtype is not torch.uint8 or tuple(batch.images.shape[1:]) != (3, *self.size):
            want = f"uint8 [B, 3, {self.size[0]}, {self.size[1]}]"
            raise ValueError(f"images must be {want}, got {batch.images.dtype} {tuple(batch.images.shape)}")

    def read(self, where: Where, max_pixels: int | None = None) -> Coded:
        """An image and the vector beside it. ValueError, OSError: there is none, or it is something else."""
        from maefast.data.images.pixels import MAX_PIXELS, Decoder, to_array

        if not isinstance(where, Path):
            raise ValueError("vectors lie beside images in a folder; lists, tars and tables are not read")
        decoder = Decoder(3, max_pixels=MAX_PIXELS if max_pixels is None else max_pixels)
        image = to_array(decoder(where), 3).transpose(1, 2, 0)
        beside = where.with_suffix(".npy")
        if not beside.is_file():
            raise ValueError(f"no vector {beside.name} beside it")
        vector = np.array(load_array(beside))
        if vector.dtype.kind != "f" or vector.shape != (self.dim,) or not np.isfinite(vector).all():
            raise ValueError(f"a vector is {self.dim} finite numbers, not {vector.dtype} {list(vector.shape)}")
        return Coded(image, vector.astype(np.float32))


class _Cropped(Cropped):
    """`Vectors` with the crops that the options of a run name, as a `Kind`."""

    def sample(self, raw: Coded, rng: np.random.Generator) -> Coded:
        return self._cut(raw, self.augment.box(raw.image.shape[1], raw.image.shape[0], rng))

    def example(self, raw: Coded) -> Coded:
        return self._cut(raw, self.centre(raw.image.shape[1], raw.image.shape[0]))

    def _cut(self, raw: Coded, box: tuple[int, int, int, int]) -> Coded:
        from maefast import ops

        pixels = torch.from_numpy(np.ascontiguousarray(raw.image))
        return raw._replace(image=ops.resize(pixels, self.wants.size, box=box).numpy())

    def collate(self, samples: Sequence[Coded], key: np.ndarray) -> VectorBatch:
        images, vectors = (torch.from_numpy(np.stack(part)) for part in zip(*samples))
        return VectorBatch(vectors, images, key=key)


def flower(number: int, dim: int, side: int) -> Coded:
    """A flower of random colours, size, petals and turn, and a vector, of mean square 1, of these attributes: cosines
    and sines of each, mixed by a fixed random matrix. A function of `number`."""
    values = np.random.default_rng([number, 1]).random(_ATTRIBUTES)
    angles = 2 * np.pi * values * [0.8, 0.8, 0.5, 0.5, 0.5, 0.5]  # colours are nearly circles, other attributes are not
    mix = np.random.default_rng(0).standard_normal((dim, 2 * _ATTRIBUTES))
    vector = mix @ np.concatenate([np.cos(angles), np.sin(angles)])
    petals, size, turn = 3 + int(3 * values[2]), 0.6 + 0.35 * values[3], 0.5 * values[4]
    y, x = (np.mgrid[:side, :side] + 0.5) / side * 2 - 1
    radius, angle = np.hypot(x, y), np.arctan2(y, x) + 2 * np.pi * turn / petals
    image = np.empty((side, side, 3))
    image[:] = np.array([0.25, 0.25, 0.25]) + 0.5 * values[5]
    image[radius < size * (0.6 + 0.4 * np.cos(petals * angle))] = _hue(values[0] * 0.8)
    image[radius < 0.3 * size] = _hue(values[1] * 0.8)
    return Coded(
        (255 * image).round().astype(np.uint8), (vector * dim**0.5 / np.linalg.norm(vector)).astype(np.float32)
    )


def _hue(value: float) -> np.ndarray:
    """A bright colour, [3] in [0, 1]."""
    return 0.5 + 0.5 * np.cos(2 * np.pi * (value - np.array([0, 1 / 3, 2 / 3])))
