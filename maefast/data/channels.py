"""Images with any number of channels, some perhaps missing; photographs with channels made of them as a demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maefast.data.arrays import load_array
from maefast.data.collection import DEMO, Collection, Files, Made
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
    """A recipe wants `ChannelBatch`es of `count` channels C and `size` (H, W).

    `--data` names a folder of .npy or .npz arrays, numbers [C, height, width]; a channel without a finite value is
    missing, a pixel that is not finite has its channel's mean. Each channel of a sample is normalised by its own mean
    and standard deviation. Crops and flips as of images.
    """

    count: int = 5
    size: tuple[int, int] = (224, 224)
    unit = "image"
    options = ("crop_scale", "crop_ratio", "flip")

    def open(self, options: Any) -> Collection:
        kind = _Cropped(self, options)
        if options.data != DEMO:
            read = Files(options.data, (".npy", ".npz"), lambda path: read_channels(path, self.count), "arrays")
            return Collection(kind, read, options)
        from maefast.data.images.files import shipped_photographs

        paths = shipped_photographs()
        made = Made(
            "photographs with made channels",
            len(paths) * _PARTS,
            lambda index: made_channels(paths[index // _PARTS], index % _PARTS, 2 * max(self.size))[: self.count],
            lambda index: f"{paths[index // _PARTS].stem}, part {index % _PARTS}",
        )
        return Collection(kind, made, options)

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


class _Cropped(Cropped):
    """`Channels` with the crops that the options of a run name, as a `Kind`."""

    def sample(self, raw: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        image = self._resized(raw, self.augment.box(raw.shape[2], raw.shape[1], rng))
        return standardised(image[:, :, ::-1] if rng.random() < self.augment.flip else image)

    def example(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return standardised(self._resized(raw, self.centre(raw.shape[2], raw.shape[1])))

    def _resized(self, raw: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
        left, top, right, bottom = box
        with np.errstate(over="ignore"):  # beyond float32
            cut = np.ascontiguousarray(raw[:, top:bottom, left:right], dtype=np.float32)
        cut = torch.from_numpy(filled(cut))
        size = {"size": self.wants.size, "mode": "bilinear", "antialias": True, "align_corners": False}
        return torch.nn.functional.interpolate(cut[None], **size)[0].numpy()

    def collate(self, samples: Sequence[tuple[np.ndarray, np.ndarray]], key: np.ndarray) -> ChannelBatch:
        images, present = (torch.from_numpy(np.stack(part)) for part in zip(*samples))
        return ChannelBatch(images, None if bool(present.all()) else present, key=key)


def filled(image: np.ndarray) -> np.ndarray:
    """[C, H, W] with the mean of its finite pixels in a channel's others; NaN throughout where it has none."""
    known = np.isfinite(image)
    if known.all():
        return image
    count = known.sum((1, 2), keepdims=True)
    total = np.where(known, image, 0).sum((1, 2), keepdims=True, dtype=np.float64)
    return np.where(known, image, np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32))


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


def read_channels(path: Path, count: int) -> np.ndarray:
    """[C, height, width]. ValueError: it is something else."""
    array = load_array(path)
    if array.ndim != 3 or array.shape[0] != count or array.dtype.kind not in "fiu":
        raise ValueError(f"an image is numbers [{count}, height, width], not {array.dtype} {list(array.shape)}")
    return array


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
