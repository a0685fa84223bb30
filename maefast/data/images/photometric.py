"""Changes of colour, on the device, each a function of numbers that are given: so that a view can be drawn again."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = (0.299, 0.587, 0.114)
NUMBERS = 8  # that `second_view` takes for each image


def second_view(images: Tensor, numbers: Tensor) -> Tensor:
    """The second view of LUT (arXiv:2310.13593): a horizontal flip for half of the images, colour jitter for 80 %
    (brightness and contrast by 0.4, saturation by 0.2, hue by 0.1), and one of grey, solarised and blurred for each.

    Args:
        images: [B, 3, H, W] in [0, 1]. numbers: [B, NUMBERS], uniform in [0, 1).

    Returns:
        [B, 3, H, W] in [0, 1].
    """
    u = numbers.to(images.dtype).view(len(images), NUMBERS, 1, 1, 1).unbind(1)
    images = torch.where(u[0] < 0.5, images.flip(3), images)
    jittered = (images * _factor(u[2], 0.4)).clamp(0, 1)
    mean = grey(jittered).mean((1, 2, 3), keepdim=True)
    jittered = (mean + (jittered - mean) * _factor(u[3], 0.4)).clamp(0, 1)
    plain = grey(jittered)
    jittered = (plain + (jittered - plain) * _factor(u[4], 0.2)).clamp(0, 1)
    jittered = turned(jittered, (u[5] * 2 - 1) * 0.1).clamp(0, 1)
    images = torch.where(u[1] < 0.8, jittered, images)
    solarised = torch.where(images >= 128 / 255, 1 - images, images)
    blurred = blur(images, 0.1 + 1.9 * u[7])
    third = torch.where(u[6] < 2 / 3, solarised, blurred)
    return torch.where(u[6] < 1 / 3, grey(images).expand_as(images), third)


def _factor(u: Tensor, reach: float) -> Tensor:
    return 1 + (2 * u - 1) * reach


def grey(images: Tensor) -> Tensor:
    """[B, 1, H, W], by the weights of ITU-R 601."""
    weights = torch.tensor(GREY).to(images).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def turned(images: Tensor, turn: Tensor) -> Tensor:
    """Colours turned around the grey axis by `turn` [B, 1, 1, 1] of a circle, an approximation of a shift of hue."""
    angle = (2 * math.pi * turn).flatten(1)
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
    third, root = 1 / 3, math.sqrt(1 / 3)
    eye = torch.eye(3, dtype=images.dtype, device=images.device)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]).to(images)
    matrix = eye * cos + third * (1 - cos) + root * cross * sin  # [B, 3, 3]
    return torch.einsum("bij,bjhw->bihw", matrix, images)


def blur(images: Tensor, sigma: Tensor, reach: int = 6) -> Tensor:
    """Gaussian blur with a `sigma` [B, 1, 1, 1] in pixels for each image, in a window of 2 `reach` + 1."""
    batch, channels, height, width = images.shape
    reach = min(reach, height - 1, width - 1)
    offset = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (offset / sigma.view(-1, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]
    x = F.pad(images, (reach,) * 4, mode="reflect").flatten(0, 1)[None]
    for weight in (kernel[:, :, None], kernel[..., None]):
        x = F.conv2d(x, weight, groups=batch * channels)
    return x[0].unflatten(0, (batch, channels))
