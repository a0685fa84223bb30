"""Files of images with any number of channels: .npy, .npz, TIFF, and whatever else Pillow reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maefast.data.arrays import load_array
from maefast.data.blob import Blob, Where, ending, opened
from maefast.errors import BadFile, ConfigError, TrainError, need

ARRAYS, TIFFS = (".npy", ".npz"), (".tif", ".tiff")
_SEVERAL = ("LA", "RGB", "RGBA", "CMYK")  # Pillow's modes whose bands are channels
_ONE = ("L", "I", "F", "I;16", "I;16B", "I;16L")


def read_channels(where: Where, count: int, max_pixels: int | None = None) -> np.ndarray:
    """Numbers [C, height, width], as they are stored. Arrays and TIFFs are mapped into memory where they can be.

    Args:
        count: C. Arrays are [C, height, width] or [height, width, C] (the former, if both would do); axes of a TIFF
            other than its rows and columns are channels, as are its pages.
        max_pixels: refuse larger images; 0: none; None: Pillow's limit, for what Pillow reads.

    Raises:
        ValueError: it is something else; says what it is.
    """
    kind = ending(where)
    try:
        if kind in ARRAYS:
            return channels_first(load_array(where), count)
        return _tiff(where, count) if kind in TIFFS else _picture(where, count, max_pixels)
    except (ValueError, OSError, MemoryError, TrainError):
        raise
    except Exception as error:  # decoders have errors of their own: SyntaxError, struct.error, KeyError, ...
        raise ValueError(f"{type(error).__name__}: {error}") from error


def channels_first(array: np.ndarray, count: int) -> np.ndarray:
    """A view [count, height, width]. ValueError: it is something else."""
    if array.dtype.kind in "fiu" and 0 not in array.shape:
        if array.ndim == 2 and count == 1:
            return array[None]
        if array.ndim == 3 and array.shape[0] == count:
            return array
        if array.ndim == 3 and array.shape[2] == count:
            return array.transpose(2, 0, 1)
    raise ValueError(_wanted(count, f"{array.dtype} {list(array.shape)}"))


def _wanted(count: int, found: str) -> str:
    return f"an image is numbers [{count}, height, width] or [height, width, {count}], not {found} (see --channels)"


def _tiff(where: Where, count: int) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        raise need("tifffile", "Reading TIFFs with any number of channels", "data") from error
    with opened(where) as file, tifffile.TiffFile(file) as tiff:
        series = list(tiff.series)
        if not series:
            raise ValueError("a TIFF without an image")
        planes = [entry for entry in series if len(entry.shape) == 2 and entry.shape == series[0].shape]
        if len(series) > 1 and len(planes) == len(series) == count:  # pages of different types
            return channels_first(np.stack([entry.asarray() for entry in series]), count)
        found = series[0]
        axes, shape = found.axes, found.shape
        if {"Y", "X"} <= set(axes) and found.dtype is not None and found.dtype.kind in "fiu":
            y, x = axes.index("Y"), axes.index("X")
            rest = [place for place in range(len(shape)) if place not in (y, x)]
            if int(np.prod([shape[place] for place in rest], dtype=np.int64)) == count:
                return _values(where, tiff, found).transpose(*rest, y, x).reshape(count, shape[y], shape[x])
        raise ValueError(_wanted(count, f"a TIFF of {found.dtype} {list(shape)}, axes {axes}"))


def _values(where: Where, tiff: Any, series: Any) -> np.ndarray:
    """All values of a series; where they lie in a file as they are, without reading them."""
    offset = None if isinstance(where, Blob) else series.dataoffset
    if offset is None:
        return series.asarray()
    return np.memmap(where, tiff.byteorder + series.dtype.char, "r", offset, tuple(series.shape))


def _picture(where: Where, count: int, max_pixels: int | None) -> np.ndarray:
    from PIL import ImageOps

    from maefast.data.images.pixels import MAX_PIXELS, drawn_by_us, open_header

    most = MAX_PIXELS if max_pixels is None else max_pixels
    with open_header(where) as image:
        if drawn_by_us(image):
            raise ValueError("maefast drew this picture; it is no data")
        if 0 < most < image.width * image.height:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {most} (--max-pixels)")
        if image.mode not in _SEVERAL + _ONE:
            raise ValueError(f"its pixels are of Pillow's mode {image.mode}, which are no channels")
        found = np.asarray(ImageOps.exif_transpose(image))
    if (found.shape[2] if found.ndim == 3 else 1) != count:
        raise ValueError(_wanted(count, f"{found.dtype} {list(found.shape)}"))
    return channels_first(found, count) if count == 1 else found.transpose(2, 0, 1)


class Stack:
    """Images that lie in one array, [N, C, height, width] or [N, height, width, C], as `collection.Entries`."""

    notes: Sequence[str] = ()

    def __init__(self, path: Path, count: int) -> None:
        self.name, self.count = str(path), count
        try:
            self._images = load_array(path)
        except (ValueError, OSError, EOFError) as error:
            raise ConfigError(f"--data {path}: {error}") from error
        shape, dtype = self._images.shape, self._images.dtype
        if len(shape) == 3 and count in (shape[0], shape[2]):  # one image
            self._images = self._images[None]
        if not shape or not shape[0] or dtype.kind not in "fiu":
            raise ConfigError(f"--data {path}: no images in it, {dtype} {list(shape)}")
        try:
            channels_first(self._images[0], count)
        except ValueError as error:
            many = (
                f"{dtype} {list(shape)}, images [N, {count}, height, width] or [N, height, width, {count}] are wanted"
            )
            raise ConfigError(f"--data {path}: {many} (see --channels)") from error

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            return channels_first(self._images[index], self.count)
        except ValueError as error:
            raise BadFile(self.label(index), str(error)) from error

    def label(self, index: int) -> str:
        return f"{Path(self.name).name}[{index}]"
