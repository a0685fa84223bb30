"""The augmentation of images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from maefast import ops

from .jpeg import GAP, Jpeg, Whole
from .pixels import Image, crop


@dataclass(frozen=True)
class Augment:
    """Random-resized-crop (bicubic) and horizontal flip, the only augmentation MAE uses.

    `size` is (height, width). A crop covers `scale` of the image's area; its aspect ratio, relative to that of
    `size`, lies in `ratio` (drawn uniformly in the logarithm). If no such box fits in ten draws, the largest centred
    box with a permitted aspect ratio is taken. A crop smaller than `size` is enlarged.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a crop of an image of width x height pixels."""
        shape = self.size[1] / self.size[0]
        low, high = (math.log(r * shape) for r in self.ratio)
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
                return left, top, left + w, top + h
        aspect = min(max(width / height, math.exp(low)), math.exp(high))
        w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def draw(self, width: int, height: int, rng: np.random.Generator) -> tuple[tuple[int, int, int, int], bool]:
        """The box of a crop, and whether it is flipped."""
        return self.box(width, height, rng), bool(rng.random() < self.flip)

    def into(self, out: torch.Tensor, image: Jpeg | Whole, rng: np.random.Generator) -> None:
        """A crop of the image into uint8 [C, height, width]. ValueError: it cannot be decoded."""
        box, flip = self.draw(image.width, image.height, rng)
        pixels, box = image.cut(box, self.size)
        if min(pixels.strides) < 0:  # turned upright
            pixels = np.ascontiguousarray(pixels)
        ops.resize(torch.from_numpy(pixels), self.size, box=box, flip=flip, out=out)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The same of an image of Pillow's, which may have floats."""
        box, flip = self.draw(image.width, image.height, rng)
        size = (self.size[1], self.size[0])
        # Cut first: with resize(box=...) the filter would also see pixels outside of the box.
        image = crop(image, box).resize(size, Image.Resampling.BICUBIC, reducing_gap=GAP)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
