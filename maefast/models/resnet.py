"""ResNet (He et al., 2016) under timm's parameter names: a plain convnet, as encoder of SparK and for fine-tuning."""

from __future__ import annotations

from torch import Tensor, nn

from maefast.nn.drop_path import DropPath

DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut; the stride is in the 3x3, as in timm and torchvision."""

    expansion = 4

    def __init__(self, cin: int, width: int, stride: int, drop_path: float) -> None:
        super().__init__()
        cout = width * self.expansion
        self.conv1, self.bn1 = nn.Conv2d(cin, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, cout, 1, bias=False), nn.BatchNorm2d(cout)
        self.act = nn.ReLU(inplace=True)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        x = self.drop_path(self.bn3(self.conv3(x)))
        return self.act(x + shortcut)


class ResNet(nn.Module):
    """A ResNet of bottleneck blocks.

    Args:
        depths: blocks of the four stages. width: channels of the first stage's 3x3 convolutions.
        in_chans: C. num_classes: 0 leaves out the classifier. drop_path: rate of the last block, rising linearly.
    """

    def __init__(
        self,
        depths: tuple[int, ...] = DEPTHS["resnet50"],
        width: int = 64,
        in_chans: int = 3,
        num_classes: int = 0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 7, 2, 3, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.num_stages, cin, done = len(depths), width, 0
        self.widths: list[int] = []
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                rate = drop_path * done / max(1, sum(depths) - 1)
                blocks.append(Bottleneck(cin, width * 2**i, 2 if i and not j else 1, rate))
                cin, done = width * 2**i * Bottleneck.expansion, done + 1
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            self.widths.append(cin)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(cin, num_classes) if num_classes else nn.Identity()
        self._init()

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def get_downsample_ratio(self) -> int:
        """Sides of the image over those of the last map."""
        return 2 ** (self.num_stages + 1)

    def get_feature_map_channels(self) -> list[int]:
        """Channels of each stage's map."""
        return list(self.widths)

    def forward(self, x: Tensor, hierarchical: bool = False) -> Tensor | list[Tensor]:
        """Images [B, C, H, W] (or `maefast.nn.Cells`) to logits; `hierarchical`: to the maps of the stages."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        maps = []
        for i in range(self.num_stages):
            x = getattr(self, f"layer{i + 1}")(x)
            maps.append(x)
        return maps if hierarchical else self.fc(self.global_pool(x).flatten(1))
