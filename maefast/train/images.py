"""Finding and opening images: folders of any nesting, and the photographs that two libraries ship."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import BadImage, ConfigError, TrainError, need

try:
    from PIL import Image, ImageDraw, ImageFont, ImageOps  # noqa: F401 (used through this module)
except ImportError as error:  # pragma: no cover - the extra is installed wherever tests run
    raise need("pillow", "Reading images") from error

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".png",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
    ".ppm",
    ".pgm",
    ".jp2",
    ".avif",
)

# The colour photographs inside the wheels of scikit-image and scikit-learn (no download).
SHIPPED = {
    "skimage": (
        "data",
        "astronaut.png chelsea.png coffee.png hubble_deep_field.jpg ihc.png motorcycle_left.png "
        "motorcycle_right.png retina.jpg rocket.jpg",
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
}


@dataclass(frozen=True)
class ImageSet:
    """Image files in a fixed order, relative to `root` or absolute; plain strings, for there may be millions."""

    source: str
    root: str
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        return Path(self.root, self.files[index])

    def name(self, index: int) -> str:
        """What messages and pictures show."""
        return os.path.basename(self.files[index]) if os.path.isabs(self.files[index]) else self.files[index]

    def fingerprint(self) -> str:
        """A short hash of the names in order, so that a resumed run notices a changed folder."""
        names = "\n".join(self.name(index) for index in range(len(self)))
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]


def find_images(data: str | Path) -> ImageSet:
    """The images of `data`: "skimage" for the shipped photographs, else a folder, searched at any depth.

    Files are those with a common image extension, sorted by their path relative to the folder (hidden files
    and folders are left out, links are followed), so the order is the same on every machine.
    """
    if str(data) == "skimage" and not Path("skimage").is_dir():
        return ImageSet("skimage", "", tuple(str(path) for path in shipped_photographs()))
    root = Path(data).expanduser()
    if not root.exists():
        raise ConfigError(f"--data {data}: no such folder (give a folder of images, or 'skimage')")
    if not root.is_dir():
        raise ConfigError(f"--data {data}: is a file; give the folder that holds the images")
    files: list[str] = []
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above would be followed for ever
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        files += [prefix + name for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    if not files:
        raise ConfigError(f"--data {data}: no images found in it (looked at any depth for {' '.join(EXTENSIONS)})")
    return ImageSet(str(root), str(root), tuple(sorted(files)))


def shipped_photographs() -> list[Path]:
    """The photographs of `SHIPPED` that are installed, sorted by file name.

    Neither library is imported. At least scikit-image's must be there.
    """
    found = []
    for package, (folder, names) in SHIPPED.items():
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            root = Path(spec.submodule_search_locations[0], folder)
            found += [root / name for name in names.split() if (root / name).is_file()]
        elif package == "skimage":
            raise TrainError('--data skimage needs the package scikit-image: pip install "maefast[train]"')
    if not found:
        raise TrainError("the installed scikit-image ships no photographs; give --data a folder of images")
    return sorted(found, key=lambda path: path.name)


def open_image(path: str | Path, channels: int = 3) -> Image.Image:
    """Decode a file completely into 8-bit RGB (channels=3) or grey (channels=1), turned upright by its EXIF tag.

    16-bit and float images are scaled to 8 bits, transparent pixels are laid on white, and only the first
    frame of an animation is read. Raises BadImage, which names the file, when it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            return _eight_bit(image).convert("RGB" if channels == 3 else "L")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise BadImage(path, f"{type(error).__name__}: {error}") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # I;16, I;16B, I (32-bit), F
        pixels = np.asarray(image).astype(np.float64)
        low, high = float(pixels.min()), float(pixels.max())
        if not np.isfinite([low, high]).all() or low < 0 or high > 65535:
            raise ValueError(f"pixel values from {low} to {high}; expected 8-bit, 16-bit, or floats in [0, 1]")
        full = 65535.0
        if image.mode == "F" and high <= 255:
            full = 1.0 if high <= 1 else 255.0
        return Image.fromarray(np.rint(pixels * (255.0 / full)).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image


def centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centred box of the shape of `size` = (height, width), resized to it (bicubic)."""
    height, width = size
    scale = min(image.width / width, image.height / height)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.BICUBIC)


def to_uint8(image: Image.Image) -> np.ndarray:
    """PIL image -> uint8 [C, H, W], contiguous."""
    pixels = np.asarray(image, dtype=np.uint8)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)
