"""JPEG files by libjpeg-turbo itself (simplejpeg): as Pillow decodes them, without its detour, and large photographs
smaller at once. What it does not do alike is left to Pillow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

try:
    import simplejpeg
except ImportError:  # pragma: no cover - the extra is installed wherever tests run
    simplejpeg = None

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif")
# A photograph is decoded at a half, a quarter or an eighth while what is left is still so many times too large. Beyond
# it the filter decides alone how the result looks.
GAP = 3.0

LEFT, UP = (2, 3, 6, 7), (3, 4, 7, 8)  # EXIF's numbers of pictures that are turned round, left to right and so on

Box = tuple[float, float, float, float]  # left, top, right, bottom


class Cut(NamedTuple):
    """Pixels uint8 [H, W, C], and the box of them that was asked for."""

    pixels: np.ndarray
    box: Box


@dataclass(frozen=True)
class Jpeg:
    """A JPEG file that is decoded when it is known what of it is wanted.

    Attributes:
        width, height: upright. channels: 3 or 1. space: of its colours, "Gray", "YCbCr" or "RGB". orientation:
            EXIF's, 1 to 8.
    """

    data: bytes
    width: int
    height: int
    channels: int
    space: str
    orientation: int = 1

    @property
    def grey(self) -> bool:
        return self.space == "Gray"

    @property
    def stored(self) -> tuple[int, int]:
        """(height, width) as it lies in the file."""
        return (self.height, self.width) if self.orientation < 5 else (self.width, self.height)

    @property
    def nbytes(self) -> int:
        """Of memory that it takes."""
        return len(self.data)

    def cut(self, box: tuple[int, int, int, int], size: tuple[int, int]) -> Cut:
        """The pixels of a box that becomes `size` (height, width). ValueError: they cannot be decoded."""
        left, top, right, bottom = box
        shrunk = shrinkage(right - left, bottom - top, size)
        pixels = self.decode(shrunk)
        # The last pixel of a smaller image may stand for less than the others; turned round it is the first.
        x = pixels.shape[1] * shrunk - self.width if self.orientation in LEFT else 0
        y = pixels.shape[0] * shrunk - self.height if self.orientation in UP else 0
        return Cut(*_inside(pixels, (left + x, top + y, right + x, bottom + y), shrunk))

    def decode(self, shrunk: int = 1) -> np.ndarray:
        """All of it, upright, 1, 2, 4 or 8 times smaller: uint8 [H, W, C]."""
        space = "GRAY" if self.grey and self.channels == 1 else "RGB"
        least = {"min_factor": shrunk} if shrunk > 1 else {}
        if shrunk > 1:  # sides as they lie in the file, the least that such a factor gives
            sides = self.stored
            least |= {"min_height": -(-sides[0] // shrunk), "min_width": -(-sides[1] // shrunk)}
        pixels = simplejpeg.decode_jpeg(self.data, space, **least)
        if self.channels == 1 and not self.grey:
            from PIL import Image

            pixels = np.array(Image.fromarray(pixels).convert("L"))[..., None]
        return upright(pixels, self.orientation)


@dataclass(frozen=True)
class Whole:
    """An image that is decoded: uint8 [H, W, C]."""

    pixels: np.ndarray

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes

    def cut(self, box: tuple[int, int, int, int], size: tuple[int, int]) -> Cut:
        """As `Jpeg.cut`."""
        return Cut(*_inside(self.pixels, box, 1))


def shrinkage(width: int, height: int, size: tuple[int, int]) -> int:
    """How many times smaller a crop of width x height may be decoded that becomes `size` (height, width)."""
    spare = min(height / size[0], width / size[1]) / GAP
    return next((factor for factor in (8, 4, 2) if spare >= factor), 1)


def opened(data: bytes, channels: int) -> Jpeg | None:
    """What a file holds, by its header, as it lies; None where Pillow has to see it: other colour spaces, damaged
    headers."""
    if simplejpeg is None:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if space not in ("Gray", "YCbCr", "RGB"):
        return None
    return Jpeg(data, width, height, channels, space)


def has_exif(data: bytes) -> bool:
    """Whether a segment of EXIF tags stands before the picture."""
    return any(marker == 0xE1 and data[at : at + 4] == b"Exif" for marker, at in _segments(data))


def is_baseline(data: bytes) -> bool:
    """Whether it is the usual kind of file, sequential with Huffman codes and eight bits, and not cut off."""
    eight = any(marker == 0xC0 and data[at : at + 1] == b"\x08" for marker, at in _segments(data))
    return eight and data.endswith(b"\xff\xd9")


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(marker, where its content begins) of the segments before the picture."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:  # the picture
            return
        if marker != 0xFF:
            yield marker, at + 4
        at += 1 if marker == 0xFF else 2 + length  # a marker may be padded


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, C] turned by EXIF's number."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in LEFT:
        pixels = pixels[:, ::-1]
    if orientation in UP:
        pixels = pixels[::-1]
    return pixels


def _inside(pixels: np.ndarray, box: tuple[int, int, int, int], shrunk: int) -> tuple[np.ndarray, Box]:
    """The whole pixels that a box of the full image touches, and the box within them."""
    left, top, right, bottom = (side / shrunk for side in box)
    x, y = int(left), int(top)
    end_x, end_y = min(pixels.shape[1], -int(-right // 1)), min(pixels.shape[0], -int(-bottom // 1))
    return pixels[y:end_y, x:end_x], (left - x, top - y, min(right, end_x) - x, min(bottom, end_y) - y)
