"""Networks written in torchvision's manner: the functions, methods and in-place modules that such code calls.

On packed cells they equal the dense network with every layer multiplied by the mask, and the dense network itself where
nothing is masked.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maefast
from maefast import Cells, masking
from maefast.ops import CellMask
from tests.nn.common import assert_equals_masked


class ConvNormAct(nn.Sequential):
    def __init__(self, cin, cout, kernel=3, stride=1, groups=1, act=nn.ReLU):
        layers = [nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(cout)]
        super().__init__(*layers, *([act(inplace=True)] if act else []))


class StochasticDepth(nn.Module):
    """Mode "row": of whole samples. Seeded, so that the dense network drops the same ones."""

    def forward(self, x):
        noise = torch.empty([x.shape[0]] + [1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
        noise = noise.bernoulli_(0.5, generator=torch.Generator().manual_seed(0))
        noise.div_(0.5)
        return x * noise


class Bottleneck(nn.Module):
    """ResNet, and RegNet with groups."""

    def __init__(self, width, stride, groups=1):
        super().__init__()
        self.conv1 = ConvNormAct(width, width, 1)
        self.conv2 = ConvNormAct(width, width, 3, stride, groups)
        self.conv3, self.bn3 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.downsample = ConvNormAct(width, width, 1, stride, act=None)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn3(self.conv3(self.conv2(self.conv1(x))))
        out += self.downsample(x)
        return self.relu(out)


class InvertedResidual(nn.Module):
    """MobileNet V2 and V3, EfficientNet; `gate` of the squeeze-excite."""

    def __init__(self, width, stride, act, gate=None):
        super().__init__()
        hidden = 2 * width
        layers = [ConvNormAct(width, hidden, 1, act=act), ConvNormAct(hidden, hidden, 5, stride, hidden, act=act)]
        if gate is not None:
            layers.append(SqueezeExcitation(hidden, gate))
        self.block = nn.Sequential(*layers, ConvNormAct(hidden, width, 1, act=None))
        self.stochastic_depth, self.residual = StochasticDepth(), stride == 1

    def forward(self, x):
        result = self.block(x)
        if self.residual:
            result = self.stochastic_depth(result)
            result += x
        return result


class SqueezeExcitation(nn.Module):
    def __init__(self, width, gate):
        super().__init__()
        self.avgpool, self.gate, self.relu = nn.AdaptiveAvgPool2d(1), gate(), nn.ReLU(inplace=True)
        # Linear maps of what was pooled, which no mask concerns.
        self.fc1, self.fc2 = (nn.Parameter(torch.randn(width, width) / width) for _ in range(2))

    def forward(self, x):
        scale = F.linear(self.avgpool(x).flatten(1), self.fc1)
        scale = self.gate(F.linear(self.relu(scale), self.fc2))[:, :, None, None]
        return scale * x


class DenseLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(2 * width), nn.ReLU(inplace=True)
        self.conv, self.mix = nn.Conv2d(2 * width, width, 3, padding=1), nn.Conv2d(3 * width, width, 1)

    def forward(self, x):
        features = [x] if isinstance(x, Tensor) else x
        features = [torch.cat(features, 1)] * 2
        features.append(self.conv(self.relu(self.norm(torch.cat(features, 1)))))
        return self.mix(torch.cat(features, 1))


class ShuffleUnit(nn.Module):
    def __init__(self, width, stride):
        super().__init__()
        half, self.stride = width // 2, stride
        inputs = width if stride > 1 else half
        depthwise = partial(ConvNormAct, kernel=3, stride=stride, act=None)
        self.branch1 = nn.Sequential(depthwise(width, width, groups=width), ConvNormAct(width, half, 1))
        self.branch2 = nn.Sequential(
            ConvNormAct(inputs, half, 1), depthwise(half, half, groups=half), ConvNormAct(half, half, 1)
        )

    def forward(self, x):
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        batch, channels, height, width = out.size()
        out = out.view(batch, 2, channels // 2, height, width)
        out = torch.transpose(out, 1, 2).contiguous()
        return out.view(batch, channels, height, width)


class Fire(nn.Module):
    """SqueezeNet, with its pooling."""

    def __init__(self, width):
        super().__init__()
        self.squeeze, self.activation = nn.Conv2d(width, width // 2, 1, bias=False), nn.ReLU(inplace=True)
        self.expand1x1, self.expand3x3 = (nn.Conv2d(width // 2, width // 2, k, padding=k // 2) for k in (1, 3))
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)

    def forward(self, x):
        x = self.activation(self.squeeze(x))
        x = torch.cat([self.activation(self.expand1x1(x)), self.activation(self.expand3x3(x))], 1)
        return self.pool(x)


class Permute(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return torch.permute(x, self.dims)


class NextBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.block = nn.Sequential(
            Permute([0, 2, 3, 1]),
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            Permute([0, 3, 1, 2]),
        )
        self.layer_scale, self.stochastic_depth = nn.Parameter(torch.ones(width, 1, 1)), StochasticDepth()

    def forward(self, x):
        result = self.layer_scale * self.block(self.dw(x))
        result = result if isinstance(result, Cells) else result * self.dw.active.map(result)
        result = self.stochastic_depth(result)
        result += x
        return result


class SamePadding(nn.Module):
    """TensorFlow's, as EfficientNets have it: more on the right and at the bottom."""

    def __init__(self, width, stride, dilation=1):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(width, width, 3, stride, dilation=dilation), nn.BatchNorm2d(width)
        self.stride, self.dilation = stride, dilation

    def forward(self, x):
        sides = []
        for size in x.shape[:-3:-1]:
            whole = max((-(-size // self.stride) - 1) * self.stride + 2 * self.dilation + 1 - size, 0)
            sides += [whole // 2, whole - whole // 2]
        return F.relu(self.bn(self.conv(F.pad(x, sides))))


class UNet(nn.Module):
    """Two levels down and up; skip connections by concatenation, the second one by addition."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = ConvNormAct(width, width), ConvNormAct(width, 2 * width)
        self.pool, self.low = nn.MaxPool2d(2), ConvNormAct(2 * width, 2 * width, 3, 2)
        self.up2 = nn.ConvTranspose2d(2 * width, 2 * width, 4, 2, 1, groups=2)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.up0 = nn.ConvTranspose2d(2 * width, width, 3, 2, 1, output_padding=1, bias=False)
        self.join = ConvNormAct(2 * width, 2 * width)

    def forward(self, x):
        first = self.first(x)
        second = self.second(self.pool(first))
        up = self.up2(self.low(second), output_size=second.shape) + second
        return self.up0(F.relu(self.join(torch.cat([self.up1(up), first], 1))))


STYLES = {
    "unet": lambda: [UNet(8)],
    "resnet": lambda: [nn.MaxPool2d(3, 2, 1), Bottleneck(8, 1), Bottleneck(8, 2)],
    "regnet": lambda: [Bottleneck(8, 2, 4), Bottleneck(8, 1, 2)],
    "mobilenet v2": lambda: [InvertedResidual(8, 1, nn.ReLU6), InvertedResidual(8, 2, nn.ReLU6)],
    "mobilenet v3": lambda: [InvertedResidual(8, s, nn.Hardswish, nn.Hardsigmoid) for s in (1, 2)],
    "efficientnet": lambda: [InvertedResidual(8, s, nn.SiLU, nn.Sigmoid) for s in (1, 2)],
    "densenet": lambda: [DenseLayer(8), nn.AvgPool2d(2), DenseLayer(8)],
    "shufflenet": lambda: [ShuffleUnit(8, 2), ShuffleUnit(8, 1), ShuffleUnit(8, 1)],
    "squeezenet": lambda: [Fire(8), Fire(8)],
    "convnext": lambda: [NextBlock(8), nn.Conv2d(8, 8, 2, 2), NextBlock(8)],
    "same padding": lambda: [SamePadding(8, 1), SamePadding(8, 2), SamePadding(8, 2), SamePadding(8, 1, 2)],
    "zero pad": lambda: [
        nn.ZeroPad2d((1, 1, 2, 0)),
        nn.Conv2d(8, 8, 3),
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.MaxPool2d(3, 2),
    ],
}


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *STYLES[name]()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("active", ["all", "some", "ragged"])
@pytest.mark.parametrize("name", STYLES)
def test_equals_every_layer_times_the_mask(name, active, train):
    dense = net(name).train(train)
    sparse = maefast.sparsify(copy.deepcopy(dense))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 48, 32, generator=generator, dtype=torch.float64)
    plan = CellMask.all_visible(3, (3, 2))
    if active != "all":
        plan = masking.cells(3, (3, 2), keep=3 if active == "some" else [4, 1, 6], generator=generator)
    assert_equals_masked(dense, sparse, images, plan, gradients=1e-8)
