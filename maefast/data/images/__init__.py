"""Images from files: finding, decoding and augmenting them, and pictures of what a model makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maefast.data.images.source import ImageSource


@dataclass(frozen=True)
class Images:
    """A recipe wants `ImageBatch`es: `channels` 1 (grey) or 3 (colour), `size` (height, width)."""

    channels: int
    size: tuple[int, int]

    def open(self, options: Any) -> ImageSource:
        from maefast.data.images.source import ImageSource

        return ImageSource(self, options)
