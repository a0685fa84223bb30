"""Reconstruction pictures: original | masked | reconstruction | pasted, one row per image.

The third column shows the masked patches only, the complement of the second: no loss ever scores a visible patch, so
what a masked autoencoder predicts there is noise.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from maefast import seeds
from maefast.data.blob import Where
from maefast.data.records import Records
from maefast.data.runs import SOFTWARE
from maefast.data.source import advice
from maefast.data.written import write_whole
from maefast.errors import BadImage, ConfigError
from maefast.nn.patches import Reconstruction

from .batch import normalise, normaliser
from .pixels import Decoder, centre_crop, to_array

COLUMNS = ("original", "masked", "reconstruction", "pasted")
HIDDEN = 0.5  # grey, of what a column does not show; what is black or silent in the data stays told from it
_GAP, _HEAD, _LINE, _CELL = 6, 26, 16, 160
_TRIES = 20  # to find another example near one that cannot be read


@dataclass
class Examples:
    """Fixed images with fixed masks. images: uint8 or uint16 [B, C, H, W]; noise: float32 [B, patches]."""

    images: torch.Tensor
    noise: torch.Tensor
    names: list[str]


@dataclass
class Sheet:
    """Columns, uint8 [B, C, H, W] each, as a `maefast.recipe.Picture`; the usual four unless labelled otherwise."""

    columns: list[torch.Tensor]
    names: Sequence[str]
    caption: str
    labels: Sequence[str] = COLUMNS

    def save(self, path: Path, title: str) -> None:
        save_picture(self.columns, self.names, path, title, self.labels)

    def pixels(self) -> torch.Tensor:
        return torch.cat([torch.cat(list(column), 1) for column in self.columns], 2)


def load_images(paths: Sequence[Where], size, decoder: Decoder) -> torch.Tensor:
    """Centre crops of `paths` in the model's size = (height, width): uint8 or uint16 [B, C, H, W]."""
    images = [to_array(centre_crop(decoder(path), size), decoder.channels, decoder.bits) for path in paths]
    return torch.from_numpy(np.stack(images))


def load_examples(
    paths: Sequence[Where], names: Sequence[str], size, decoder: Decoder, patches: int, seed: int
) -> Examples:
    """Centre crops of `paths`, the i-th with mask i of `seed`."""
    images = load_images(paths, size, decoder)
    noise = seeds.Draw(seed, range(len(images)), seeds.PICTURE).uniform("mask", patches)
    return Examples(images, noise, list(names))


def pick(images: Records, count: int, decoder: Decoder, *, skip_bad: bool = True) -> list[int]:
    """Up to `count` indices spread evenly over the images; one that cannot be read gives its place to the next.

    Raises:
        BadImage: none of all the images can be read; without `skip_bad`, the first that cannot.
    """
    picked: list[int] = []
    failed: dict[int, BadImage] = {}
    for first in np.linspace(0, len(images), min(count, len(images)), endpoint=False).astype(int):
        tries = _TRIES if picked else len(images)  # the first one is looked for in the whole set
        for index in ((first + step) % len(images) for step in range(min(tries, len(images)))):
            if index in picked or index in failed:
                continue
            try:
                decoder(images.path(index))
            except BadImage as error:
                if not skip_bad:
                    tip = advice(len(images), "image", lambda index: decoder(images.path(index)))
                    raise BadImage(error.path, error.reason, tip) from error
                failed[index] = error
                continue
            picked.append(index)
            break
    if not picked:
        first = failed[min(failed)]
        others = f"; nor can any of the {len(images)} images be read" if len(images) > 1 else "; there is no other"
        raise BadImage(first.path, first.reason + others)
    return sorted(picked)


def reconstruct(model, examples: Examples, mask_ratio: float, device, raw: bool = False) -> list[torch.Tensor]:
    """The four columns of examples, see `columns_of`."""
    mean, std = normaliser(examples.images.shape[1], device)
    images = normalise(examples.images.to(device), mean, std)
    return columns_of(model, images, mean, std, raw, mask_ratio=mask_ratio, noise=examples.noise.to(device))


@torch.no_grad()
def columns_of(
    model, images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, raw: bool = False, **mask
) -> list[torch.Tensor]:
    """The four columns as uint8 [B, C, H, W] on the CPU. `model` is left in the mode it was in.

    `images` are normalised by `mean` and `std`; `mask` and `raw` (normalised predictions as they are) are for
    `maefast.models.MaskedAutoencoder.reconstruct`.
    """
    training = model.training
    model.eval()
    try:
        how = {"raw": True} if raw else {}
        result = model.reconstruct(images, **mask, **how)
    finally:
        model.train(training)
    return four_columns(result, mean, std)


