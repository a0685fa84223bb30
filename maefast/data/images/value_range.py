"""What is black and what is white in a data set, found once from a sample of it.

Only where the files do not tell: floats and 32-bit integers have no scale, and percentiles are asked for by the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from maefast import seeds
from maefast.data.blob import Where
from maefast.data.records import Records
from maefast.errors import ConfigError, Unreachable

from .options import parse_value_range
from .pixels import (
    STRAYS,
    TOLERANCE,
    Decoder,
    drawn_by_us,
    flat,
    is_deep,
    kind,
    open_header,
    own_white,
    refuse_signed,
    stored_units,
    values_of,
)

HEADERS, FILES, PIXELS = 256, 64, 65536  # looked at: headers, whole files of those, values of each file
LEAST = 0.05  # share of the scale that a set should use; of values, or files, that may be outside of it
WIDE = 0.25  # of a given range that the bits of a file should be able to reach
SCALES = (1.0, 255.0, 65535.0)


@dataclass
class _Kind:
    """Files of one kind in the sample. `white`: by their bits, or None. `deep`: of more than 8, as they are read."""

    name: str
    white: float | None
    deep: bool
    paths: list[Where]
    low: float = 0.0
    high: float = 0.0
    highs: list[float] = field(default_factory=list)  # of each file
    values: np.ndarray | None = None


def settle(images: Records, decoder: Decoder, value_range: Any) -> tuple[Decoder, list[str]]:
    """`decoder` with the range or the scale of this data set, and lines about what was found and what looks wrong.

    Deterministic: a function of the files. Reading a set of 8-bit files costs `HEADERS` headers.

    Raises:
        ConfigError: percentiles of a set of different kinds, or of one value; values that have no usual scale.
    """
    wanted = parse_value_range(value_range)
    kinds = _sample(images, decoder)
    if isinstance(wanted, tuple):
        decoder = replace(decoder, value_range=wanted)
        return decoder, _hints([_measure(entry) for entry in kinds], wanted)
    if wanted is not None:
        return _percentiles(kinds, decoder, wanted)
    deep = [_measure(entry) for entry in kinds if entry.deep]
    lines = []
    for entry in deep:
        if entry.white is None and entry.paths:
            entry.white = (decoder.scale or {}).get(entry.name)
            if entry.white is None:
                entry.white, line = _find_scale(entry)
                lines.append(line)
            decoder = replace(decoder, scale={**(decoder.scale or {}), entry.name: entry.white})
    return decoder, lines + _hints(deep, None)


def _draw(count: int, size: int, *purpose: int) -> np.ndarray:
    """`count` of `size` indices, in order: by chance, for a regular step could follow a pattern in names or pixels."""
    if size <= count:
        return np.arange(size)
    return np.sort(seeds.generator(0, seeds.SAMPLE, *purpose).choice(size, count, replace=False))


def _sample(images: Records, decoder: Decoder) -> list[_Kind]:
    kinds: dict[tuple[str, float | None, bool], _Kind] = {}
    for index in _draw(HEADERS, len(images)):
        path = images.path(int(index))
        try:
            with open_header(path) as image:
                if 0 < decoder.max_pixels < image.width * image.height or drawn_by_us(image):
                    continue
                deep = is_deep(image)
                white = own_white(image) if deep else 255.0 * max(1.0, stored_units(image, path))
                key = kind(image), white, deep
        except Unreachable:
            raise
        except Exception:  # met again, and told, when it is read
            continue
        kinds.setdefault(key, _Kind(*key, [])).paths.append(path)
    return list(kinds.values())


def _measure(entry: _Kind) -> _Kind:
    """With values of up to `FILES` of its files, and their range but for strays, such as hot pixels."""
    parts, lows, highs = [], [], []
    for index in _draw(FILES, len(entry.paths), 1):
        path = entry.paths[index]
        try:
            with open_header(path) as image:
                unit = stored_units(image, path)
                image.load()
                refuse_signed(image)
                values = values_of(image) if is_deep(image) else np.asarray(flat(image).convert("RGB"))
        except Unreachable:
            raise
        except Exception:
            continue
        values = values.reshape(-1, *values.shape[2:])  # pixels
        values = values[_draw(PIXELS, len(values), 2, int(index))].astype(np.float64).ravel() * unit
        values = values[np.isfinite(values)]
        if values.size:
            lows.append(np.quantile(values, STRAYS / 10, method="lower"))
            highs.append(np.quantile(values, 1 - STRAYS / 10, method="higher"))
            parts.append(values)
    if not parts:
        return replace(entry, paths=[])
    return replace(entry, low=float(min(lows)), high=float(max(highs)), highs=highs, values=np.concatenate(parts))


def _find_scale(entry: _Kind) -> tuple[float, str]:
    """White of one kind of files: kinds in one set have nothing to do with each other."""
    low, high, name = entry.low, entry.high, entry.name
    scales = SCALES if name == "float" else SCALES[1:]
    scale = next((scale for scale in scales if high <= TOLERANCE * scale), None)
    if scale is None or low < min(0.0, (1 - TOLERANCE) * high):
        raise ConfigError(
            f"the {name} images have values from {low:g} to {high:g} (in a sample of the set), and no usual scale: "
            f"give --value-range {low:g},{high:g}, or percentiles such as --value-range 1%,99%"
        )
    line = f"{name} images: 0 is black and {scale:g} white, by a sample of the set with values up to {high:g}"
    return scale, f"{line} (--value-range sets it)"


def _percentiles(kinds: list[_Kind], decoder: Decoder, wanted: str) -> tuple[Decoder, list[str]]:
    measured = [entry for entry in map(_measure, kinds) if entry.paths]
    if len(measured) != 1:
        names = ", ".join(entry.name for entry in measured) or "no readable file"
        raise ConfigError(f"--value-range {wanted}: percentiles need images of one kind, and the set has {names}")
    (entry,) = measured
    low, high = np.percentile(entry.values, [float(part.rstrip("%")) for part in wanted.split(",")])
    low, high = float(f"{low:.6g}"), float(f"{high:.6g}")
    if not low < high:
        raise ConfigError(f"--value-range {wanted}: both percentiles of the sample are {low:g}")
    line = f"--value-range {wanted} is {low:g},{high:g} in a sample of {min(FILES, len(entry.paths))} images"
    return replace(decoder, value_range=(low, high)), [line]


def _hints(kinds: Sequence[_Kind], given: tuple[float, float] | None) -> list[str]:
    """A line for each kind whose images come out nearly black, flat, or with much of them outside of the range."""
    lines = []
    for entry in kinds:
        low, high = given or (0.0, entry.white or 0.0)
        if not entry.paths or high <= low:
            continue
        used = (min(entry.high, high) - max(entry.low, low)) / (high - low)
        bits = next((b for b in (10, 12, 14) if entry.high <= 2**b - 1 < high), None)
        bits = bits if given is None and entry.name != "float" and entry.high > 255 else None
        dark = sum(value - low < LEAST * (high - low) for value in entry.highs)
        outside = float(np.mean((entry.values < low) | (entry.values > high)))
        text = f"warning: values of the {entry.name} images lie from {entry.low:g} to {entry.high:g} in a sample"
        whole = f" (--value-range {entry.low:g},{entry.high:g} would use it all)" if entry.low < entry.high else ""
        if bits is not None:
            lines.append(f"{text}: {bits}-bit data? --value-range 0,{2**bits - 1} would use all of the scale")
        elif used < LEAST:
            lines.append(
                f"{text}: {max(used, 0):.1%} of the range from {low:g} to {high:g} is used, "
                f"so they are nearly one grey{whole}"
            )
        elif given is not None and entry.white is not None and entry.white < WIDE * (high - low):
            lines.append(f"{text}: of the range from {low:g} to {high:g} they can use {entry.white / (high - low):.0%}")
        elif outside > LEAST:
            lines.append(f"{text}: {outside:.0%} of them are outside of the range from {low:g} to {high:g}{whole}")
        elif dark > LEAST * len(entry.highs):
            lines.append(
                f"{text}: {dark} of {len(entry.highs)} files use less than {LEAST:.0%} of the range to {high:g}"
            )
    return lines
