"""ColorMAE: MAE with masks of filtered noise, which depend on no data (Hinojosa et al., ECCV 2024, arXiv:2407.13036).

The patches of the largest values of a noise map stay visible. Low-pass noise ("red") hides large pieces, high-pass
noise ("blue") spreads evenly, band-pass noise ("green", the paper's best) lies between. All else is MAE's: with t a
patch's pixels,

    loss = mean over hidden patches of (pred - (t - mean(t)) / sqrt(var(t) + 1e-6))^2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maefast import masking, models, ops
from maefast.data.images.batch import ImageBatch
from maefast.names import Names
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._images import ImageRecipe, mean_colour


class ColorMAE(ImageRecipe):
    """Args:
        model: a `mae_*` model of `maefast.models`.
        colour: "red", "green", "blue" or "purple". sigma: of its Gaussians, in patches; see `masking.coloured`.
        mask_ratio: int(N * (1 - ratio)) patches stay visible. norm_pix: normalised pixels.
        arguments: of the model.

    Shapes: images [B, 3, H, W]; latents [B, 1 + visible, D]; pred [B, hidden, 3 * p * p].
    """

    spec = Spec(
        name="colormae",
        title="ColorMAE",
        paper="Hinojosa et al., ECCV 2024, arXiv:2407.13036",
        modality="images",
        sizes={"base": {"model": "mae_base"}, "small": {"model": "mae_small"}, "large": {"model": "mae_large"}},
        training={"blr": 1.5e-4, "epochs": 300, "warmup": 40 / 300},
        demo={
            "model_args": {"embed_dim": 128, "depth": 4, "num_heads": 4, "decoder_embed_dim": 64, "decoder_depth": 2,
                           "decoder_num_heads": 2},
            "img_size": 64, "patch_size": 8, "norm_pix": False, "steps": 300, "batch_size": 32, "lr": 1e-3,
        },
        baseline="the mean colour",
    )  # fmt: skip
    names = Names(("", "model."))

    def __init__(
        self,
        model: str = "mae_base",
        colour: str = "green",
        sigma: float | Sequence[float] | None = None,
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
        **arguments: Any,
    ) -> None:
        made = models.create(model, norm_pix_loss=norm_pix, **arguments)
        super().__init__(made.in_chans, made.img_size)
        self.model, self.mask_ratio = made, mask_ratio
        self.colour = {"colour": colour, "sigma": sigma}
        noise = torch.zeros(1, *made.grid_size, device="cpu")
        masking.coloured(1, made.grid_size, mask_ratio, **self.colour, noise=noise)  # its errors, now

    def prepare(self, batch: ImageBatch, draw: Draw, progress: Progress) -> View:
        """parts: float32 [B, C, H, W], normalised; plan: by noise of each sample's own."""
        images = self.images(batch)
        rows, columns = self.model.grid_size
        white = normal(draw.uniform("mask", rows * columns, images.device)).view(-1, rows, columns)
        return View(images, masking.coloured(len(images), (rows, columns), self.mask_ratio, **self.colour, noise=white))

    def compute(self, view: View) -> Output:
        loss, pred, _ = self.model(view.parts, mask=view.plan, pred="masked")
        return Output({"pixels": loss}, pred, view)

    def baseline(self, view: View) -> Output:
        model = self.model
        pred = mean_colour(view.parts, model.patch_size, view.plan.total_masked) * (not model.norm_pix_loss)
        norm = "mae" if model.norm_pix_loss else "none"
        return Output({"pixels": ops.patch_loss(pred, view.parts, view.plan, model.patch_size, norm=norm)}, pred, view)

    def encode(self, batch: ImageBatch) -> Tensor:
        """[B, 1 + N, D], class token first."""
        return self.model.encode(self.images(batch))

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images import pictures

        columns = pictures.columns_of(self.model, view.parts, self.mean, self.std, mask=view.plan)
        caption = f"{self.mask_ratio:.0%} masked by {self.colour['colour']} noise"
        return pictures.Sheet(columns, names, f"{caption}\n{pictures.note(self.model, False)}".strip())


def normal(uniform: Tensor) -> Tensor:
    """Standard normal numbers from uniform ones in [0, 1) of 24 bits."""
    return torch.special.ndtri(uniform.double() + 2**-25).float()
