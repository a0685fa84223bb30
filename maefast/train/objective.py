"""What a step minimises, from the images as they are loaded."""

from __future__ import annotations

import torch
from torch import nn

from .data import normalise, normaliser


class Objective(nn.Module):
    """uint8 images and noise -> loss. Returning the loss alone keeps Accelerate from casting the prediction."""

    def __init__(self, model: nn.Module, mask_ratio: float, channels: int):
        super().__init__()
        self.model, self.mask_ratio = model, mask_ratio
        mean, std = normaliser(channels)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        images = normalise(images, self.mean, self.std)
        return self.model(images, mask_ratio=self.mask_ratio, noise=noise, pred="masked")[0]
