"""Made videos with captions: a coloured shape moves over a coloured pattern."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import numpy as np

COLOURS = {
    "red": (225, 40, 40), "green": (40, 190, 70), "blue": (50, 80, 230), "yellow": (240, 215, 40),
    "violet": (160, 60, 200), "white": (240, 240, 240),
}  # fmt: skip
SHAPES = ("disc", "square", "ring")
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
PATTERNS = {"stripes": (1, 0), "bars": (0, 1), "checks": (1, 1)}  # waves down and across
_COARSE = 4  # pixels of a value of the map of the shape


class MovingShape:
    """The video number `index`, always the same.

    Attributes:
        caption: such as "a red disc moves left over blue stripes".
    """

    def __init__(self, index: int) -> None:
        self.index, rng = index, np.random.default_rng([15, index])
        self.colour, self.ground = rng.choice(list(COLOURS), 2, replace=False)
        self.shape, self.way, self.pattern = (rng.choice(list(names)) for names in (SHAPES, WAYS, PATTERNS))
        self.caption = f"a {self.colour} {self.shape} moves {self.way} over {self.ground} {self.pattern}"

    def embedding(self, width: int) -> np.ndarray:
        """Of the caption, float32 [width] of length 1: the sum of a random vector for each word."""
        words = (self.colour, self.shape, self.way, f"over {self.ground}", self.pattern)
        total = np.sum([_vector(word, width) for word in words], axis=0)
        return (total / np.linalg.norm(total)).astype(np.float32)

    def video(self, frames: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [frames, H, W, 3]; and where the shape is, float32 [frames, H / 4, W / 4]: 1 within it, less farther
        away, as a model that looks for the caption's words could say."""
        rng, side = np.random.default_rng([16, self.index]), min(size)
        rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float32)
        down, across = PATTERNS[self.pattern]
        wave, phases = 8 * np.pi / side, rng.uniform(0, 2 * np.pi, 2)
        height = np.cos((wave * rows + phases[0]) * down) * np.cos((wave * columns + phases[1]) * across)
        ground = np.array(COLOURS[self.ground], np.float32) * (0.6 + 0.35 * height[..., None])
        radius = side * rng.uniform(0.26, 0.32)
        middle = np.array(size) / 2 + rng.uniform(-0.08, 0.08, 2) * side
        way = np.outer(np.linspace(-0.15, 0.15, frames), WAYS[self.way]) * side + middle
        y, x = (t - way[:, i, None, None] for i, t in enumerate((rows, columns)))
        y, x = y / radius, x / radius
        far = np.maximum(abs(y), abs(x)) * 1.15 if self.shape == "square" else np.hypot(y, x)
        inside = (far < 1) & ((far > 0.45) | (self.shape != "ring"))
        light = 1 - 0.3 * np.hypot(y + 0.3, x + 0.3)  # lit from the upper left
        shape = np.array(COLOURS[self.colour], np.float32) * light[..., None]
        video = np.where(inside[..., None], shape, ground).clip(0, 255).astype(np.uint8)
        near = np.where(inside, 1.0, 0.8 * np.exp(1 - np.maximum(far, 1)))
        return video, near[:, _COARSE // 2 :: _COARSE, _COARSE // 2 :: _COARSE].astype(np.float32)


@lru_cache(maxsize=256)
def _vector(word: str, width: int) -> np.ndarray:
    seed = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).standard_normal(width)
