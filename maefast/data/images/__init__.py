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

    options = ("crop_scale", "crop_ratio", "flip", "value_range", "pixel_bits", "max_pixels", "gpu_decode")

    def check(self, batch: Any) -> None:
        """Raise unless it is a batch of such images."""
        from maefast.data.images.batch import ImageBatch

        if not isinstance(batch, ImageBatch):
            raise TypeError(f"an ImageBatch is wanted, got {type(batch).__name__}")
        found, want = batch.images, (self.channels, *self.size)
        if found.ndim != 4 or tuple(found.shape[1:]) != want or found.is_floating_point():
            sizes = ", ".join(map(str, want))
            raise ValueError(f"images must be uint8 or uint16 [B, {sizes}], got {found.dtype} {tuple(found.shape)}")

    def open(self, options: Any) -> ImageSource:
        from maefast.data.images.source import ImageSource

        return ImageSource(self, options)
