"""MAE, SparK and FCMAE: images, a mask drawn uniformly, the pixels of what it hides."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from maefast.data.images import Images
from maefast.data.images.batch import ImageBatch, normalise, normaliser
from maefast.recipe import Draw, Output, Picture, Progress, Recipe, View


class MaskedImages(Recipe):
    """A model with the interface of `maefast.models.base.MaskedAutoencoder`, whose loss is its only term ("pixels").

    Args:
        mask_ratio: share of the patches that is removed.
        raw: draw normalised predictions as they are, see `MaskedAutoencoder.reconstruct`.
    """

    def __init__(self, model: nn.Module, mask_ratio: float, raw: bool = False) -> None:
        super().__init__()
        self.model, self.mask_ratio, self.raw = model, mask_ratio, raw
        channels, *size = image_shape(model)
        self.wants = Images(channels, tuple(size))
        self.settled = {"mask_ratio": mask_ratio}
        if hasattr(model, "norm_pix_loss"):
            self.settled["norm_pix"] = model.norm_pix_loss
        mean, std = normaliser(channels)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    @property
    def network(self) -> nn.Module:
        return self.model

    def prepare(self, batch: ImageBatch, draw: Draw, progress: Progress) -> View:
        """parts: float32 [B, C, H, W], normalised; plan: a TokenMask."""
        images = normalise(batch.images, self.mean, self.std)
        noise = draw.uniform("mask", self.model.num_patches, images.device)
        return View(images, self.model.plan(images, self.mask_ratio, noise=noise))

    def forward(self, view: View) -> Output:
        loss, pred, _ = self.model(view.parts, mask=view.plan, pred="masked")
        return Output({"pixels": loss}, pred, view)

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images import pictures

        columns = pictures.columns_of(self.model, view.parts, self.mean, self.std, self.raw, mask=view.plan)
        caption = f"{self.mask_ratio:.0%} masked"
        if how := pictures.note(self.model, self.raw):
            caption += f"\n{how}"
        return pictures.Sheet(columns, names, caption)


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images a model takes."""
    size, channels = model.img_size, model.in_chans
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(channels), int(height), int(width)
