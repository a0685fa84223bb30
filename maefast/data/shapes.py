"""Drawn shapes, with captions that say what they are: a demo of images with text."""

from __future__ import annotations

import numpy as np

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 40),
    "purple": (150, 60, 180),
    "white": (245, 245, 245),
}
SHAPES = ("square", "disc", "triangle", "cross")
SIZES = {"small": 0.13, "large": 0.2}  # half of the side, as a share of the image's
SIDES = ("left", "right")
WORDS = ("<s>", "</s>", "<mask>", *SIZES, *COLOURS, *SHAPES, "and", "a", *SIDES)
MASK = WORDS.index("<mask>")


def scene(number: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """One or two shapes on grey, as pixels uint8 [side, side, 3], and the caption's words as places in `WORDS`, int64
    [n]; a function of `number`. Two are told from left to right; one, with the side on which it is."""
    rng = np.random.default_rng([number, 0])
    image = np.full((side, side, 3), rng.integers(70, 110), np.uint8)
    rows, columns = (np.mgrid[:side, :side] + 0.5) / side
    places = (0.26, 0.74) if rng.random() < 0.3 else (rng.choice([0.26, 0.74]),)
    said = ["<s>"]
    for place in places:
        size, colour, shape = (str(rng.choice(list(some))) for some in (SIZES, COLOURS, SHAPES))
        at = place + rng.uniform(-0.04, 0.04), rng.uniform(0.25, 0.75)
        image[inside(shape, (columns - at[0]) / SIZES[size], (rows - at[1]) / SIZES[size])] = COLOURS[colour]
        said += ["and"] * (len(said) > 1) + ["a", size, colour, shape]
    if len(places) == 1:
        said.append(SIDES[int(places[0] > 0.5)])
    return image, np.array([WORDS.index(word) for word in (*said, "</s>")])


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where a shape of half-width 1 around the origin is, y down."""
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.85
    if shape == "disc":
        return x * x + y * y < 1
    if shape == "triangle":
        return (abs(x) < (y + 1) / 2) & (y < 1)
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) < 0.33) & (np.maximum(abs(x), abs(y)) < 1)
    raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
