"""Labelled pictures of one domain beside pictures of another, for segmentation; made scenes of shapes as a demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maefast.data.blob import Where, opened
from maefast.data.collection import DEMO, Collection, Files, Made
from maefast.data.cropped import Box, Cropped
from maefast.nn.segmentation import IGNORED
from maefast.ops import _checks
from maefast.recipe import Batch

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLASSES = ("ground", "disc", "square", "cross")  # of the demo
_COUNT = 256
_COLOURS = np.array([(215, 140, 120), (130, 200, 120), (130, 150, 220)], np.float32)  # of shapes, more or less


@dataclass
class DomainBatch(Batch):
    """images: uint8 [B, 3, H, W] of the source domain. labels: int64 [B, H, W], 255 where there is none. target: uint8
    [B, 3, H, W] of the other domain. pseudo, weight: labels of these, int64 [B, H, W], and how much they count,
    floating [B, H, W] or [B, 1, 1]; None where a teacher says so."""

    images: Tensor
    labels: Tensor
    target: Tensor
    pseudo: Tensor | None = None
    weight: Tensor | None = None


class Labelled(NamedTuple):
    """image: uint8 [H, W, 3]. labels: uint8 [H, W]."""

    image: np.ndarray
    labels: np.ndarray


class Pair(NamedTuple):
    """A source image, and all target images, of which one is taken."""

    source: Labelled
    targets: Any  # a sequence of uint8 [H, W, 3]
    index: int


@dataclass(frozen=True)
class Domains:
    """A recipe wants `DomainBatch`es of `size` (H, W) and of `classes`.

    `--data` names a folder with three others: "source" (images), "labels" (.npy or .png, uint8, one channel, under the
    same relative names) and "target" (images). An example takes target images in turn, a training sample one at random.
    Crops and flips as of images, each image its own; labels go with their image (nearest).
    """

    size: tuple[int, int] = (512, 512)
    classes: int = 19
    unit = "image"
    options = ("crop_scale", "crop_ratio", "flip")

    def open(self, options: Any) -> Collection:
        if options.data == DEMO:
            return Collection(_Cropped(self, options), self._demo(), options)
        return Collection(_Cropped(self, options), Pairs(Path(options.data).expanduser(), options), options)

    def check(self, batch: Any) -> None:
        """Raise unless it is a batch of such images."""
        if not isinstance(batch, DomainBatch):
            raise TypeError(f"a DomainBatch is wanted, got {type(batch).__name__}")
        count = len(batch.images)
        for name, dtype, want in (
            ("images", torch.uint8, (count, 3, *self.size)),
            ("labels", torch.int64, (count, *self.size)),
            ("target", torch.uint8, (count, 3, *self.size)),
            ("pseudo", torch.int64, (count, *self.size)),
        ):
            value = getattr(batch, name)
            if value is None and name == "pseudo":
                continue
            _checks.tensor(name, value, ndim=len(want), floating=False)
            if value.dtype is not dtype or tuple(value.shape) != want:
                raise ValueError(f"{name} must be {dtype} {list(want)}, got {value.dtype} {tuple(value.shape)}")
        if batch.weight is not None:
            _checks.tensor("weight", batch.weight, ndim=3)

    def _demo(self) -> Made:
        side = max(self.size) * 4 // 3

        @cache
        def target(index: int) -> np.ndarray:
            return scene(index, side, other=True).image

        class Targets:
            def __len__(self) -> int:
                return _COUNT

            def __getitem__(self, index: int) -> np.ndarray:
                return target(index)

        source, targets = cache(lambda index: scene(index, side)), Targets()
        made = lambda index: Pair(source(index), targets, index)  # noqa: E731
        return Made("scenes of shapes in two styles", _COUNT, made, lambda index: f"scene {index}")


class _Cropped(Cropped):
    """`Domains` with the crops that the options of a run name, as a `Kind`."""

    def sample(self, raw: Pair, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """(uint8 [3, H, W], int64 [H, W], uint8 [3, H, W])."""
        target = raw.targets[int(rng.integers(len(raw.targets)))]
        boxes = [self.augment.box(image.shape[1], image.shape[0], rng) for image in (raw.source.image, target)]
        flips = rng.random(2) < self.augment.flip
        image, labels = (self._cut(part, boxes[0], flips[0]) for part in raw.source)
        return image, labels.astype(np.int64), self._cut(target, boxes[1], flips[1])

    def example(self, raw: Pair) -> tuple[np.ndarray, ...]:
        target = raw.targets[raw.index % len(raw.targets)]
        boxes = [self.centre(image.shape[1], image.shape[0]) for image in (raw.source.image, target)]
        image, labels = (self._cut(part, boxes[0], False) for part in raw.source)
        return image, labels.astype(np.int64), self._cut(target, boxes[1], False)

    def _cut(self, image: np.ndarray, box: Box, flip: bool) -> np.ndarray:
        from PIL import Image

        how = Image.Resampling.BICUBIC if image.ndim == 3 else Image.Resampling.NEAREST
        found = np.asarray(Image.fromarray(image).resize(self.wants.size[::-1], how, box=box))
        found = found[:, ::-1] if flip else found
        return np.ascontiguousarray(found.transpose(2, 0, 1) if found.ndim == 3 else found)

    def collate(self, samples: Sequence[tuple[np.ndarray, ...]], key: np.ndarray) -> DomainBatch:
        return DomainBatch(*(torch.from_numpy(np.stack(part)) for part in zip(*samples)), key=key)


class Pairs(Files):
    """Images below `source` with labels, and with them those below `target`.

    Raises:
        ConfigError: no images in one of them.
    """

    def __init__(self, root: Path, options: Any) -> None:
        self._labels = root / "labels"
        super().__init__(root / "source", IMAGES, read_image, "images", options)
        self._targets = Files(root / "target", IMAGES, read_image, "images", options)

    def __getitem__(self, index: int) -> Pair:
        return Pair(Labelled(super().__getitem__(index), self._label_of(index)), self._targets, index)

    def _label_of(self, index: int) -> np.ndarray:
        from maefast.errors import BadFile

        where = self._labels / self.label(index)
        array, image = where.with_suffix(".npy"), where.with_suffix(".png")
        try:
            return read_labels(array if array.is_file() else image)
        except (ValueError, OSError) as error:
            raise BadFile(image, str(error)) from error


def read_image(path: Where) -> np.ndarray:
    """uint8 [H, W, 3]."""
    from PIL import Image

    with opened(path) as stream:
        return np.asarray(Image.open(stream).convert("RGB"))


def read_labels(path: Path) -> np.ndarray:
    """uint8 [H, W], numbers of classes. ValueError: it is something else."""
    from PIL import Image

    found = np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path))
    if found.dtype != np.uint8 or found.ndim != 2:
        raise ValueError(f"labels are uint8 [height, width], not {found.dtype} {list(found.shape)}")
    return found


def scene(index: int, side: int, other: bool = False) -> Labelled:
    """Shapes on a ground, always the same: in flat colours; or `other`, dim, in a tint and with grain."""
    rng = np.random.default_rng([17, index, int(other)])
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    image = np.empty((side, side, 3), np.float32)
    image[:] = rng.uniform(20, 110, 3)
    labels = np.zeros((side, side), np.uint8)
    for _ in range(int(rng.integers(3, 6))):
        kind, radius = int(rng.integers(1, 4)), side * rng.uniform(0.1, 0.2)
        y, x = rows - rng.uniform(0.1, 0.9) * side, columns - rng.uniform(0.1, 0.9) * side
        box = np.maximum(abs(y), abs(x))
        inside = {1: np.hypot(y, x) < radius, 2: box < 0.85 * radius,
                  3: (box < radius) & (np.minimum(abs(y), abs(x)) < 0.35 * radius)}[kind]  # fmt: skip
        image[inside], labels[inside] = _COLOURS[kind - 1] + rng.uniform(-50, 50, 3), kind
    if other:
        image = image * np.array([0.75, 0.65, 0.55], np.float32) + 30 + 12 * rng.standard_normal((side, side, 1))
    return Labelled(image.clip(0, 255).astype(np.uint8), labels)


def shown_labels(labels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] of int64 [B, H, W]: a colour for each class, white where there is none."""
    number = torch.arange(IGNORED + 1)
    bits = [(number >> bit & 1) * 170 + (number >> (bit + 3) & 1) * 85 for bit in range(3)]
    table = torch.stack(bits, 1)
    table[IGNORED] = 255
    return table.to(torch.uint8)[labels.cpu()].permute(0, 3, 1, 2)
