"""Shapes on textures, as a demo of images with two kinds of labels, of which one gives the other away."""

from __future__ import annotations

import numpy as np

SHAPES = ("disc", "square", "cross", "ring")
_OFTEN = 0.85  # how likely a texture has one of its shapes; others appear with one minus that


def often(texture: int, shapes: int) -> np.ndarray:
    """float64 [shapes]: how likely a texture has each shape, by the bits of its number: the spurious cue."""
    bits = (texture >> np.arange(shapes)) & 1
    return np.where(bits, _OFTEN, 1 - _OFTEN)


def shapes_on_texture(
    index: int, side: int, shapes: int = 3, textures: int = 8, spurious: bool = True
) -> tuple[np.ndarray, np.ndarray, int]:
    """Grey shapes on coloured stripes, the same ones for an index every time.

    Args:
        side: height and width. shapes: up to 4, each is there or not. textures: how many there are.
        spurious: a texture has some shapes more often than others, see `often`; else each has each in half the cases.

    Returns:
        uint8 [side, side, 3]; float32 [shapes], 1 where the shape is there; the texture's number.
    """
    if not 1 <= shapes <= len(SHAPES):
        raise ValueError(f"shapes must lie in 1 to {len(SHAPES)}, got {shapes}")
    rng = np.random.default_rng([index, 19])
    texture = int(rng.integers(textures))
    there = rng.random(shapes) < (often(texture, shapes) if spurious else 0.5)
    image = _stripes(rng, side, texture, textures)
    rows, columns = np.mgrid[:side, :side] / side
    for shape in np.flatnonzero(there):
        quarter = np.array([shape // 2, shape % 2]) / 2 + 0.25  # of the image that a shape lies in
        y, x = quarter + rng.uniform(-0.06, 0.06, 2)
        image[_inside(SHAPES[shape], columns - x, rows - y, rng.uniform(0.13, 0.18))] = rng.uniform(0.85, 1.0)
    image += rng.normal(0, 0.04, image.shape)
    return (255 * image.clip(0, 1)).round().astype(np.uint8), there.astype(np.float32), texture


def _stripes(rng: np.random.Generator, side: int, texture: int, textures: int) -> np.ndarray:
    """float64 [side, side, 3]: of an angle, a width and a colour of the texture, moved at random."""
    own = np.random.default_rng([texture, 20])
    angle, waves, colour = np.pi * texture / textures, own.uniform(4, 8), own.uniform(0.1, 0.7, 3)
    rows, columns = np.mgrid[:side, :side] / side
    along = np.cos(angle) * columns + np.sin(angle) * rows
    stripes = 0.5 + 0.5 * np.sin(2 * np.pi * (waves * along + rng.random()))
    return (0.35 + 0.65 * stripes[..., None]) * colour * rng.uniform(0.8, 1.2)


def _inside(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.9 * radius
    if shape == "cross":
        return (np.maximum(abs(x), abs(y)) < radius) & (np.minimum(abs(x), abs(y)) < radius / 3)
    distance = np.hypot(x, y)
    return (distance < radius) & (shape == "disc" or distance > 0.55 * radius)
