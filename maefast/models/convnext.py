"""ConvNeXt (Liu et al., 2022) and ConvNeXt V2 (Woo et al., 2023) under their public parameter names."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import ops
from maefast.nn.cells import Cells
from maefast.nn.drop_path import DropPath
from maefast.nn.init import TOKEN_STD

# name -> (blocks of each stage, their widths)
SIZES = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}
EPS = 1e-6


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps [B, C, H, W], or of cells."""

    def forward(self, x: Tensor | Cells) -> Tensor | Cells:
        if isinstance(x, Cells):
            return x.like(ops.add_norm(x.rows, None, self.weight, self.bias, self.eps)[1])
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GRN(nn.Module):
    """Global response normalisation; see `maefast.ops.grn` for what `scope` means on cells. Dense maps are "dense"."""

    def __init__(self, width: int, scope: str = "sample") -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.scope = scope


class Block(nn.Module):
    """7x7 depthwise convolution, LayerNorm, and an MLP with GRN (V2) or a layer scale (V1), with a shortcut.

    Args:
        width: channels C. drop_path: rate. grn_scope: of the GRN, or None for V1's layer scale `gamma`.
        layer_scale: V1's initial gamma.
    """

    def __init__(
        self, width: int, drop_path: float = 0.0, grn_scope: str | None = "sample", layer_scale: float = 1e-6
    ) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.grn = None if grn_scope is None else GRN(4 * width, grn_scope)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), layer_scale)) if grn_scope is None else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor | Cells) -> Tensor | Cells:
        """Maps [B, C, H, W] or Cells -> the same."""
        if isinstance(x, Cells):
            return x + self.drop_path(x.like(self._branch(self._depthwise(x), x.plan)))
        y = self._branch(self.dwconv(x).permute(0, 2, 3, 1), None)
        return x + self.drop_path(y.permute(0, 3, 1, 2))

    def _depthwise(self, x: Cells) -> Tensor:
        return F.conv2d(x, self.dwconv.weight, self.dwconv.bias, 1, 3, 1, x.shape[1]).rows

    def _branch(self, y: Tensor, plan: ops.CellMask | None) -> Tensor:
        """Everything after the convolution, on rows [..., C]; a dense map has no plan."""
        y = ops.add_norm(y, None, self.norm.weight, self.norm.bias, self.norm.eps)[1]
        y = ops.bias_gelu(ops.linear(y, self.pwconv1.weight), self.pwconv1.bias)
        weight, bias = self.pwconv2.weight, self.pwconv2.bias
        if self.grn is not None:
            y = ops.grn(y, plan, self.grn.gamma, self.grn.beta, EPS, "dense" if plan is None else self.grn.scope)
        else:  # gamma * (W y + b), without another pass over y
            weight, bias = self.gamma[:, None] * weight, self.gamma * bias
        return ops.linear(y, weight, bias)


class ConvNeXt(nn.Module):
    """Four stages, each behind a convolution that is as wide as its stride.

    Args:
        depths, widths: of the stages. in_chans: C. drop_path: rate of the last block, rising linearly.
        grn_scope: "sample" or "batch" for V2 (see `maefast.ops.grn`); None for V1.
        layer_scale: of V1. num_classes: 0 leaves out the last norm and the classifier.
    """

    def __init__(
        self,
        depths: tuple[int, ...] = SIZES["tiny"][0],
        widths: tuple[int, ...] = SIZES["tiny"][1],
        in_chans: int = 3,
        drop_path: float = 0.0,
        grn_scope: str | None = "sample",
        layer_scale: float = 1e-6,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.widths = list(widths)
        stem = nn.Sequential(nn.Conv2d(in_chans, widths[0], 4, 4), MapNorm(widths[0], eps=EPS))
        self.downsample_layers = nn.ModuleList([stem])
        for cin, cout in pairwise(widths):
            self.downsample_layers.append(nn.Sequential(MapNorm(cin, eps=EPS), nn.Conv2d(cin, cout, 2, 2)))
        rates = [drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        self.stages = nn.ModuleList()
        for i, (depth, width) in enumerate(zip(depths, widths)):
            first = sum(depths[:i])
            blocks = [Block(width, rates[first + j], grn_scope, layer_scale) for j in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(widths[-1], eps=EPS) if num_classes else nn.Identity()
        self.head = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()
        init_convnext_(self)

    def get_downsample_ratio(self) -> int:
        """Sides of the image over those of the last map."""
        return 2 ** (len(self.stages) + 1)

    def get_feature_map_channels(self) -> list[int]:
        """Channels of each stage's map."""
        return list(self.widths)

    def forward(self, x: Tensor, hierarchical: bool = False) -> Tensor | list[Tensor]:
        """Images [B, C, H, W] (or `maefast.nn.Cells`) to logits; `hierarchical`: to the maps of the stages."""
        maps = []
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
            maps.append(x)
        return maps if hierarchical else self.head(self.norm(x.mean((-2, -1))))


def init_convnext_(module: nn.Module) -> None:
    """Convolutions and linear layers: normal, standard deviation 0.02, cut at two; biases zero. In place."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(layer.weight, std=TOKEN_STD, a=-2 * TOKEN_STD, b=2 * TOKEN_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
