"""Samples whose files are decoded on the device (`--gpu-decode`): worker processes read bytes and draw crops.

UNTESTED ON A DEVICE: all but the decoder itself is tested on a CPU. Crops and flips are those of `TrainImages`; pixels
are not the same to the bit: nvJPEG rounds otherwise than libjpeg-turbo, crops are resized with weights in float32, and
large photographs are not decoded smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from maefast.recipe import Batch

from . import jpeg
from .augment import Augment
from .batch import ImageBatch
from .samples import Sample, TrainImages

Decode = Callable[[Sequence[np.ndarray]], list[Tensor | None]]  # see `NvImageCodec.__call__`

# torch's antialiased filter refuses to shrink much more on a GPU: its weights lie in shared memory.
MOST = 32
_AT_ONCE = 2**26  # pixels that are decoded together: what they take on the device has a bound


class Crop(NamedTuple):
    """What is to be made of a file: the `box` of it, upright, flipped or not. `stored`: its (height, width)."""

    file: bytes
    stored: tuple[int, int]
    orientation: int
    box: tuple[int, int, int, int]
    flip: bool
    where: tuple[int, int, int]


@dataclass
class EncodedBatch(Batch):
    """Samples that are still to be decoded, and those that already are.

    Attributes:
        files: uint8, one after another. crops: of each its row in the batch, its end in `files`, and the crop, without
            the file. pixels: uint8 [n, C, H, W] for the other `rows`.
    """

    files: Tensor
    pixels: Tensor
    rows: list[int] = field(default_factory=list)
    crops: list[tuple[int, int, Crop]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows) + len(self.crops)

    def pin_memory(self) -> EncodedBatch:
        """Not of the files: the decoder is done with them when it returns only if it had to copy them."""
        return replace(self, pixels=self.pixels.pin_memory())


class EncodedImages(TrainImages):
    """`TrainImages` whose batches get their pixels in `finish`, called by the process that trains.

    What the device is not asked to decode comes from the workers as it does without the option: other formats, CMYK and
    RGB, progressive and damaged files, crops that shrink more than `MOST` times. What it refuses is decoded on the CPU
    in `finish`.

    Args:
        decode: files into pixels, on `device`.
    """

    def __init__(self, *arguments, decode: Decode, device: torch.device | str, **options) -> None:
        super().__init__(*arguments, **options)
        self.decode, self.device = decode, torch.device(device)
        self._plain = TrainImages(*arguments, **{**options, "cache": 0})
        self._crop: Crop | None = None
        self._where = (0, 0, 0)

    def __getitem__(self, where: tuple[int, int, int]) -> Sample:
        self._crop, self._where = None, where
        pixels, position, bad = super().__getitem__(where)
        return (pixels if self._crop is None else self._crop), position, bad

    def _place(self, out: Tensor, image: jpeg.Jpeg | jpeg.Whole, rng: np.random.Generator) -> None:
        state = rng.bit_generator.state
        box, flip = self.augment.draw(image.width, image.height, rng)
        if _for_device(image) and _shrinks(box, self.augment.size) <= MOST:
            self._crop = Crop(image.data, image.stored, image.orientation, box, flip, self._where)
            return
        rng.bit_generator.state = state
        super()._place(out, image, rng)

    def _as_kept(self, image: jpeg.Jpeg) -> jpeg.Jpeg | jpeg.Whole:
        return image if _for_device(image) else super()._as_kept(image)

    def collate(self, samples: list[Sample]) -> tuple[EncodedBatch | None, list[tuple[str, str]]]:
        bad = [entry for sample in samples for entry in sample[2]]
        if any(sample[0] is None for sample in samples):
            return None, bad
        rows = [row for row, (found, _, _) in enumerate(samples) if not isinstance(found, Crop)]
        pixels = torch.stack([samples[row][0] for row in rows]) if rows else torch.empty(0)
        crops, end, files = [], 0, []
        for row, (found, _, _) in enumerate(samples):
            if isinstance(found, Crop):
                end += len(found.file)
                files.append(np.frombuffer(found.file, dtype=np.uint8))
                crops.append((row, end, found._replace(file=b"")))
        joined = torch.from_numpy(np.concatenate(files) if files else np.empty(0, dtype=np.uint8))
        key = np.array([sample[1] for sample in samples], dtype=np.int64)
        return EncodedBatch(joined, pixels, rows, crops, key=key), bad

    def finish(self, batch: EncodedBatch) -> tuple[ImageBatch | None, list[tuple[str, str]]]:
        """The batch on the device, or None where it has a hole, and what could not be read."""
        shape = (len(batch), self.decoder.channels, *self.augment.size)
        out, bad = torch.empty(shape, dtype=torch.uint8, device=self.device), []
        for row, pixels in zip(batch.rows, batch.pixels.to(self.device, non_blocking=True)):
            out[row] = pixels
        for row, crop, whole in self._decoded(batch):
            if whole is not None and tuple(whole.shape) == (*crop.stored, 3):
                out[row] = cut(whole, crop, self.augment, self.decoder.channels)
                continue
            pixels, _, more = self._plain[crop.where]
            bad += more
            if pixels is None:
                return None, bad
            out[row] = pixels
        return ImageBatch(out, key=batch.key), bad

    def _decoded(self, batch: EncodedBatch) -> Iterator[tuple[int, Crop, Tensor | None]]:
        """(row, crop, pixels of the whole file) of each, as many at once as have `_AT_ONCE` pixels."""
        bytes_of, at, files, waiting, pixels = batch.files.numpy(), 0, [], [], 0
        for number, (row, end, crop) in enumerate(batch.crops, 1):
            files.append(bytes_of[at:end])
            waiting.append((row, crop))
            at, pixels = end, pixels + crop.stored[0] * crop.stored[1]
            if pixels >= _AT_ONCE or number == len(batch.crops):
                for (known_row, known), whole in zip(waiting, self.decode(files), strict=True):
                    yield known_row, known, whole
                files, waiting, pixels = [], [], 0


def cut(pixels: Tensor, crop: Crop, augment: Augment, channels: int) -> Tensor:
    """A crop of a decoded file, uint8 RGB [H, W, 3] -> uint8 [channels, h, w], on its device."""
    if crop.orientation >= 5:
        pixels = pixels.transpose(0, 1)
    turned = [axis for axis, numbers in ((1, jpeg.LEFT), (0, jpeg.UP)) if crop.orientation in numbers]
    left, top, right, bottom = crop.box
    pixels = (pixels.flip(turned) if turned else pixels)[top:bottom, left:right]
    made = resize(grey(pixels) if channels == 1 else pixels, augment.size)
    return made.flip(2) if crop.flip else made


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [H, W, C] -> uint8 [C, h, w] by the filter of `ops.resize`, on any device: in the same order, rounded as
    often, but with weights in float32; within a grey level of it."""
    planes = pixels.permute(2, 0, 1)[None].float()
    for sides in ((pixels.shape[0], size[1]), size):
        planes = F.interpolate(planes, sides, mode="bicubic", antialias=True, align_corners=False)
        planes = planes.round_().clamp_(0, 255)
    return planes[0].to(torch.uint8)


def grey(pixels: Tensor) -> Tensor:
    """uint8 RGB [H, W, 3] -> [H, W, 1], weighted as Pillow does (ITU-R 601)."""
    red, green, blue = pixels.int().unbind(2)
    return ((19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16).to(torch.uint8)[..., None]


def _for_device(image: jpeg.Jpeg | jpeg.Whole) -> bool:
    return isinstance(image, jpeg.Jpeg) and image.space != "RGB" and jpeg.is_baseline(image.data)


def _shrinks(box: tuple[int, int, int, int], size: tuple[int, int]) -> float:
    left, top, right, bottom = box
    return max((bottom - top) / size[0], (right - left) / size[1])
