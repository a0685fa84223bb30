"""MAE, SparK and FCMAE: images, a mask drawn uniformly, the pixels of what it hides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from maefast import models
from maefast.data.channels import shown
from maefast.data.images.batch import ImageBatch
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._images import ImageRecipe

_SIZES = {"tiny": "mae_tiny", "small": "mae_small", "large": "mae_large", "huge": "mae_huge"}
_DEMO = {"batch_size": 32, "steps": 300, "lr": 1e-3}


class MaskedImages(ImageRecipe):
    """A model with the interface of `maefast.models.base.MaskedAutoencoder`, whose loss is its only term ("pixels").

    Args:
        mask_ratio: share of the patches that is removed.
        raw: draw normalised predictions as they are, see `MaskedAutoencoder.reconstruct`.
        measured: learns from numbers of any number of channels, not from photographs, see `ImageRecipe`.
    """

    def __init__(self, model: nn.Module, mask_ratio: float, raw: bool = False, measured: bool = False) -> None:
        channels, *size = image_shape(model)
        super().__init__(channels, size, measured)
        self.model, self.mask_ratio, self.raw = model, mask_ratio, raw
        self.settled = {"mask_ratio": mask_ratio}
        if hasattr(model, "norm_pix_loss"):
            self.settled["norm_pix"] = model.norm_pix_loss

    @property
    def network(self) -> nn.Module:
        return self.model

    def prepare(self, batch: ImageBatch, draw: Draw, progress: Progress) -> View:
        """parts: float32 [B, C, H, W], normalised; plan: a TokenMask."""
        images = self.images(batch)
        noise = draw.uniform("mask", self.model.num_patches, images.device)
        return View(images, self.model.plan(images, self.mask_ratio, noise=noise))

    def compute(self, view: View) -> Output:
        loss, pred, _ = self.model(view.parts, mask=view.plan, pred="masked")
        return Output({"pixels": loss}, pred, view)

    def encode(self, batch: ImageBatch) -> Tensor:
        """Of a ViT [B, 1 + N, D], class token first; of a convnet its last map, [B, C, H, W]."""
        if not hasattr(self.model, "encode"):
            raise NotImplementedError(f"{type(self.model).__name__} gives no features: it has no `encode`")
        found = self.model.encode(self.images(batch))
        return found[-1] if isinstance(found, (list, tuple)) else found  # SparK's maps, fine to coarse

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images import pictures

        columns = pictures.columns_of(self.model, view.parts, self.mean, self.std, self.raw, mask=view.plan)
        columns = [shown(column) for column in columns]
        caption = f"{self.mask_ratio:.0%} masked"
        if how := pictures.note(self.model, self.raw):
            caption += f"\n{how}"
        return pictures.Sheet(columns, names, caption)


class _Published(MaskedImages):
    """Args:
    model: a name that `maefast.models.create` knows. mask_ratio: None: the model's usual one. raw: see
        `MaskedImages`. arguments: of the model.
    """

    def __init__(self, model: str | None = None, mask_ratio: float | None = None, raw: bool = False, **arguments: Any):
        made = models.create(next(iter(self.spec.sizes.values()))["model"] if model is None else model, **arguments)
        super().__init__(made, made.usual_mask_ratio if mask_ratio is None else mask_ratio, raw)


class MAE(_Published):
    """A ViT that predicts the pixels of hidden patches; see `maefast.models.MaskedAutoencoderViT`."""

    spec = Spec(
        name="mae",
        title="MAE",
        paper="He et al., CVPR 2022, arXiv:2111.06377",
        modality="images",
        sizes={"base": {"model": "mae_base"}, **{size: {"model": name} for size, name in _SIZES.items()}},
        demo={**_DEMO, "model_args": {"embed_dim": 128, "depth": 4, "num_heads": 4, "decoder_embed_dim": 64,
                                      "decoder_depth": 2, "decoder_num_heads": 2},
              "img_size": 64, "patch_size": 8, "norm_pix": False},
    )  # fmt: skip


class FMAE(_Published):
    """A `MAE` of faces, of whole images: resized and flipped, not cropped. The first stage of the recipe `fmae_iat`."""

    spec = Spec(
        name="fmae",
        title="FMAE, the first stage of FMAE-IAT",
        paper="Ning et al., 2024, arXiv:2407.11243",
        modality="images",
        sizes={size: {"model": f"mae_{size}"} for size in ("large", "base", "small")},
        training={"norm_pix": True, "epochs": 50, "batch_size": 512, "warmup": 0.04, "crop_scale": (1.0, 1.0),
                  "crop_ratio": (1 / 16, 16.0)},
        demo={**MAE.spec.demo, "warmup": 0.05},
    )  # fmt: skip


class NViSTMAE(_Published):
    """A `MAE` of views of scenes. The first stage of the recipe `nvist`."""

    spec = Spec(
        name="nvist_mae",
        title="the first stage of NViST",
        paper="Jang & Agapito, CVPR 2024, arXiv:2312.08568",
        modality="images",
        sizes={"base": {"model": "mae_base", "img_size": (160, 90), "patch_size": 5}},
        training={
            "img_size": [160, 90], "patch_size": 5, "norm_pix": False, "steps": 30_000, "batch_size": 84, "lr": 1e-4,
            "min_lr": 1e-6, "warmup": 1 / 30, "betas": (0.9, 0.999), "weight_decay": 0.01,
        },
        demo={**MAE.spec.demo, "weight_decay": 0.05},
    )  # fmt: skip


class SparK(_Published):
    """A convnet of which only visible cells are computed; see `maefast.models.SparK`."""

    spec = Spec(
        name="spark",
        title="SparK",
        paper="Tian et al., ICLR 2023, arXiv:2301.03580",
        modality="images",
        sizes={
            name.removeprefix("spark_"): {"model": name}
            for name in ("spark_resnet50", "spark_resnet101", "spark_convnext_tiny", "spark_convnext_small",
                         "spark_convnext_base", "spark_convnext_large")
        },
        demo={**_DEMO, "img_size": 64, "steps": 60, "batch_size": 8},
    )  # fmt: skip


class FCMAE(_Published):
    """ConvNeXt V2 on visible cells; see `maefast.models.FCMAE`."""

    spec = Spec(
        name="fcmae",
        title="FCMAE (ConvNeXt V2)",
        paper="Woo et al., CVPR 2023, arXiv:2301.00808",
        modality="images",
        sizes={
            size: {"model": f"fcmae_convnextv2_{size}"}
            for size in ("base", "atto", "femto", "pico", "nano", "tiny", "large", "huge")
        },
        demo={**_DEMO, "model_args": {"depths": [1, 1, 2, 1], "widths": [24, 48, 96, 192], "decoder_embed_dim": 128},
              "img_size": 96, "norm_pix": False},
    )  # fmt: skip


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images a model takes."""
    size, channels = model.img_size, model.in_chans
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(channels), int(height), int(width)
