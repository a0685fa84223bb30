"""Images of subjects, each with units that are there or not: tables of files; shapes on textures as a demo."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maefast.data.blob import Where
from maefast.data.collection import DEMO, Collection, Made, Read
from maefast.data.cropped import Cropped
from maefast.data.records import Names, Paths
from maefast.data.shapes_on_textures import shapes_on_texture
from maefast.errors import ConfigError
from maefast.ops import _checks
from maefast.recipe import Batch

_IMAGES = 512  # of the demo


class Annotation(NamedTuple):
    """pixels: uint8 [h, w, 3]. units: float32 [U], 1 where a unit is there, else 0. subject: its number."""

    pixels: np.ndarray
    units: np.ndarray
    subject: int


@dataclass
class AnnotatedBatch(Batch):
    """images: uint8 [B, 3, H, W]. units: float32 [B, U], ones and zeros. subjects: int64 [B]."""

    images: Tensor
    units: Tensor
    subjects: Tensor


@dataclass(frozen=True)
class Annotated:
    """A recipe wants `AnnotatedBatch`es: `size` (H, W), `units` U and up to `subjects` S.

    `--data` names a table, a .csv with the columns `image` (a file, relative to the table), `subject` (a name) and one
    of ones and zeros for each unit. Subjects are numbered in the order of their names. Crops and flips as of images.
    """

    size: tuple[int, int]
    units: int
    subjects: int
    unit = "image"
    options = ("crop_scale", "crop_ratio", "flip")

    def open(self, options: Any) -> Collection:
        return Collection(_Cropped(self, options), self._demo() if options.data == DEMO else Table(self, options.data),
                          options)  # fmt: skip

    def check(self, batch: Any) -> None:
        """Raise unless it is a batch of such images."""
        if not isinstance(batch, AnnotatedBatch):
            raise TypeError(f"an AnnotatedBatch is wanted, got {type(batch).__name__}")
        _checks.tensor("images", batch.images, ndim=4, floating=False)
        found, want = batch.images, (3, *self.size)
        if tuple(found.shape[1:]) != want or found.dtype is not torch.uint8:
            sizes = ", ".join(map(str, want))
            raise ValueError(f"images must be uint8 [B, {sizes}], got {found.dtype} {tuple(found.shape)}")
        _checks.tensor("units", batch.units, ndim=2)
        if batch.units.shape != (len(found), self.units):
            raise ValueError(f"units must be [{len(found)}, {self.units}], got {tuple(batch.units.shape)}")
        _checks.tensor("subjects", batch.subjects, ndim=1, floating=False)
        if batch.subjects.dtype is not torch.int64 or len(batch.subjects) != len(found):
            raise ValueError(
                f"subjects must be int64 [{len(found)}], got {batch.subjects.dtype} {tuple(batch.subjects.shape)}"
            )

    def _demo(self) -> Made:
        side = max(self.size)

        def make(index: int) -> Annotation:
            return Annotation(*shapes_on_texture(index, side, self.units, self.subjects))

        return Made("shapes on textures", _IMAGES, make, "image {}".format)


class Table(Read):
    """The rows of a .csv, see `Annotated`.

    Raises:
        ConfigError: no such file, columns that are missing, as many units or subjects as the recipe has no room for.
    """

    def __init__(self, wants: Annotated, data: str | Path) -> None:
        path = Path(data).expanduser()
        if path.suffix.lower() != ".csv" or not path.is_file():
            raise ConfigError(f"--data {data}: a .csv with the columns image, subject and one for each unit is wanted")
        with open(path, newline="") as file:
            head, *rows = list(csv.reader(file)) or [[]]
        if missing := {"image", "subject"} - set(head):
            raise ConfigError(f"--data {data}: it has no column {' and no column '.join(sorted(missing))}")
        units = [at for at, name in enumerate(head) if name not in ("image", "subject")]
        if len(units) != wants.units:
            raise ConfigError(f"--data {data}: it has {len(units)} units, the recipe {wants.units}: units={len(units)}")
        values = [[row[at] for at in units] for row in rows if len(row) == len(head)]
        if not rows or len(values) != len(rows) or not {cell for row in values for cell in row} <= {"0", "1"}:
            raise ConfigError(f"--data {data}: each row must have {len(head)} cells, and 0 or 1 for each unit")
        names = [row[head.index("subject")] for row in rows]
        known = sorted(set(names))
        if len(known) > wants.subjects:
            raise ConfigError(f"--data {data}: it has {len(known)} subjects, the recipe {wants.subjects}: "
                              f"subjects={len(known)}")  # fmt: skip
        self._units = np.array(values, dtype=np.float32)
        self._subjects = [known.index(name) for name in names]
        super().__init__(
            Paths(str(data), str(path.parent), Names(row[head.index("image")] for row in rows)), read_pixels
        )

    def fingerprint(self) -> str:
        """Of the labels too."""
        found = hashlib.sha256(super().fingerprint().encode())
        found.update(self._units.tobytes() + np.array(self._subjects, dtype=np.int64).tobytes())
        return found.hexdigest()[:16]

    def __getitem__(self, index: int) -> Annotation:
        return Annotation(super().__getitem__(index), self._units[index], self._subjects[index])


def read_pixels(where: Where) -> np.ndarray:
    """uint8 [h, w, 3] of a photograph."""
    from maefast.data.images.pixels import Decoder

    return np.asarray(Decoder(3)(where).convert("RGB"))


class _Cropped(Cropped):
    """`Annotated` with the crops that the options of a run name, as a `Kind`."""

    def sample(self, raw: Annotation, rng: np.random.Generator) -> Annotation:
        height, width = raw.pixels.shape[:2]
        pixels = self._resized(raw.pixels, self.augment.box(width, height, rng))
        return raw._replace(pixels=pixels[:, ::-1] if rng.random() < self.augment.flip else pixels)

    def example(self, raw: Annotation) -> Annotation:
        """The whole image, as a table's are: labels are of all of it."""
        height, width = raw.pixels.shape[:2]
        return raw._replace(pixels=self._resized(raw.pixels, (0, 0, width, height)))

    def _resized(self, pixels: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
        from maefast.data.clips import resized

        return resized(pixels[None], box, self.wants.size)[0]

    def collate(self, samples: Sequence[Annotation], key: np.ndarray) -> AnnotatedBatch:
        images, units, subjects = zip(*samples)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return AnnotatedBatch(pixels, torch.from_numpy(np.stack(units)), torch.tensor(subjects), key=key)
