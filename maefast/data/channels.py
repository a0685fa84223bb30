"""Images with any number of channels, some perhaps missing; photographs with channels made of them as a demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maefast.data.channel_files import ARRAYS, TIFFS, Stack, read_channels
from maefast.data.channel_scale import SCALE, Scale, filled, settle
from maefast.data.collection import DEMO, Collection, Entries, Kind, Made, Read
from maefast.data.cropped import Cropped
from maefast.ops import _checks
from maefast.recipe import Batch

_PARTS = 8  # of a photograph, in the demo
_MADE = 5  # channels of the demo


@dataclass
class ChannelBatch(Batch):
    """images: float32 [B, C, H, W], zero in missing channels. present: bool [B, C], or None: all are there."""

    images: Tensor
    present: Tensor | None = None


@dataclass(frozen=True)
class Channels:
    """A recipe wants `ChannelBatch`es: `count` channels C and `size` (H, W).

    `--data` names a folder, a list, tars or a table of images of numbers, see `channel_files.read_channels`, or one
    array of them. A pixel that is not finite has its channel's mean. Crops and flips as of images.

    Args:
        own_scale: each channel of a sample is normalised by its own mean and standard deviation, and one without a
            finite value is missing; else all samples by `--mean` and `--std`, which are estimated from a sample of the
            data where they are not given, and all channels must be there.
    """

    count: int = 5
    size: tuple[int, int] = (224, 224)
    own_scale: bool = True
    unit = "image"

    @property
    def options(self) -> tuple[str, ...]:
        """Those of the data that it reads."""
        return ("crop_scale", "crop_ratio", "flip", "max_pixels", *(() if self.own_scale else (*SCALE, "value_range")))

    def open(self, options: Any) -> Collection:
        kind = _Cropped(self, options)
        if options.data == DEMO and self.own_scale:
            return Collection(kind, self._demo(), options)
        entries = self._entries(options)
        return Collection(kind, entries, options) if self.own_scale else Scaled(kind, entries, options)

    def kind(self, options: Any) -> Kind:
        """How samples are made of what is read, for data of one's own; `options` of a run: with `mean` and `std`."""
        kind = _Cropped(self, options)
        if not self.own_scale:
            kind.scale = Scale.of(options, self.count)
        return kind

    def _entries(self, options: Any) -> Entries:
        from maefast.data.images.files import EXTENSIONS, find_images

        path = Path(options.data).expanduser()
        if path.suffix.lower() in ARRAYS and path.is_file():
            return Stack(path, self.count)
        endings = (*ARRAYS, *TIFFS, *(ending for ending in EXTENSIONS if ending not in TIFFS))
        records = find_images(options.data, options.output_dir, options, endings)
        return Read(records, partial(read_channels, count=self.count, max_pixels=options.max_pixels))

    def _demo(self) -> Made:
        from maefast.data.images.files import shipped_photographs

        paths = shipped_photographs()
        return Made(
            "photographs with made channels",
            len(paths) * _PARTS,
            lambda index: made_channels(paths[index // _PARTS], index % _PARTS, 2 * max(self.size))[: self.count],
            lambda index: f"{paths[index // _PARTS].stem}, part {index % _PARTS}",
        )

    def check(self, batch: Any) -> None:
        """Raise unless it is a batch of such images."""
        if not isinstance(batch, ChannelBatch):
            raise TypeError(f"a ChannelBatch is wanted, got {type(batch).__name__}")
        _checks.tensor("images", batch.images, ndim=4)
        want = (self.count, *self.size)
        if tuple(batch.images.shape[1:]) != want:
            sizes = ", ".join(map(str, want))
            raise ValueError(f"images must be [B, {sizes}], got {tuple(batch.images.shape)}")
        if batch.present is not None:
            _checks.tensor("present", batch.present, ndim=2, floating=False)
            if batch.present.dtype is not torch.bool or batch.present.shape != batch.images.shape[:2]:
                raise ValueError(f"present must be bool {list(batch.images.shape[:2])}, got {batch.present.dtype}")
            if not self.own_scale and not bool(batch.present.all()):
                raise ValueError("present: images with all their channels are wanted, and some lack one")


class _Cropped(Cropped):
    """`Channels` with the crops that the options of a run name, as a `Kind`. scale: of the data set, or None."""

    scale: Scale | None = None

    def sample(self, raw: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        image = self._resized(raw, self.augment.box(raw.shape[2], raw.shape[1], rng))
        return self._finished(image[:, :, ::-1] if rng.random() < self.augment.flip else image)

    def example(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._finished(self._resized(raw, self.centre(raw.shape[2], raw.shape[1])))

    def _finished(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.scale is None:
            return standardised(image)
        return np.ascontiguousarray(image), np.ones(len(image), bool)

    def _resized(self, raw: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
        left, top, right, bottom = box
        cut = raw[:, top:bottom, left:right]
        if self.scale is None:
            with np.errstate(over="ignore"):  # beyond float32
                cut = filled(np.ascontiguousarray(cut, dtype=np.float32))
        else:
            cut = self.scale(cut)
        size = {"size": self.wants.size, "mode": "bilinear", "antialias": True, "align_corners": False}
        return torch.nn.functional.interpolate(torch.from_numpy(cut)[None], **size)[0].numpy()

    def collate(self, samples: Sequence[tuple[np.ndarray, np.ndarray]], key: np.ndarray) -> ChannelBatch:
        images, present = (torch.from_numpy(np.stack(part)) for part in zip(*samples))
        return ChannelBatch(images, None if bool(present.all()) else present, key=key)


class Scaled(Collection):
    """Images that all have one scale: the run's, or one that is estimated from a sample of them."""

    def __init__(self, kind: _Cropped, entries: Entries, options: Any) -> None:
        super().__init__(kind, entries, options)
        kind.scale, notes = settle(entries, options, kind.wants.count)
        self.notes = (*self.notes, *notes)
        self._estimated = [name for name in SCALE if getattr(options, name) is None]

    @property
    def settled(self) -> dict[str, Any]:
        return self.kind.scale.settled()

    def resume(self, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        kept = {name: config[name] for name in self._estimated if config.get(name) is not None}
        self.kind.scale = self.kind.scale.kept(kept)  # the numbers, also when the data have grown


def shown_range(channels: int) -> tuple[Tensor, Tensor]:
    """(mean, std), float32 [C, 1, 1], that show normalised values from -2 to 2 as black to white."""
    return torch.full((channels, 1, 1), 0.5), torch.full((channels, 1, 1), 0.25)


def shown(column: Tensor) -> Tensor:
    """A column of a picture [B, C, H, W] as colours of the first three channels or, of fewer, as the first in grey."""
    return column[:, : 3 if column.shape[1] >= 3 else 1]


def standardised(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each channel [C, H, W] with mean 0 and variance 1, missing ones (NaN throughout) zero; and bool [C], which are
    there."""
    present = ~np.isnan(image).all((1, 2))
    if not present.any():
        raise ValueError("all of its channels are missing")
    image = np.nan_to_num(image).astype(np.float32)
    image = image - image.mean((1, 2), keepdims=True)
    image = image / np.sqrt(image.var((1, 2), keepdims=True) + 1e-5)
    return np.ascontiguousarray(image * present[:, None, None], dtype=np.float32), present


def made_channels(path: Path, part: int, side: int) -> np.ndarray:
    """float32 [5, side, side]: red, green and blue of a part of a photograph, the strength of its edges, and its
    brightness, blurred."""
    from PIL import Image, ImageFilter

    with Image.open(path) as image:
        rng = np.random.default_rng([part, side])
        short = min(image.size)
        width = int(short * rng.uniform(0.5, 1))
        left, top = (int(rng.uniform(0, 1) * (length - width)) for length in image.size)
        photo = image.convert("RGB").crop((left, top, left + width, top + width)).resize((side, side))
    grey = photo.convert("L")
    down, across = np.gradient(np.asarray(grey, dtype=np.float32))
    blurred = np.asarray(grey.filter(ImageFilter.GaussianBlur(side / 32)), dtype=np.float32)
    return np.stack([*np.asarray(photo, dtype=np.float32).transpose(2, 0, 1), np.hypot(down, across), blurred])
