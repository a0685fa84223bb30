"""Decoded images into the pixels of a batch: `resize` cuts, scales, turns round and reorders in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maefast.ops import _checks, _dispatch, _registry

_raw_op = _registry.family("resize", triton=False)  # images are decoded on the host

CHANNELS = 4  # at most
_BITS = 22  # after the point of a weight


def resize(
    image: Tensor,
    size: Sequence[int],
    *,
    box: Sequence[float] | None = None,
    flip: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """An image of another size by the antialiased bicubic filter (Keys, 1981, a = -1/2; wider where it shrinks), as
    Pillow's ``Image.resize(size, BICUBIC, box=box)``: equal to it bit for bit, but that Pillow 13 filters columns
    first in images that are tall, or shrink in height much more than in width, as crops for training do not.

    Rows first, then columns; weights are integers of 22 bits after the point, values are rounded and clipped to 0..255
    after each of both. To let no pixel outside of a crop take part, give the crop itself, a view.

    Args:
        image: uint8 [H, W, C] on the CPU, C of 1 to 4; rows may lie apart, as those of a crop do.
        size: (h, w).
        box: (left, top, right, bottom) in pixels of `image`, whole or not, within it; None: all of it.
        flip: left and right exchanged.
        out: uint8 [C, h, w], contiguous: gets the result, such as a place in a batch.

    Returns:
        uint8 [C, h, w]: `out`, or a new tensor.

    Raises:
        TypeError, ValueError: wrong shapes or dtypes; a box that is empty or leaves the image.
    """
    _checks.tensor("image", image, ndim=3, floating=False)
    if image.dtype is not torch.uint8 or image.device.type != "cpu":
        raise TypeError(f"image must be uint8 on the CPU, got {image.dtype} on {image.device}")
    channels = image.shape[2]
    if min(image.shape) < 1 or channels > CHANNELS:
        raise ValueError(f"image must be [H, W, C] of a pixel at least, C of 1 to {CHANNELS}, got {list(image.shape)}")
    height, width = _sides(size)
    box = _inside(box, image)
    flip, shape = _checks.flag("flip", flip), (channels, height, width)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8)
    else:
        _checks.tensor("out", out, ndim=3, floating=False)
        if out.dtype is not torch.uint8 or out.device.type != "cpu" or tuple(out.shape) != shape:
            raise ValueError(f"out must be uint8 {list(shape)} on the CPU, got {out.dtype} {list(out.shape)}")
        if not out.is_contiguous():
            raise ValueError("out must be contiguous")
    if not image[0].is_contiguous():
        image = image.contiguous()
    name = _dispatch.choose("resize", "cpu", image.dtype, backend)
    if name == "reference":
        return out.copy_(resize_reference(image, (height, width), box, flip))
    _registry.raw("resize", name)(image, *box, flip, out)
    return out


def resize_reference(image: Tensor, size: tuple[int, int], box: Sequence[float], flip: bool) -> Tensor:
    """The definition: two products with matrices of integers."""
    left, top, right, bottom = box
    rows = image.permute(2, 0, 1).long()
    rows = _rounded(rows @ weights(image.shape[1], left, right, size[1]).T)
    columns = _rounded(weights(image.shape[0], top, bottom, size[0]) @ rows)
    return (columns.flip(2) if flip else columns).to(torch.uint8)


def weights(count: int, low: float, high: float, made: int) -> Tensor:
    """int64 [made, count]: how much of each of `count` pixels is in each of `made` that divide low..high."""
    scale = float(np.float32(high) - np.float32(low)) / made  # as Pillow keeps a box
    wide = max(scale, 1.0)
    centers = low + (torch.arange(made, dtype=torch.float64)[:, None] + 0.5) * scale
    first = (centers - 2 * wide + 0.5).trunc().clamp_min(0)
    end = (centers + 2 * wide + 0.5).trunc().clamp_max(count)
    at = torch.arange(count, dtype=torch.float64)
    x = ((at - centers + 0.5) * (1 / wide)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    value = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    value = torch.where((at >= first) & (at < end), value, 0.0)
    value = value / value.sum(1, keepdim=True)
    return (value * 2**_BITS + 0.5 * value.sign()).trunc().long()


def _rounded(sums: Tensor) -> Tensor:
    return ((sums + (1 << (_BITS - 1))) >> _BITS).clamp(0, 255)


@_raw_op("resize(Tensor image, float left, float top, float right, float bottom, bool flip, Tensor(a!) out) -> ()")
def _resize_fake(image, left, top, right, bottom, flip, out):
    return None


def _sides(size: Sequence[int]) -> tuple[int, int]:
    if not isinstance(size, Sequence) or len(size) != 2:
        raise TypeError(f"size must be (height, width), got {size!r}")
    for name, side in zip(("height", "width"), size):
        _checks.integer(f"size: {name}", side, 1)
    return int(size[0]), int(size[1])


def _inside(box: Sequence[float] | None, image: Tensor) -> tuple[float, float, float, float]:
    height, width = image.shape[:2]
    if box is None:
        return 0.0, 0.0, float(width), float(height)
    if not isinstance(box, Sequence) or len(box) != 4 or not all(isinstance(side, (int, float)) for side in box):
        raise TypeError(f"box must be (left, top, right, bottom), four numbers, got {box!r}")
    left, top, right, bottom = (float(np.float32(side)) for side in box)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height) or not math.isfinite(right + bottom):
        raise ValueError(f"box must not be empty and lie within an image of {width} x {height}, got {tuple(box)}")
    return left, top, right, bottom
