"""Decoding image files: one rule for a whole data set, from the values in a file to grey levels.

What is black and what is white is never taken from one image alone. 8-bit files and integers whose files tell their
bits have a scale of their own; `value_range` finds that of floats and 32-bit integers once for a set, and the user's
range (`--value-range`) stands above all.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from maefast.data.blob import Blob, Where, ending, opened
from maefast.data.runs import SOFTWARE
from maefast.errors import BadImage, Unreachable, need

from . import jpeg

try:
    from PIL import ExifTags, Image, ImageOps
except ImportError as error:  # pragma: no cover - the extra is installed wherever tests run
    raise need("pillow", "Reading images") from error

# Above it Pillow takes an image for a decompression bomb and refuses it.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_SIGNED, _WHITE_IS_ZERO = 2, 0
_ON_ITS_SIDE = (5, 6, 7, 8)  # by the tag of orientation
# How far above white (or below black) values may lie, and what share of a file's may lie further still: hot pixels.
TOLERANCE, STRAYS = 1.1, 0.01


@dataclass(frozen=True)
class Decoder:
    """How the files of a data set become images.

    Attributes:
        channels: 3 (RGB) or 1 (grey).
        value_range: (low, high), the values, as they are stored, that become black and white in every file; None: by
            the kind of the file.
        scale: white of the kinds (see `kind`) whose files do not tell it, without a range. Where it has none, it is 1
            for floats, and other kinds are refused. So are files that go beyond.
        bits: 8, or 16 to keep 16 bits of grey images (Pillow reads colour with 8 only).
        max_pixels: refuse larger images; 0: no limit.
    """

    channels: int = 3
    value_range: tuple[float, float] | None = None
    scale: Mapping[str, float] | None = None
    bits: int = 8
    max_pixels: int = MAX_PIXELS

    def __call__(self, path: Where) -> Image.Image:
        """Decode a file completely, turned upright by its EXIF tag: an image of mode "RGB", "L", or, for 16 bits, "F"
        with values from 0 to 65535. Transparent pixels are laid on white, only the first frame of an animation is read.

        Raises:
            BadImage: it cannot be decoded; names the file.
        """
        try:
            with open_header(path) as image:
                pixels = image.width * image.height
                if 0 < self.max_pixels < pixels:
                    raise ValueError(
                        f"{image.width} x {image.height} = {pixels} pixels are more than {self.max_pixels}, the limit "
                        "against decompression bombs; --max-pixels N raises it, 0 lifts it"
                    )
                if drawn_by_us(image):
                    raise ValueError("maefast drew this picture; it is no data")
                image.load()
                return self._levels(image, stored_units(image, path) if self.value_range is not None else 1.0)
        except (MemoryError, Unreachable):
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise BadImage(path, f"{type(error).__name__}: {error}") from error

    def open(self, path: Where) -> jpeg.Jpeg | jpeg.Whole:
        """The same with eight bits, decoded when it is known what of it is wanted, where that is faster: see `jpeg`.

        Raises:
            BadImage: it cannot be read. ``cut`` of what is returned may raise ValueError; decode it whole then.
        """
        if isinstance(path, Blob):
            path = self._fetched(path)
        if (isinstance(path, Blob) or ending(path) in jpeg.ENDINGS) and self.value_range in (None, (0.0, 255.0)):
            found = self._jpeg(path)
            if found is not None and not 0 < self.max_pixels < found.width * found.height:
                return found
        return self.whole(path)

    def whole(self, path: Where) -> jpeg.Whole:
        """The same, decoded as an array."""
        pixels = np.array(self(path))
        return jpeg.Whole(pixels if pixels.ndim == 3 else pixels[..., None])

    def _fetched(self, blob: Blob) -> Blob:
        """With its bytes at hand, which may be looked at twice."""
        try:
            data = blob.read()
        except (MemoryError, Unreachable):
            raise
        except Exception as error:
            raise BadImage(blob, f"{type(error).__name__}: {error}") from error
        return Blob(blob.name, lambda: data)

    def _jpeg(self, path: Where) -> jpeg.Jpeg | None:
        try:
            with opened(path) as file:
                data = file.read()
        except OSError:  # told when Pillow reads it
            return None
        found = jpeg.opened(data, self.channels)
        if found is None or not jpeg.has_exif(data):
            return found
        try:
            with open_header(Blob(str(path), lambda: data)) as image:
                if drawn_by_us(image):
                    return None
                turned = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # told when Pillow reads it
            return None
        turned = turned if turned in range(1, 9) else 1
        sides = (found.width, found.height) if turned < 5 else (found.height, found.width)
        return replace(found, width=sides[0], height=sides[1], orientation=turned)

    def _levels(self, image: Image.Image, unit: float = 1.0) -> Image.Image:
        deep, name = is_deep(image), kind(image)
        inverted = deep and _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO  # Pillow turns 8 bits round, and no others
        low, high = self.value_range or (0.0, self._white(image, name) if deep else 255.0)
        if self.value_range is not None:
            low, high = low / unit, high / unit
        if not deep:
            refuse_signed(image)
            image = flat(ImageOps.exif_transpose(image)).convert("RGB" if self.channels == 3 else "L")
            if (low, high) == (0.0, 255.0):
                return image
            table = np.rint(np.clip((np.arange(256) - low) / (high - low), 0, 1) * 255).astype(int).tolist()
            return image.point(table * len(image.getbands()))
        values = values_of(image).astype(np.float64)
        if "transparency" in image.info:
            values[values == image.info["transparency"]] = high
        self._check(values, high)
        values = np.clip((values - low) / (high - low), 0, 1)
        values = 1 - values if inverted else values
        levels = Image.fromarray(np.rint(values * (65535 if self.bits == 16 else 255)).astype(np.float32))
        levels = _turned(levels, image)
        if self.bits == 16:
            return levels
        return levels.convert("L").convert("RGB" if self.channels == 3 else "L")

    def _white(self, image: Image.Image, name: str) -> float:
        white = own_white(image) or (self.scale or {}).get(name) or (1.0 if image.mode == "F" else None)
        if white is None:
            raise ValueError(
                f"no sample of the set had {name} images, and they have no usual scale: --value-range LOW,HIGH says "
                "what their values mean"
            )
        return white

    def _check(self, values: np.ndarray, white: float) -> None:
        if not np.isfinite(values).all():
            raise ValueError("not all of its pixel values are finite")
        if self.value_range is not None:
            return
        least = (1 - TOLERANCE) * min(white, float(values.max()))
        beyond = np.count_nonzero(values > TOLERANCE * white) + np.count_nonzero(values < min(0.0, least))
        if beyond > STRAYS * values.size:
            raise ValueError(
                f"pixel values from {values.min():g} to {values.max():g}, where 0 is black and {white:g} is white: "
                "--value-range LOW,HIGH says what they mean"
            )


def _turned(levels: Image.Image, image: Image.Image) -> Image.Image:
    """`levels` upright by the EXIF tag of `image`."""
    exif = image.getexif()
    if exif.get(ExifTags.Base.Orientation, 1) == 1:
        return levels
    levels.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(levels)


def values_of(image: Image.Image) -> np.ndarray:
    """The values of a deep image as they are stored: Pillow reads unsigned 32 bits as signed ones."""
    values = np.asarray(image)
    if image.mode == "I" and _tag(image, _BITS) == 32 and _tag(image, _SAMPLE_FORMAT) != _SIGNED:
        values = values.view(np.uint32)
    return values


def refuse_signed(image: Image.Image) -> None:
    """Raise ValueError for signed values of 8 bits."""
    if image.mode == "L" and _tag(image, _SAMPLE_FORMAT) == _SIGNED:
        raise ValueError("signed 8-bit values, which Pillow reads as if they had no sign")


def stored_units(image: Image.Image, path: Where) -> float:
    """How many units of the file one of Pillow's values is: it stretches PNM, and halves the bits of colour."""
    if image.format == "PPM":
        with opened(path) as file:
            header = re.sub(rb"#[^\n]*\n", b" ", file.read(1024)).split(maxsplit=4)
        most = int(header[3]) if header[0] in (b"P2", b"P3", b"P5", b"P6") else 255
        return most / (65535 if image.mode == "I" else 255)
    return 257.0 if _is_halved(image) else 1.0


