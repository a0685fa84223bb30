"""The structure of the public SparK: dense layers times a mask that a variable of this module holds."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from maefast.models.resnet import ResNet
from maefast.nn.drop_path import DropPath

_cur_active: Tensor | None = None  # bool [B, 1, f, f]
encoder = sys.modules[__name__]  # the public code has it in a module of this name, and sets it from another one


def active(height: int, width: int) -> Tensor:
    """[B, 1, H, W]."""
    rows, columns = height // _cur_active.shape[2], width // _cur_active.shape[3]
    return _cur_active.repeat_interleave(rows, 2).repeat_interleave(columns, 3)


def masked(self, x: Tensor) -> Tensor:
    y = super(type(self), self).forward(x)  # so the public code says it: a subclass would call itself
    return y * active(*y.shape[2:])


def over_active(self, x: Tensor) -> Tensor:
    where = active(*x.shape[2:]).squeeze(1).nonzero(as_tuple=True)
    rows = x.permute(0, 2, 3, 1)
    done = torch.zeros_like(rows)
    done[where] = super(type(self), self).forward(rows[where])
    return done.permute(0, 3, 1, 2)


class SparseConv2d(nn.Conv2d):
    forward = masked


class SparseMaxPool(nn.MaxPool2d):
    forward = masked


class SparseAvgPool(nn.AvgPool2d):
    forward = masked


class SparseBatchNorm2d(nn.BatchNorm1d):
    forward = over_active


class SparseSyncBatchNorm2d(nn.SyncBatchNorm):
    forward = over_active


class SparseLayerNorm(nn.LayerNorm):
    def __init__(self, width: int, data_format: str = "channels_last", sparse: bool = True) -> None:
        super().__init__(width, eps=1e-6)
        self.data_format, self.sparse = data_format, sparse

    def forward(self, x: Tensor) -> Tensor:
        rows = x if self.data_format == "channels_last" else x.permute(0, 2, 3, 1)
        if not self.sparse:
            done = super().forward(rows)
            return done if self.data_format == "channels_last" else done.permute(0, 3, 1, 2)
        where = active(*rows.shape[1:3]).squeeze(1).nonzero(as_tuple=True)
        done = torch.zeros_like(rows)
        done[where] = super().forward(rows[where])
        return done if self.data_format == "channels_last" else done.permute(0, 3, 1, 2)


class SparseBlock(nn.Module):
    """ConvNeXt."""

    def __init__(self, width: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.dwconv = SparseConv2d(width, width, 7, padding=3, groups=width)
        self.norm = SparseLayerNorm(width)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.1))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.sparse = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = (self.gamma * self.pwconv2(self.act(self.pwconv1(y)))).permute(0, 3, 1, 2)
        return x + self.drop_path(y * active(*y.shape[2:]) if self.sparse else y)


class ConvNeXt(nn.Module):
    def __init__(self, widths: tuple[int, ...], drop_path: float = 0.0) -> None:
        super().__init__()
        self.widths = list(widths)
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            if i:
                norm = SparseLayerNorm(widths[i - 1], "channels_first")
                layer = nn.Sequential(norm, SparseConv2d(widths[i - 1], width, 2, 2))
            else:
                layer = nn.Sequential(SparseConv2d(3, width, 4, 4), SparseLayerNorm(width, "channels_first"))
            self.downsample_layers.append(layer)
            self.stages.append(nn.Sequential(SparseBlock(width, drop_path)))

    def get_feature_map_channels(self) -> list[int]:
        return list(self.widths)

    def forward(self, x: Tensor, hierarchical: bool = False) -> list[Tensor]:
        maps = []
        for layer, stage in zip(self.downsample_layers, self.stages):
            x = stage(layer(x))
            maps.append(x)
        return maps


def converted(module: nn.Module, sync: bool = False) -> nn.Module:
    """A plain convnet with sparse layers in place of its own, and their weights."""
    for name, child in module.named_children():
        new = None
        if type(child) is nn.Conv2d:
            args = (child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding)
            new = SparseConv2d(*args, groups=child.groups, bias=child.bias is not None)
        elif isinstance(child, nn.BatchNorm2d):
            new = (SparseSyncBatchNorm2d if sync else SparseBatchNorm2d)(child.num_features)
        elif isinstance(child, nn.MaxPool2d):
            new = SparseMaxPool(child.kernel_size, child.stride, child.padding)
        elif isinstance(child, nn.AvgPool2d):
            new = SparseAvgPool(child.kernel_size, child.stride, child.padding)
        if new is None:
            converted(child, sync)
        else:
            new.load_state_dict(child.state_dict())
            setattr(module, name, new)
    return module


class SparseEncoder(nn.Module):
    def __init__(self, cnn: nn.Module) -> None:
        super().__init__()
        self.sp_cnn = cnn

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.sp_cnn(x, hierarchical=True)


class UNetBlock(nn.Module):
    def __init__(self, cin: int, cout: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.up_sample = nn.ConvTranspose2d(cin, cin, 4, 2, 1)
        first, second = (nn.Conv2d(cin, c, 3, padding=1, bias=False) for c in (cin, cout))
        self.conv = nn.Sequential(first, norm(cin), nn.ReLU6(inplace=True), second, norm(cout))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.up_sample(x))


class LightDecoder(nn.Module):
    def __init__(self, levels: int, width: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.dec = nn.ModuleList(UNetBlock(width // 2**i, width // 2 ** (i + 1), norm) for i in range(levels))
        self.proj = nn.Conv2d(width // 2**levels, 3, 1)

    def forward(self, to_dec: list[Tensor | None]) -> Tensor:
        x = 0
        for i, block in enumerate(self.dec):
            if i < len(to_dec) and to_dec[i] is not None:
                x = x + to_dec[i]
            x = block(x)
        return self.proj(x)


class SparK(nn.Module):
    def __init__(
        self, cnn: nn.Module, size: int = 96, width: int = 32, densify: str = "bn", sync: bool = False
    ) -> None:
        super().__init__()
        self.downsample_raito, self.fmap_h, self.fmap_w = 32, size // 32, size // 32
        self.len_keep = round(self.fmap_h * self.fmap_w * 0.4)
        self.sparse_encoder = SparseEncoder(cnn)
        self.dense_decoder = LightDecoder(5, width, nn.SyncBatchNorm if sync else nn.BatchNorm2d)
        self.densify_norms, self.densify_projs = nn.ModuleList(), nn.ModuleList()
        self.mask_tokens = nn.ParameterList()
        for i, channels in enumerate(reversed(cnn.get_feature_map_channels())):
            self.mask_tokens.append(nn.Parameter(torch.zeros(1, channels, 1, 1)))
            if densify == "ln":
                norm = SparseLayerNorm(channels, "channels_first")
            else:
                norm = (SparseSyncBatchNorm2d if sync else SparseBatchNorm2d)(channels)
            self.densify_norms.append(norm)
            kernel = 3 if i else 1
            self.densify_projs.append(nn.Conv2d(channels, width // 2**i, kernel, padding=kernel // 2))
        self.register_buffer("norm_black", torch.zeros(1, 3, size, size))

    def mask(self, B: int, device, generator=None) -> Tensor:
        order = torch.rand(B, self.fmap_h * self.fmap_w, generator=generator).argsort(1)
        chosen = order[:, : self.len_keep].to(device)
        flat = torch.zeros(order.shape, dtype=torch.bool, device=device).scatter_(1, chosen, True)
        return flat.view(B, 1, self.fmap_h, self.fmap_w)

    def patchify(self, bchw: Tensor) -> Tensor:
        p, (batch, channels) = self.downsample_raito, bchw.shape[:2]
        blocks = bchw.reshape(batch, channels, self.fmap_h, p, self.fmap_w, p).permute(0, 2, 4, 3, 5, 1)
        return blocks.reshape(batch, -1, channels * p * p)

    def unpatchify(self, bln: Tensor) -> Tensor:
        p = self.downsample_raito
        blocks = bln.reshape(len(bln), self.fmap_h, self.fmap_w, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return blocks.reshape(len(bln), -1, self.fmap_h * p, self.fmap_w * p)

    def forward(self, inp_bchw: Tensor, active_b1ff: Tensor | None = None, vis: bool = False):
        if active_b1ff is None:
            active_b1ff = self.mask(len(inp_bchw), inp_bchw.device)
        encoder._cur_active = active_b1ff
        seen = active(*inp_bchw.shape[2:])
        maps = []
        for i, level in enumerate(reversed(self.sparse_encoder(inp_bchw * seen))):
            level = self.densify_norms[i](level)
            level = torch.where(active(*level.shape[2:]), level, self.mask_tokens[i].to(level.dtype))
            maps.append(self.densify_projs[i](level))
        inp, rec = self.patchify(inp_bchw), self.patchify(self.dense_decoder(maps))
        mean, std = inp.mean(-1, keepdim=True), (inp.var(-1, keepdim=True) + 1e-6) ** 0.5
        removed = (~active_b1ff).int().flatten(1)
        loss = ((rec - (inp - mean) / std) ** 2).mean(2).mul(removed).sum() / (removed.sum() + 1e-8)
        if not vis:
            return loss
        return inp_bchw, inp_bchw * seen, torch.where(seen, inp_bchw, self.unpatchify(rec * std + mean))


def resnet(drop_path: float = 0.0, sync: bool = False, **changes) -> SparK:
    cnn = ResNet((1, 1, 1, 1), width=4, drop_path=drop_path)
    return changes.pop("kind", SparK)(converted(cnn, sync), sync=sync, **changes)


def convnext(drop_path: float = 0.0, **changes) -> SparK:
    return SparK(ConvNeXt((8, 12, 16, 24), drop_path), densify="ln", **changes)
