"""Images without anomalies, as those learn from that look for anomalies: photographs of any kind, and smooth ones that
are made as a demo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from maefast.data.collection import DEMO, Collection, Made
from maefast.data.images import Images
from maefast.data.images.batch import ImageBatch

_IMAGES = 256  # of the demo


class NormalImages(Images):
    """A recipe wants images [B, C, H, W] as `Images`; its demo has images made of a few smooth blobs."""

    def open(self, options: Any) -> Any:
        if options.data != DEMO:
            return super().open(options)
        made = Made(
            "smooth images", _IMAGES, lambda index: blobs(index, self.size, self.channels), lambda i: f"blobs {i}"
        )
        return Collection(_Flipped(options.flip), made, options)


class _Flipped:
    """A `Kind` of images uint8 [C, H, W]."""

    unit = "image"

    def __init__(self, flip: float) -> None:
        self.flip = flip

    def sample(self, raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return raw[..., ::-1] if rng.random() < self.flip else raw

    def example(self, raw: np.ndarray) -> np.ndarray:
        return raw

    def collate(self, samples: Sequence[np.ndarray], key: np.ndarray) -> ImageBatch:
        return ImageBatch(torch.from_numpy(np.stack(samples)), key=key)


def blobs(index: int, size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """A slope of colours with some round spots, soft as clouds and nowhere brighter than three quarters of white; the
    same one for a number: uint8 [C, H, W]."""
    rng = np.random.default_rng([index, 11])
    down, across = np.meshgrid(*(np.linspace(-1, 1, side) for side in size), indexing="ij")
    colours = rng.uniform(0.1, 0.5, (2, channels, 1, 1))
    share = 0.5 + 0.5 * np.sin(rng.uniform(0.5, 2) * down + rng.uniform(0.5, 2) * across + rng.uniform(0, 6))
    image = colours[0] * share + colours[1] * (1 - share)
    for _ in range(rng.integers(3, 6)):
        y, x, width = *rng.uniform(-0.9, 0.9, 2), rng.uniform(0.2, 0.45)
        spot = np.exp(-((down - y) ** 2 + (across - x) ** 2) / (2 * width**2))
        image += spot * (rng.uniform(0.05, 0.75, (channels, 1, 1)) - image)
    return (255 * image.clip(0, 0.75)).round().astype(np.uint8)


def with_square(images: torch.Tensor, white: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [B, C, H, W] with a bright square on each, a fifth of the shorter side wide, at another place in each
    row; and bool [B, H, W], where it is. white: its value, [C, 1, 1]."""
    batch, _, height, width = images.shape
    side = max(1, min(height, width) // 5)
    where = torch.zeros(batch, height, width, dtype=torch.bool, device=images.device)
    for row in range(batch):
        top = (height - side) * (2 + 5 * row % 7) // 9  # away from the border
        left = (width - side) * (2 + 3 * row % 7) // 9
        where[row, top : top + side, left : left + side] = True
    return torch.where(where[:, None], white, images), where
