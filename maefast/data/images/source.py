"""The images of a run, as a `maefast.data.source.Source`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from maefast.data.blob import ending
from maefast.data.records import Records

from . import nvimagecodec
from .augment import Augment
from .batch import ImageBatch
from .encoded import EncodedImages
from .files import find_images
from .options import parse_value_range
from .pixels import Decoder, open_header
from .samples import TrainImages
from .value_range import settle

if TYPE_CHECKING:
    from . import Images

_LOOKED_AT = 16  # files, for pages


class ImageSource:
    """The images that the options of a run name, decoded by one rule, see `pixels` and `value_range`."""

    unit = "image"

    def __init__(self, wants: Images, options: Any) -> None:
        self.wants, self.options = wants, options
        # Above all, since finding images may take a while.
        self._decode = nvimagecodec.opened(options) if options.gpu_decode else None
        self.images = find_images(options.data, options.output_dir, options)
        self.name = self.images.source
        decoder = Decoder(wants.channels, bits=options.pixel_bits)
        if options.max_pixels is not None:
            decoder = replace(decoder, max_pixels=options.max_pixels)
        self.decoder, notes = settle(self.images, decoder, options.value_range)
        self.notes = [*self.images.notes, *notes, *_pages(self.images)]
        wanted = parse_value_range(options.value_range)
        self._percentiles = wanted if isinstance(wanted, str) else None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def settled(self) -> dict[str, Any]:
        """Percentiles as the numbers that they came to."""
        return {} if self.decoder.value_range is None else {"value_range": list(self.decoder.value_range)}

    def resume(self, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        asked = record.get("percentiles")
        if asked is not None and asked == self._percentiles:  # the numbers are kept, also when the data have grown
            self.decoder = replace(self.decoder, value_range=tuple(config["value_range"]))

    def record(self) -> dict[str, Any]:
        return {
            "images": len(self.images),
            "fingerprint": self.images.fingerprint(),
            "scale": self.decoder.scale,
            "percentiles": self._percentiles,
        }

    def changes(self, record: Mapping[str, Any]) -> list[str]:
        lines, now = [], self.record()
        if any(now[name] != record[name] for name in ("images", "fingerprint")):
            lines.append(f"images: {record['images']} -> {len(self.images)} (the list of files is another)")
        scale = self.decoder.scale
        if "scale" not in record and scale:
            lines.append(
                "decoding of images: floats and 32-bit integers once had a scale for each image, now one for all"
            )
        old, new = record.get("scale", scale) or {}, scale or {}
        for kind in sorted({*old, *new}):
            if old.get(kind) != new.get(kind):
                why = "a sample of the images has other values"
                lines.append(f"value of white: {old.get(kind)} -> {new.get(kind)} in {kind} images ({why})")
        return lines

    def samples(self) -> TrainImages:
        options = self.options
        augment = Augment(self.wants.size, options.crop_scale, options.crop_ratio, options.flip)
        rules = {
            "seed": options.seed,
            # Of a stream none comes again, and what stands in for a bad one is its next.
            "skip_bad": options.skip_bad and not options.stream,
            "cache": 0 if options.stream else options.cache_mb * 2**20 // max(1, options.workers),
        }
        if self._decode is None:
            return TrainImages(self.images, augment, self.decoder, **rules)
        decode = self._decode
        return EncodedImages(self.images, augment, self.decoder, decode=decode, device=decode.device, **rules)

    def examples(self, count: int) -> tuple[ImageBatch, list[str]]:
        from .pictures import load_images, pick

        picked = pick(self.images, count, self.decoder, skip_bad=self.options.skip_bad)
        images = load_images([self.images.path(i) for i in picked], self.wants.size, self.decoder)
        return ImageBatch(images, key=np.arange(len(picked))), [self.images.name(i) for i in picked]


def _pages(images: Records) -> list[str]:
    """A line if a TIFF has several pages, of which one is read; a few of them are looked at."""
    for index in np.linspace(0, len(images) - 1, min(len(images), _LOOKED_AT)).astype(int).tolist():
        where = images.path(index)
        if ending(where) not in (".tif", ".tiff"):
            continue
        try:
            with open_header(where) as image:
                pages = getattr(image, "n_frames", 1)
        except Exception:  # met again, and told, when it is read
            continue
        if pages > 1:
            more = f"--channels {pages} would take them as channels"
            return [f"warning: {images.name(index)} has {pages} pages, and only the first is read; {more}"]
    return []
