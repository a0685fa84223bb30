"""The part of a `Kind` of samples that pictures of any sort share: crops as the options of a run name them."""

from __future__ import annotations

from typing import Any

Box = tuple[int, int, int, int]  # left, top, right, bottom


class Cropped:
    """Of `wants`, which has a `unit` and a `size` (height, width); `augment` draws boxes and says how often to flip."""

    def __init__(self, wants: Any, options: Any) -> None:
        from maefast.data.images.augment import Augment

        self.wants, self.unit = wants, wants.unit
        self.augment = Augment(wants.size, options.crop_scale, options.crop_ratio, options.flip)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.wants!r}, {self.augment!r})"

    def centre(self, width: int, height: int) -> Box:
        """The largest centred box of the shape of `size`."""
        from maefast.data.images.pixels import centre_box

        return centre_box(width, height, self.wants.size)
