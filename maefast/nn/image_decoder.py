"""A small map of features to an image, by convolutions: the decoder of VQGAN (Esser et al., 2021, arXiv:2012.09841)
without its attention; and the structural similarity of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.ops import _checks


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """``x + h`` with ``h = conv2(silu(norm2(conv1(silu(norm1(x))))))``; where channels change, a 1 x 1 convolution of x
    ("input") or of h ("output") in the place of x."""

    def __init__(self, channels: int, out: int, shortcut: str = "input") -> None:
        super().__init__()
        self.shortcut = shortcut
        self.norm1, self.norm2 = _norm(channels), _norm(out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        into = channels if shortcut == "input" else out
        self.nin_shortcut = nn.Conv2d(into, out, 1, bias=False) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(x if self.shortcut == "input" else h)
        return x + h


class Upsample(nn.Module):
    """Twice as large by the nearest pixel, and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Blocks at one resolution, and the way to the next."""

    def __init__(self, channels: int, out: int, blocks: int, last: bool, shortcut: str) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(channels if i == 0 else out, out, shortcut) for i in range(blocks))
        self.upsample = None if last else Upsample(out)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class ImageDecoder(nn.Module):
    """[B, in_channels, h, w] -> [B, out_channels, h * 2**k, w * 2**k] with k = len(multiples) - 1.

    Args:
        channels: of the largest resolution, times the first of `multiples`; the last is that of the smallest. A number
            of channels above 32 must be a multiple of 32, for the group norms. blocks: at each resolution.
        shortcut: "input", as VQGAN, or "output", as Vec2Face; see `ResnetBlock`.
    """

    def __init__(
        self,
        in_channels: int = 256,
        channels: int = 128,
        multiples: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        out_channels: int = 3,
        shortcut: str = "input",
    ) -> None:
        super().__init__()
        _checks.integer("channels", channels, 1)
        _checks.integer("blocks", blocks, 1)
        _checks.one_of("shortcut", shortcut, ("input", "output"))
        widths = [channels * times for times in multiples]
        if not widths:
            raise ValueError("multiples must name at least one resolution")
        last = widths[-1]
        self.conv_in = nn.Conv2d(in_channels, last, 3, padding=1)
        self.mid = nn.ModuleDict({"block_1": ResnetBlock(last, last), "block_2": ResnetBlock(last, last)})
        before = [*widths[1:], last]
        self.up = nn.ModuleList(
            Level(into, width, blocks, i == 0, shortcut) for i, (into, width) in enumerate(zip(before, widths))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # rows of tokens make a channels-last map, a third slower through all that follows
            x = x.contiguous()
        x = self.mid["block_2"](self.mid["block_1"](self.conv_in(x)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def ssim(one: Tensor, other: Tensor, data_range: float = 1.0, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Mean structural similarity (Wang et al., 2004), a scalar at most 1: with m, v and c means, variances and the
    covariance within a Gaussian window that lies in the image, k1 = (0.01 range)^2 and k2 = (0.03 range)^2,

        mean of (2 m m' + k1) (2 c + k2) / ((m^2 + m'^2 + k1) (v + v' + k2))

    Args:
        one, other: [B, C, H, W], each side at least `window`, an odd number of pixels.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit.
    """
    _checks.tensor("one", one, ndim=4)
    _checks.tensor("other", other, ndim=4)
    _checks.positive("data_range", data_range)
    _checks.integer("window", window, 1)
    if one.shape != other.shape or one.dtype is not other.dtype:
        raise ValueError(f"one and other must be alike, got {tuple(one.shape)} and {tuple(other.shape)}")
    if window % 2 == 0 or min(one.shape[2:]) < window:
        raise ValueError(f"window must be odd and at most the sides {tuple(one.shape[2:])}, got {window}")
    weights = torch.exp(
        -((torch.arange(window, device=one.device, dtype=one.dtype) - window // 2) ** 2) / (2 * sigma**2)
    )
    weights = weights / weights.sum()
    maps = torch.cat([one, other, one * one, other * other, one * other], 1)
    kernel = (weights[:, None] * weights).expand(maps.shape[1], 1, -1, -1)
    m, n, mm, nn_, mn = F.conv2d(maps, kernel, groups=len(kernel)).chunk(5, 1)
    k1, k2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    v, w, c = mm - m * m, nn_ - n * n, mn - m * n
    return ((2 * m * n + k1) * (2 * c + k2) / ((m * m + n * n + k1) * (v + w + k2))).mean()
