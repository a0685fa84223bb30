"""A small encoder and decoder of maps for segmentation, and its loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from maefast.ops import _checks

IGNORED = 255  # a label of no class


class ConvStage(nn.Module):
    """``x = gelu(norm(down(x))); x = x + conv2(gelu(conv1(x)))``, with a norm over all channels and places."""

    def __init__(self, in_chans: int, width: int, stride: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(in_chans, width, 2 * stride - 1, stride, stride - 1)
        self.norm = nn.GroupNorm(1, width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.down(x)))
        return x + self.conv2(F.gelu(self.conv1(x)))


class ConvPyramid(nn.Module):
    """Images [B, C, H, W] -> maps at `strides` of the image, fine ones first, with as many `channels`. Each stride is a
    multiple of the one before."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], in_chans: int = 3) -> None:
        super().__init__()
        steps = [one // before for before, one in zip((1, *strides), strides)]
        self.stages = nn.ModuleList(ConvStage(*of) for of in zip((in_chans, *channels), channels, steps))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [images]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


class PyramidHead(nn.Module):
    """Maps -> logits [B, classes, h, w] at the finest one's resolution: each through a 1 x 1 convolution, resized and
    summed, GELU, a 3 x 3 convolution and GELU, a 1 x 1 convolution."""

    def __init__(self, channels: Sequence[int], classes: int, width: int = 256) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(of, width, 1) for of in channels)
        self.mix, self.pred = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        total = sum(resized(lateral(one), size) for lateral, one in zip(self.laterals, maps))
        return self.pred(F.gelu(self.mix(F.gelu(total))))


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, h, w] -> [B, C, *size], bilinear."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def segmentation_loss(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of each pixel, in float32 at least, as MMSegmentation reduces it: the sum of weighted losses over
    the number of all pixels, those without a class (255) too.

    Args:
        logits: [B, K, h, w], resized (bilinear) to the labels. labels: int64 [B, H, W]. weight: [B, H, W], or what
            broadcasts to it, such as [B, 1, 1]; None: 1.
    """
    _checks.tensor("logits", logits, ndim=4)
    _checks.tensor("labels", labels, ndim=3, floating=False)
    if len(labels) != len(logits):
        raise ValueError(f"labels must be of {len(logits)} images, got {len(labels)}")
    logits = logits if logits.dtype.itemsize > 4 else logits.float()
    each = F.cross_entropy(resized(logits, labels.shape[1:]), labels, ignore_index=IGNORED, reduction="none")
    return (each if weight is None else each * weight).mean()
