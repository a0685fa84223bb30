"""The residual 3-D U-Net of nnU-Net (Isensee et al., MICCAI 2024, arXiv:2404.09556): `ResidualEncoder`, `UNetDecoder`.

Plain torch modules under the parameter names of the public code; `maefast.sparsify` lets the encoder run on the visible
cells of a volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.nn.cells import Cells
from maefast.ops.sparse_conv import conv_maps


class InstanceNorm(nn.InstanceNorm3d):
    """The same on maps in channels-last memory, one pass less and without a copy."""

    def forward(self, x: Tensor | Cells) -> Tensor | Cells:
        if isinstance(x, Cells):
            return super().forward(x)
        rows = ops.instance_norm_cells(x.movedim(1, -1), None, self.weight, self.bias, self.eps)
        return rows.movedim(-1, 1)


class Conv3d(nn.Conv3d):
    """The same; in bfloat16 on a CPU also where the kernel is longer than the map (torch 2.13 leaves the gradient of
    its weight unwritten there)."""

    def forward(self, x: Tensor | Cells) -> Tensor | Cells:
        if isinstance(x, Cells) or x.ndim != 5:
            return super().forward(x)
        return conv_maps(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ConvBlock(nn.Module):
    """Convolution, instance norm and, with `act`, leaky ReLU."""

    def __init__(
        self, cin: int, cout: int, kernel: int = 3, stride: int = 1, bias: bool = True, act: bool = True
    ) -> None:
        super().__init__()
        self.conv = Conv3d(cin, cout, kernel, stride, kernel // 2, bias=bias)
        self.norm = InstanceNorm(cout, affine=True)
        self.act = nn.LeakyReLU() if act else nn.Identity()

    def forward(self, x: Tensor | Cells) -> Tensor | Cells:
        return self.act(self.norm(self.conv(x)))


class Stacked(nn.Module):
    """Convolutions one after the other."""

    def __init__(self, *convs: ConvBlock) -> None:
        super().__init__()
        self.convs = nn.Sequential(*convs)

    def forward(self, x: Tensor | Cells) -> Tensor | Cells:
        return self.convs(x)


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut: a mean over strides, 1x1x1 and a norm where widths differ (ResNet-D)."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBlock(cin, cout, 3, stride), ConvBlock(cout, cout, act=False)
        skip: list[nn.Module] = [nn.AvgPool3d(stride)] if stride > 1 else []
        skip += [ConvBlock(cin, cout, 1, bias=False, act=False)] if cin != cout else []
        self.skip, self.act = nn.Sequential(*skip), nn.LeakyReLU()

    def forward(self, x: Tensor | Cells) -> Tensor | Cells:
        return self.act(self.conv2(self.conv1(x)) + self.skip(x))


class Stage(nn.Module):
    def __init__(self, cin: int, cout: int, depth: int, stride: int) -> None:
        super().__init__()
        first = ResidualBlock(cin, cout, stride)
        self.blocks = nn.Sequential(first, *(ResidualBlock(cout, cout) for _ in range(depth - 1)))

    def forward(self, x: Tensor | Cells) -> Tensor | Cells:
        return self.blocks(x)


class ResidualEncoder(nn.Module):
    """A stem and stages, the first at the size of the volume and each other one at half the size of the last.

    Args:
        channels: C. widths, depths: channels and blocks of every stage.

    Raises:
        ValueError: widths and depths differ in number, or one of them is no positive int.
    """

    def __init__(self, channels: int, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        if len(widths) != len(depths) or not widths or min(*widths, *depths, channels) < 1:
            raise ValueError(f"widths and depths are positive, one for every stage, got {widths} and {depths}")
        self.widths = tuple(widths)
        self.stem = Stacked(ConvBlock(channels, widths[0]))
        sizes = zip((widths[0], *widths), widths, depths)
        self.stages = nn.Sequential(*(Stage(a, b, depth, 1 if i == 0 else 2) for i, (a, b, depth) in enumerate(sizes)))

    def forward(self, x: Tensor | Cells) -> list[Tensor | Cells]:
        """[B, C, D, H, W] -> the map of every stage, fine to coarse; of cells, cells."""
        maps, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class UNetDecoder(nn.Module):
    """From the coarsest map up: a transposed convolution of stride 2, the encoder's map beside it, convolutions.

    Args:
        widths: of the encoder's maps, fine to coarse. out: channels of the result. depth: convolutions of a level.
    """

    def __init__(self, widths: Sequence[int], out: int, depth: int = 1) -> None:
        super().__init__()
        down = list(pairwise(reversed(widths)))
        self.transpconvs = nn.ModuleList(nn.ConvTranspose3d(below, skip, 2, 2) for below, skip in down)
        self.stages = nn.ModuleList(
            Stacked(ConvBlock(2 * skip, skip), *(ConvBlock(skip, skip) for _ in range(depth - 1))) for _, skip in down
        )
        self.pred = Conv3d(widths[0], out, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps fine to coarse -> [B, out, D, H, W]."""
        *skips, x = maps
        for up, stage, skip in zip(self.transpconvs, self.stages, reversed(skips)):
            x = stage(torch.cat((up(x), skip), 1))
        return self.pred(x)
