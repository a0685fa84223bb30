"""Batches of images, as they are loaded and as models take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from maefast.errors import TrainError
from maefast.recipe import Batch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as MAE uses
GREY_MEAN, GREY_STD = (0.449,), (0.226,)


@dataclass
class ImageBatch(Batch):
    """images: uint8 or uint16 [B, C, H, W]."""

    images: torch.Tensor


def normaliser(channels: int, device: torch.device | str = "cpu"):
    """(mean, std) as float32 [C, 1, 1] on the 0..1 scale, for colour or grey images."""
    if channels not in (1, 3):
        raise TrainError(f"photographs give 1 or 3 channels; the model wants {channels}: --channels {channels}")
    mean, std = (MEAN, STD) if channels == 3 else (GREY_MEAN, GREY_STD)
    return tuple(torch.tensor(v, dtype=torch.float32, device=device).view(-1, 1, 1) for v in (mean, std))


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """uint8 or uint16 [B, C, H, W] -> the dtype of `mean`, (images / 255 - mean) / std; 65535 for sixteen bits."""
    white = 65535 if images.dtype is torch.uint16 else 255
    return images.to(mean.dtype).div_(white).sub_(mean).div_(std)