def open_header(path: Where) -> Image.Image:
    """Image.open without Pillow's limit of pixels, which `Decoder` has instead; with plug-ins where they are there."""
    register_plugin(ending(path))
    with _unlimited():
        image = Image.open(opened(path) if isinstance(path, Blob) else path)
    if _tag(image, ExifTags.Base.Orientation) in _ON_ITS_SIDE:
        image.filename = ""  # or Pillow maps its values into memory as if the rows had the sides of the upright image
    return image


def crop(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """image.crop, which would ask Pillow's limit again of an image that `Decoder` has let through."""
    with _unlimited():
        return image.crop(box)


@contextmanager
def _unlimited() -> Iterator[None]:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


# Extensions that a package beside Pillow reads, and what must be called for it.
PLUGINS = {".heic": ("pillow_heif", "register_heif_opener"), ".heif": ("pillow_heif", "register_heif_opener")}


def register_plugin(extension: str) -> bool:
    """Whether files of this extension can be read, as far as a plug-in decides."""
    if extension not in PLUGINS or extension in Image.registered_extensions():
        return True
    package, function = PLUGINS[extension]
    try:
        getattr(__import__(package), function)()
    except ImportError:
        return False
    return True


def drawn_by_us(image: Image.Image) -> bool:
    """Whether maefast wrote this picture, by its header."""
    if image.info.get("Software") == SOFTWARE or _tag(image, ExifTags.Base.Software) == SOFTWARE:
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged tags
        return "exif" in image.info and image.getexif().get(ExifTags.Base.Software) == SOFTWARE


def is_deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits a value, as Pillow reads it: modes I;16, I and F, all of one channel."""
    return image.mode.startswith(("I", "F"))


def own_white(image: Image.Image) -> float | None:
    """The value of white by the bits that a deep file tells; None for floats, 32-bit and signed integers."""
    if image.mode.startswith("I;16"):
        return float(2 ** (_tag(image, _BITS) or 16) - 1)
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits in 32; a PGM's own maximum becomes 65535
        return 65535.0
    return None


def kind(image: Image.Image) -> str:
    """What a file holds, for messages."""
    if not is_deep(image):
        return "16-bit colour (read with 8)" if _is_halved(image) else "8-bit"
    if image.mode == "F":
        return "float"
    bits = _tag(image, _BITS) or 16
    return f"{bits}-bit signed" if _tag(image, _SAMPLE_FORMAT) == _SIGNED else f"{bits}-bit"


def _is_halved(image: Image.Image) -> bool:
    """Whether Pillow reads sixteen bits of colour with eight."""
    if is_deep(image) or image.mode == "L":
        return False
    return _tag(image, _BITS) == 16 or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _tag(image: Image.Image, tag: int) -> Any:
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) and value else value


def flat(image: Image.Image) -> Image.Image:
    """An 8-bit image without transparency, in a mode that converts to RGB and to grey."""
    if image.mode == "LAB":
        return image.convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image


def centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`centre_box`, resized to `size` = (height, width) (bicubic)."""
    box = centre_box(image.width, image.height, size)
    return crop(image, box).resize(size[::-1], Image.Resampling.BICUBIC)


def centre_box(width: int, height: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the largest centred box of the shape of `size` = (height, width)."""
    scale = min(width / size[1], height / size[0])
    w, h = max(1, round(size[1] * scale)), max(1, round(size[0] * scale))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def to_array(image: Image.Image, channels: int, bits: int = 8) -> np.ndarray:
    """PIL image -> uint8 or, for 16 bits, uint16 [C, H, W], contiguous. Eight bits become sixteen times 257."""
    if image.mode == "F":
        pixels = np.rint(np.clip(np.asarray(image), 0, 65535)).astype(np.uint16)  # bicubic filters overshoot
    else:
        pixels = np.asarray(image, dtype=np.uint8)
        if bits == 16:
            pixels = pixels.astype(np.uint16) * 257
    grey = pixels.ndim == 2
    pixels = np.broadcast_to(pixels[None], (channels, *pixels.shape)) if grey else pixels.transpose(2, 0, 1)
    return np.array(pixels, order="C")  # a copy, which torch may write to: those of Pillow are read-only