def four_columns(shown: Reconstruction, mean: torch.Tensor, std: torch.Tensor) -> list[torch.Tensor]:
    """The four columns of pictures that are normalised by `mean` and `std`."""
    rebuilt = shown.reconstruction.where(shown.mask.bool(), torch.zeros_like(shown.reconstruction))
    return [to_pixels(column, mean, std) for column in (shown.original, shown.masked, rebuilt, shown.pasted)]


def to_pixels(images: torch.Tensor, mean: torch.Tensor | float = 0.0, std: torch.Tensor | float = 1.0) -> torch.Tensor:
    """uint8 on the CPU; images * std + mean lie in [0, 1]."""
    return images.float().mul(std).add(mean).mul(255).round().clamp(0, 255).to(torch.uint8).cpu()


def heat(values: torch.Tensor) -> torch.Tensor:
    """[B, H, W] in [0, 1] as colours from black over red and yellow to white: uint8 [B, 3, H, W] on the CPU."""
    return to_pixels(torch.stack([(3 * values - step).clamp(0, 1) for step in range(3)], 1))


def note(model, raw: bool) -> str:
    """What a viewer must know of the reconstructions: how much of the hidden pixels is in them."""
    if not getattr(model, "norm_pix_loss", False):
        return ""
    if raw:
        return "raw: normalised predictions as they are; no brightness or contrast of the hidden patches is in them"
    return "only texture is predicted: masked patches have their true mean and variance (--picture raw: without)"


def picture_format(path: Path) -> str:
    """The format that the name of a picture asks for. ConfigError: none that can be written."""
    known = Image.registered_extensions()
    name = known.get(path.suffix.lower())
    if name not in _SIDES:  # formats that carry our mark
        raise ConfigError(f"{path}: give a name that ends in .png, .jpg, .webp or .tif")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the name of a file")
    return name


# Formats of pictures, and how many pixels a side of them may have.
_SIDES = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383, "TIFF": 2**31 - 1}


def save_picture(
    columns: list[torch.Tensor],
    names: Sequence[str],
    path: Path,
    title: str = "",
    labels: Sequence[str] = COLUMNS,
) -> None:
    """Write a labelled picture (atomically), in the format of its name. Small images are enlarged by a whole factor."""
    format = picture_format(path)
    rows, _, height, width = columns[0].shape
    factor = max(1, round(_CELL / max(height, width)))
    height, width = height * factor, width * factor
    font, small = ImageFont.load_default(16), ImageFont.load_default(12)
    wide = len(columns) * (width + _GAP) + _GAP
    wrap = textwrap.TextWrapper(max(20, wide // 6), break_on_hyphens=False).wrap
    lines = [part for line in title.splitlines() for part in wrap(line)]
    top = _HEAD + _LINE * len(lines) + (4 if lines else 0)
    caption = 18
    sheet = Image.new("RGB", (wide, top + rows * (height + _GAP + caption)), (255, 255, 255))
    if max(sheet.size) > _SIDES[format]:
        raise ConfigError(f"{path}: {rows} images make a picture of {sheet.width} x {sheet.height} pixels; name a .png")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((_GAP, 4 + _LINE * i), line, fill=(90, 90, 90), font=small)
    for c, (column, label) in enumerate(zip(columns, labels, strict=True)):
        left = _GAP + c * (width + _GAP)
        draw.text((left + width / 2, top - 4), label, fill=(0, 0, 0), font=font, anchor="ms")
        for r in range(rows):
            pixels = column[r].permute(1, 2, 0).numpy()
            image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).convert("RGB")
            sheet.paste(
                image.resize((width, height), Image.Resampling.NEAREST), (left, top + r * (height + _GAP + caption))
            )
    for r, name in enumerate(names):
        draw.text((_GAP, top + r * (height + _GAP + caption) + height + 2), name, fill=(90, 90, 90), font=small)
    tag, exif = PngInfo(), Image.Exif()
    tag.add_text("Software", SOFTWARE)
    exif[ExifTags.Base.Software] = SOFTWARE
    more = {
        "PNG": {"pnginfo": tag},
        "JPEG": {"exif": exif, "quality": 92},
        "WEBP": {"exif": exif},
        "TIFF": {"tiffinfo": {ExifTags.Base.Software: SOFTWARE}},
    }
    write_whole(path, lambda temporary: sheet.save(temporary, format=format, **more[format]))
