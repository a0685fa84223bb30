"""`maefast reconstruct`: what a trained model makes of images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from maefast import seeds
from maefast.data.blob import Where, ending
from maefast.data.channel_files import ARRAYS
from maefast.data.channels import Channels, read_channels, shown, shown_range
from maefast.data.images.files import EXTENSIONS, find_images
from maefast.data.images.pixels import Decoder
from maefast.data.images.value_range import settle
from maefast.data.records import LISTS, TABLES, TARS, Names, Paths, is_url
from maefast.errors import BadImage, ConfigError
from maefast.recipes.masked_images import image_shape

from . import checkpoint
from .image_models import check_mask, mask_ratio_of
from .infer import make_model
from .weights import Weights, open_weights, run_of

SETS = (*TARS, *TABLES, *LISTS)


def reconstruct_files(
    path: str | Path,
    images: Sequence[str | Path],
    output: Path,
    *,
    count: int = 8,
    column: str | None = None,
    mask_ratio: float | None = None,
    seed: int = 0,
    raw: bool = False,
    norm_pix: bool | None = None,
    name: str | None = None,
    img_size: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    ema: bool = False,
    value_range: Any = None,
    max_pixels: int | None = None,
) -> None:
    """Draw the reconstructions of images (centre crops in the model's size; image i gets mask i of `seed`).

    `images`: files, each of which is drawn, or folders, lists, tars and tables as `--data` takes them, of each of which
    `count` are, evenly spread over it; `column`: see PretrainConfig.
    `value_range`, `max_pixels`: see PretrainConfig; by default as in the run, if `path` is one.
    """
    from maefast.data.images import pictures

    pictures.picture_format(output)  # before anything is computed
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed must lie in 0 … 2**63-1, not {seed}")
    weights = open_weights(path, ema)
    _say_how_it_was_trained(weights, norm_pix)
    model = make_model(weights, name, norm_pix, img_size, heads)
    mask_ratio = mask_ratio_of(model, mask_ratio)
    check_mask(model, mask_ratio)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model.to(device).eval()
    channels, *size = image_shape(model)
    run = run_of(weights)
    numbers = run is not None and run.config.get("channels") is not None  # of `--channels`
    chosen = _Chosen(images, count, column, numbers)
    names, places = chosen.names, chosen.places
    for place in places:
        if isinstance(place, (str, Path)) and _same_file(place, output):
            raise ConfigError(f"--output {output} is one of the images: give another name")
    if not numbers:
        decoder = _decoder(run, channels, chosen, value_range, max_pixels)
        try:
            examples = pictures.load_examples(places, names, size, decoder, model.num_patches, seed)
        except BadImage as error:
            raise BadImage(error.path, error.reason, "leave it out") from error
    else:
        normalised = _normalised(run, channels, size, places, value_range, max_pixels)
        noise = seeds.Draw(seed, range(len(names)), seeds.PICTURE).uniform("mask", model.num_patches)
        scale = [part.to(device) for part in shown_range(channels)]
    batches = []
    for start in range(0, len(names), 16):  # bounds memory for long lists
        part = slice(start, start + 16)
        if not numbers:
            chunk = pictures.Examples(examples.images[part], examples.noise[part], names[part])
            batches.append(pictures.reconstruct(model, chunk, mask_ratio, device, raw))
        else:
            given = normalised[part].to(device), *scale, raw
            mask = {"mask_ratio": mask_ratio, "noise": noise[part].to(device)}
            batches.append([shown(column) for column in pictures.columns_of(model, *given, **mask)])
    columns = [torch.cat(column) for column in zip(*batches, strict=True)]
    pictures.save_picture(columns, names, output, pictures.note(model, raw))


def _say_how_it_was_trained(weights: Weights, norm_pix: bool | None) -> None:
    config = weights.config or {}
    if norm_pix is not None and config.get("norm_pix_loss", norm_pix) != norm_pix:
        with_or_without = "without" if norm_pix else "with"
        print(f"{weights.source} was trained {with_or_without} --norm-pix: the picture will look wrong")


def _same_file(one: str | Path, other: Path) -> bool:
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


class _Chosen:
    """The images that arguments mean, as far as `settle` looks at `maefast.data.records.Records`."""

    source = root = ""
    notes = ()

    def __init__(self, given: Sequence[str | Path], count: int, column: str | None, numbers: bool) -> None:
        endings = (*ARRAYS, *EXTENSIONS) if numbers else EXTENSIONS
        if column is not None and not any(map(_is_set, given)):
            raise ConfigError(f"--column {column} is for tables and tars, and none is given")
        options = SimpleNamespace(column=column, skip_bad=False)
        self.places: list[Where] = []
        self.names: list[str] = []
        for entry in given:
            try:
                one = Paths("", "", Names([str(entry)]))
                found = find_images(entry, None, options, endings) if _is_set(entry) else one
            except ConfigError as error:
                raise ConfigError(str(error).replace("--data ", "")) from error
            for index in np.linspace(0, len(found), min(count, len(found)), endpoint=False).astype(int).tolist():
                self.places.append(found.path(index))
                self.names.append(found.name(index))

    def __len__(self) -> int:
        return len(self.places)

    def path(self, index: int) -> Where:
        return self.places[index]

    def name(self, index: int) -> str:
        return self.names[index]


def _is_set(entry: str | Path) -> bool:
    text = str(entry)
    if Path(text).is_file() or (is_url(text) and ending(text) in EXTENSIONS):
        return ending(text) in SETS
    return (
        is_url(text)
        or Path(text).expanduser().is_dir()
        or ending(text) in SETS
        or text == "skimage"
        or any(sign in text for sign in "*?{")
    )


def _normalised(
    run: checkpoint.State,
    channels: int,
    size: Sequence[int],
    images: Sequence[Where],
    value_range: Any,
    max_pixels: int | None,
) -> torch.Tensor:
    """float32 [B, C, H, W], normalised as the run did it."""
    options = SimpleNamespace(**run.config)
    options.value_range = run.config["value_range"] if value_range is None else value_range
    kind = Channels(channels, tuple(size), own_scale=False).kind(options)
    made = []
    for path in images:
        try:
            made.append(kind.example(read_channels(path, channels, max_pixels)))
        except (ValueError, OSError) as error:
            raise BadImage(path, str(error), "leave it out") from error
    return kind.collate(made, np.arange(len(made))).images


def _decoder(
    run: checkpoint.State | None, channels: int, images: _Chosen, value_range: Any, max_pixels: int | None
) -> Decoder:
    """As the run decoded its images, if the weights are of one, unless told otherwise."""
    decoder, quiet = Decoder(channels), False
    if run is not None:
        quiet = value_range is None  # what looks odd was said by the run
        decoder = replace(decoder, bits=run.config.get("pixel_bits", 8), scale=run.extra.get("scale"))
        value_range = run.config.get("value_range") if value_range is None else value_range
        max_pixels = run.config.get("max_pixels") if max_pixels is None else max_pixels
    if max_pixels is not None:
        decoder = replace(decoder, max_pixels=max_pixels)
    decoder, lines = settle(images, decoder, value_range)
    for line in () if quiet else lines:
        print(line)
    return decoder
