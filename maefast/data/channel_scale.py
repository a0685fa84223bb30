"""The mean and standard deviation of each channel of a data set: given, or estimated once from a sample of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from maefast import seeds
from maefast.data.images.options import parse_value_range
from maefast.data.source import advice
from maefast.errors import BadFile, ConfigError

if TYPE_CHECKING:
    from maefast.data.collection import Entries

SCALE = ("mean", "std")  # options of a run
IMAGES, PIXELS = 256, 4096  # of the sample, and of each image of it
_FEW = 4  # images that are looked at where nothing has to be estimated
_DIGITS = 6


@dataclass(frozen=True, eq=False)
class Scale:
    """What becomes of values: (value - mean) / std, each float64 [C, 1, 1]; before, with a `span` (low, high), values
    are cut off there and mapped to 0 ... 1."""

    mean: np.ndarray
    std: np.ndarray
    span: tuple[float, float] | None = None

    @staticmethod
    def of(options: Any, count: int) -> Scale:
        """As the options of a run say it. ConfigError: `mean` or `std` are not given, or of another number."""
        parts = [_given(name, getattr(options, name), count) for name in SCALE]
        if any(part is None for part in parts):
            raise ConfigError("--mean and --std are not given")
        return Scale(*parts, _span(options))

    def __call__(self, cut: np.ndarray) -> np.ndarray:
        """Values of any type [C, h, w] -> float32, contiguous; those that are not finite have their channel's mean.
        ValueError: a channel has none."""
        exact = (cut.dtype.kind == "f" and cut.dtype.itemsize <= 4) or cut.dtype.itemsize <= 2
        values = np.ascontiguousarray(cut, dtype=np.float32 if exact else np.float64)
        shift, width = (part.astype(values.dtype) for part in self._steps())
        if self.span is not None:
            values = values.clip(*self.span)
        with np.errstate(over="ignore", invalid="ignore"):  # beyond float32
            values = filled(((values - shift) / width).astype(np.float32))
        if (empty := np.isnan(values).all((1, 2))).any():
            raise ValueError(f"channel {int(np.flatnonzero(empty)[0])} has no finite value in the crop")
        return values

    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = self.span or (0.0, 1.0)
        return low + self.mean * (high - low), self.std * (high - low)

    def settled(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).ravel().tolist() for name in SCALE}

    def kept(self, numbers: Mapping[str, Sequence[float]]) -> Scale:
        """With these in place of its own."""
        count = len(self.mean)
        return replace(self, **{name: _given(name, values, count) for name, values in numbers.items()})


def settle(entries: Entries, options: Any, count: int) -> tuple[Scale, list[str]]:
    """The scale of `entries`, each [C, height, width], and lines for the user. A function of the data and the options.

    Raises:
        ConfigError: options that do not fit. BadFile: an image of the sample cannot be used; with `skip_bad`, none can.
    """
    given = {name: _given(name, getattr(options, name), count) for name in SCALE}
    span = _span(options)
    missing = [name for name in SCALE if given[name] is None]
    values = _sample(entries, IMAGES if missing else _FEW, options.skip_bad)
    notes = []
    if not missing:
        return Scale(given["mean"], given["std"], span), notes
    if span is not None:
        low, high = span
        values = [(part.clip(low, high) - low) / (high - low) for part in values]
    channels = [np.concatenate([part[channel] for part in values]) for channel in range(count)]
    channels = [part[np.isfinite(part)] for part in channels]
    if empty := [channel for channel, part in enumerate(channels) if not len(part)]:
        raise ConfigError(f"channel {empty[0]} has no finite value in a sample of the images: give --mean and --std")
    found = {"mean": [float(part.mean()) for part in channels], "std": [float(part.std()) for part in channels]}
    if flat := [channel for channel, value in enumerate(found["std"]) if not value > 0]:
        found["std"] = [value if value > 0 else 1.0 for value in found["std"]]
        notes.append(
            f"warning: channel(s) {', '.join(map(str, flat))} have one value throughout a sample of the images"
        )
    numbers = {name: [float(f"{value:.{_DIGITS}g}") for value in found[name]] for name in missing}
    if not np.isfinite([value for part in numbers.values() for value in part]).all():
        raise ConfigError("the values of the images are too large for a mean and a standard deviation: give both")
    said = "; ".join(f"--{name} {','.join(f'{value:g}' for value in numbers[name])}" for name in missing)
    notes.append(f"estimated from a sample of {len(values)} image(s), and kept: {said}")
    parts = {**given, **{name: _given(name, numbers[name], count) for name in missing}}
    return Scale(parts["mean"], parts["std"], span), notes


def filled(image: np.ndarray) -> np.ndarray:
    """[C, H, W] with the mean of its finite pixels in a channel's others; NaN throughout where it has none."""
    known = np.isfinite(image)
    if known.all():
        return image
    count = known.sum((1, 2), keepdims=True)
    total = np.where(known, image, 0).sum((1, 2), keepdims=True, dtype=np.float64)
    return np.where(known, image, np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(image.dtype))


def _sample(entries: Entries, count: int, skip_bad: bool) -> list[np.ndarray]:
    """float64 [C, pixels] of up to `count` images, drawn by chance, the same ones each time."""
    indices = np.arange(len(entries))
    if len(entries) > count:
        indices = np.sort(seeds.generator(0, seeds.SAMPLE).choice(len(entries), count, replace=False))
    values, first = [], None
    for index in indices.tolist():
        try:
            image = entries[index]
            pixels = image.shape[1] * image.shape[2]
            places = seeds.generator(0, seeds.SAMPLE, 2, index).choice(pixels, min(PIXELS, pixels), replace=False)
            rows, columns = np.divmod(np.sort(places), image.shape[2])
            values.append(np.asarray(image[:, rows, columns], dtype=np.float64))
        except BadFile as error:
            first = first or error
            if not skip_bad:
                break
    if first is not None and (not skip_bad or not values):
        tip = "none of a sample of the images can be read"
        if not skip_bad:
            tip = advice(len(entries), "image", entries.__getitem__)
        raise type(first)(first.path, first.reason, tip) from first
    return values


def _given(name: str, values: Sequence[float] | None, count: int) -> np.ndarray | None:
    if values is None:
        return None
    if len(values) not in (1, count):
        raise ConfigError(f"--{name} wants one number, or one for each of {count} channels, not {len(values)}")
    return np.broadcast_to(np.array(values, np.float64), (count,)).reshape(count, 1, 1)


def _span(options: Any) -> tuple[float, float] | None:
    span = parse_value_range(options.value_range)
    if isinstance(span, str):
        raise ConfigError(
            f"--value-range {span}: with --channels give numbers, LOW,HIGH; percentiles are of photographs"
        )
    return span
