"""Volumes: CT, MRI, stacks of microscopes; arrays, TIFF, NIfTI, and made ellipsoids as a demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maefast.data.collection import DEMO, Collection, Files, Made
from maefast.data.images.options import parse_value_range
from maefast.data.volume_files import ENDINGS, read_volume
from maefast.errors import ConfigError
from maefast.nn.patches import Reconstruction
from maefast.ops import _checks
from maefast.recipe import Batch, Picture

_VOLUMES = 64  # of the demo
_KEPT = 2**25  # voxels of the demo that a process keeps
_VOXELS = 2**17  # that a volume's mean and deviation are taken from
_TRIES = 64  # to hit the foreground


@dataclass
class VolumeBatch(Batch):
    """volumes: float32 [B, C, D, H, W]."""

    volumes: Tensor


@dataclass(frozen=True)
class Volumes:
    """A recipe wants `VolumeBatch`es: crops of `channels` C and `size` (D, H, W) voxels, as they are stored: nothing is
    resampled, so bring volumes to one spacing before.

    `--data` names a folder of .npy, .npz, .tif or .nii files, see `volume_files.read_volume`. A volume that is smaller
    than the crop is padded with its least value. `--flip` is the probability of a flip along each axis by itself.

    Args:
        window: (low, high), values are cut off there and mapped to 0 ... 1, such as Hounsfield units; `--value-range`
            LOW,HIGH instead of it. None: each channel of a volume has mean 0 and deviation 1.
        foreground: share of the crops whose centre is a voxel above the window's lower end, or above the mean.
        turn: share of the crops that are turned by a quarter or more in the plane of the last two axes (by a half
            where these differ in length).
        jitter: (amount, share): of so many crops the values are scaled by 1 - amount ... 1 + amount, and of as many,
            drawn apart, shifted by -amount ... amount.
    """

    channels: int = 1
    size: tuple[int, int, int] = (96, 96, 96)
    window: tuple[float, float] | None = None
    foreground: float = 0.0
    turn: float = 0.0
    jitter: tuple[float, float] = (0.0, 0.0)
    unit = "volume"
    options = ("flip", "value_range")

    def __post_init__(self) -> None:
        _checks.integer("channels", self.channels, 1)
        if len(self.size) != 3:
            raise ValueError(f"size must be (depth, height, width), got {self.size}")
        for side in self.size:
            _checks.integer("size", side, 1)
        if self.window is not None and not -np.inf < self.window[0] < self.window[1] < np.inf:
            raise ValueError(f"window must be (low, high) with low < high, got {self.window}")
        for name, share in (("foreground", self.foreground), ("turn", self.turn), ("jitter", self.jitter[1])):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: a share lies in [0, 1], got {share}")

    def open(self, options: Any) -> Collection:
        kind = _Cropped(self, options)
        if options.data == DEMO:
            return Collection(kind, self._demo(), options)
        read = partial(read_volume, channels=self.channels)
        return Collection(kind, Files(options.data, ENDINGS, read, "volumes", options), options)

    def check(self, batch: Any) -> None:
        """Raise unless it is a batch of such volumes."""
        if not isinstance(batch, VolumeBatch):
            raise TypeError(f"a VolumeBatch is wanted, got {type(batch).__name__}")
        _checks.tensor("volumes", batch.volumes, ndim=5)
        want = (self.channels, *self.size)
        if tuple(batch.volumes.shape[1:]) != want:
            sizes = ", ".join(map(str, want))
            raise ValueError(f"volumes must be [B, {sizes}], got {tuple(batch.volumes.shape)}")

    def _demo(self) -> Made:
        size = tuple(side + side // 3 for side in self.size)  # room for crops
        keep = lru_cache(maxsize=max(1, min(_VOLUMES, _KEPT // (self.channels * int(np.prod(size))))))
        make = keep(lambda index: ellipsoids(index, size, self.channels, self.window or (-175.0, 250.0)))
        return Made("ellipsoids", _VOLUMES, make, lambda index: f"ellipsoids {index}")


class _Cropped:
    """`Volumes` as the options of a run want them, as a `Kind`."""

    def __init__(self, wants: Volumes, options: Any) -> None:
        self.wants, self.unit, self.flip = wants, wants.unit, options.flip
        span = parse_value_range(options.value_range)
        if isinstance(span, str):
            raise ConfigError(
                f"--value-range {span}: of volumes give numbers, LOW,HIGH; percentiles are of photographs"
            )
        self.window = span or wants.window

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.wants!r}, window={self.window}, flip={self.flip})"

    def sample(self, raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """float32 [C, D, H, W]."""
        shift, scale = self._scale(raw)
        size, shape = np.array(self.wants.size), np.array(raw.shape[1:])
        room = np.maximum(shape - size, 0)
        start = rng.integers(0, room + 1)
        if rng.random() < self.wants.foreground:
            for place in rng.integers(0, shape, (_TRIES, 3)):
                if (raw[(slice(None), *place)] > shift).any():
                    start = np.clip(place - size // 2, 0, room)
                    break
        crop = self._crop(raw, start, shift, scale)
        axes = [1 + axis for axis in range(3) if rng.random() < self.flip]
        crop = np.flip(crop, axes) if axes else crop
        if rng.random() < self.wants.turn:
            quarters = int(rng.integers(1, 4))
            crop = np.rot90(crop, quarters if size[1] == size[2] else 2, (2, 3))
        amount, share = self.wants.jitter
        if rng.random() < share:
            crop = crop * np.float32(1 + rng.uniform(-amount, amount))
        if rng.random() < share:
            crop = crop + np.float32(rng.uniform(-amount, amount))
        return np.ascontiguousarray(crop)

    def example(self, raw: np.ndarray) -> np.ndarray:
        """The crop in the middle."""
        room = np.maximum(np.array(raw.shape[1:]) - self.wants.size, 0)
        return self._crop(raw, room // 2, *self._scale(raw))

    def collate(self, samples: Sequence[np.ndarray], key: np.ndarray) -> VolumeBatch:
        return VolumeBatch(torch.from_numpy(np.stack(samples)), key=key)

    def _scale(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 [C] each, with which values become (value - shift) / scale."""
        if self.window is not None:
            low, high = self.window
            return tuple(np.full(len(raw), part, np.float32) for part in (low, high - low))
        step = max(1, round((np.prod(raw.shape[1:]) / _VOXELS) ** (1 / 3)))
        some = np.asarray(raw[:, ::step, ::step, ::step], np.float64).reshape(len(raw), -1)
        some = np.where(np.isfinite(some), some, np.nan)
        if np.isnan(some).all(1).any():
            raise ValueError("a channel has no finite value")
        deviation = np.nanstd(some, 1)
        return np.nanmean(some, 1).astype(np.float32), np.where(deviation > 0, deviation, 1).astype(np.float32)

    def _crop(self, raw: np.ndarray, start: np.ndarray, shift: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """[C, D, H, W] from `start` on, in the middle of what is padded; NaN is the least value."""
        size = self.wants.size
        cut = np.asarray(raw[(slice(None), *(slice(s, s + side) for s, side in zip(start, size)))], np.float32)
        if self.window is not None:
            cut = np.clip(cut, *self.window)
        cut = (cut - shift[:, None, None, None]) / scale[:, None, None, None]
        known = np.isfinite(cut)
        low = np.float32(0) if self.window is not None else cut.min(initial=np.inf, where=known)
        if not np.isfinite(low):
            raise ValueError("the crop has no finite value")
        cut = cut if known.all() else np.where(known, cut, low)
        lacks = [side - there for side, there in zip(size, cut.shape[1:])]
        if any(lacks):
            around = [(0, 0), *((lack // 2, lack - lack // 2) for lack in lacks)]
            cut = np.pad(cut, around, constant_values=low)
        return np.ascontiguousarray(cut, dtype=np.float32)


def ellipsoids(
    index: int, size: tuple[int, int, int], channels: int = 1, window: tuple[float, float] = (-175.0, 250.0)
) -> np.ndarray:
    """A body with organs and vessels, all of them ellipsoids with soft edges, another one for each number: float32
    [C, D, H, W] within the window, outside of the body its lower end; each channel sees other contrasts."""
    rng = np.random.default_rng([index, 7])
    at = np.stack(np.meshgrid(*(np.linspace(-1, 1, side, dtype=np.float32) for side in size), indexing="ij"))
    shapes = [(rng.uniform(-0.1, 0.1, 3), rng.uniform(0.75, 0.95, 3))]
    shapes += [(rng.uniform(-0.5, 0.5, 3), rng.uniform(0.15, 0.45, 3)) for _ in range(rng.integers(6, 10))]
    shapes += [(rng.uniform(-0.4, 0.4, 3), np.array([0.9, *rng.uniform(0.05, 0.1, 2)])) for _ in range(2)]
    values = np.zeros((channels, *size), np.float32)
    body = None
    for number, (centre, radii) in enumerate(shapes):
        turn = np.eye(3) if number == 0 else np.linalg.qr(rng.standard_normal((3, 3)))[0]
        turn = turn / radii[:, None]
        far = np.tensordot(turn.astype(np.float32), at, 1) - (turn @ centre).astype(np.float32)[:, None, None, None]
        edge = float(radii.min() * min(size))  # so that an edge is about a voxel wide
        inside = 1 / (1 + np.exp(np.clip((np.sqrt((far**2).sum(0)) - 1) * edge, -30, 30)))
        body = inside if body is None else body
        inside = inside * body  # no organ leaves the body
        for channel in values:
            channel += inside * (float(rng.uniform(0.15, 0.9)) - channel)
    wave = np.tensordot(rng.uniform(2, 5, 3).astype(np.float32), at, 1)
    values += 0.05 * body * np.sin(wave + float(rng.uniform(0, 6)))
    low, high = window
    return low + values.clip(0, 1) * np.float32(high - low)


def sheet(shown: Reconstruction, names: Sequence[str], caption: str, slices: int = 2) -> Picture:
    """Some slices along the first axis of each volume [B, C, D, H, W], a row each, of the first channel, from its
    darkest to its brightest half percent; what is masked is grey there (empty voxels are black), and what is not, in
    its prediction."""
    from maefast.data.images.pictures import HIDDEN, Sheet, to_pixels

    depth = shown.original.shape[2]
    picked = [(2 * i + 1) * depth // (2 * slices) for i in range(slices)]
    original, pasted, mask = (part[:, 0, picked] for part in (shown.original, shown.pasted, shown.mask))
    rows = original.flatten(1).float().sort(1).values
    least = rows.shape[1] // 200
    low, high = (rows[:, place, None, None, None] for place in (least, -1 - least))
    original, pasted = ((part.float() - low) / (high - low).clamp_min(1e-6) for part in (original, pasted))
    columns = original, original.masked_fill(mask, HIDDEN), pasted.masked_fill(~mask, HIDDEN), pasted
    columns = [to_pixels(column.flatten(0, 1)[:, None]) for column in columns]
    return Sheet(columns, [f"{name}, slice {place}" for name in names for place in picked], caption)
