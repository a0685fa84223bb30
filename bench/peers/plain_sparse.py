"""SparK and FCMAE as dense networks multiplied by the mask: plain PyTorch, the definition and the peer of our own.

Every convolution and pooling runs over the whole map and is multiplied by the active sites; norms take their statistics
over active sites. Written from the papers' and the public code's semantics, for state dicts of `maefast.models`.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.models.resnet import ResNet


class Active:
    """The mask of the step, bool [B, 1, f, f] or [B, 1, f, f, f], True where active; one object shared by all layers of
    a model."""

    def __init__(self) -> None:
        self.cells: Tensor | None = None
        self._maps: dict[torch.Size, Tensor] = {}
        self._rows: dict[torch.Size, Tensor] = {}

    def set(self, cells: Tensor) -> None:
        self.cells, self._maps, self._rows = cells, {}, {}

    def map(self, like: Tensor) -> Tensor:
        """[B, 1, H, W] of the size of `like` [B, C, H, W], in its dtype; volumes with depth."""
        size = like.shape[2:]
        if size not in self._maps:
            mask = self.cells
            for dim in range(2, like.ndim):
                mask = mask.repeat_interleave(like.shape[dim] // mask.shape[dim], dim)
            self._maps[size] = mask
        return self._maps[size].to(like.dtype)

    def rows(self, like: Tensor) -> Tensor:
        """int64 [R]: the active ones of the B*H*W sites; found once for each level of a step."""
        size = like.shape[2:]
        if size not in self._rows:
            self._rows[size] = self.map(like).flatten().nonzero()[:, 0]
        return self._rows[size]


class Times:
    """A layer, then the mask."""

    def forward(self, *args, **kwargs) -> Tensor:
        y = super().forward(*args, **kwargs)
        return y * self.active.map(y)


class MaskedConv2d(Times, nn.Conv2d):
    pass


class Rows:
    """Statistics over active sites: torch's own norm of the gathered rows. Of four ways tried on a CPU the fastest
    (sums of the zero-filled map took seven times as long, indexing by (b, y, x) nearly twice)."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.active.rows(x)
        sites = x.movedim(1, -1)
        flat = sites.reshape(-1, x.shape[1])
        done = super().forward(flat.index_select(0, rows).reshape(-1, x.shape[1], *(1,) * (x.ndim - 2))).flatten(1)
        return torch.zeros_like(flat).index_copy(0, rows, done.to(flat.dtype)).view_as(sites).movedim(-1, 1)


class MaskedBatchNorm2d(Rows, nn.BatchNorm2d):
    pass


class OfSample:
    """An instance norm of each sample's active sites."""

    def forward(self, x: Tensor) -> Tensor:
        mask, sites = self.active.map(x), tuple(range(2, x.ndim))
        count = mask.sum(sites, keepdim=True)
        away = (x - (x * mask).sum(sites, keepdim=True) / count) * mask
        y = away * (away.square().sum(sites, keepdim=True) / count + self.eps).rsqrt()
        if self.affine:
            each = (-1, *(1,) * (x.ndim - 2))
            y = y * self.weight.view(each) + self.bias.view(each)
        return y * mask


class GlobalPool:
    """The mean over active sites."""

    def forward(self, x: Tensor) -> Tensor:
        mask, sites = self.active.map(x), tuple(range(2, x.ndim))
        return (x * mask).sum(sites, keepdim=True) / mask.sum(sites, keepdim=True)


LAYERS = {
    "Conv": Times,
    "ConvTranspose": Times,
    "MaxPool": Times,
    "AvgPool": Times,
    "BatchNorm": Rows,
    "InstanceNorm": OfSample,
    "AdaptiveAvgPool": GlobalPool,
}
MASKED = {nn.Conv2d: MaskedConv2d, nn.BatchNorm2d: MaskedBatchNorm2d}
for _name, _layer in LAYERS.items():
    for _kind in (getattr(nn, f"{_name}2d"), getattr(nn, f"{_name}3d")):
        MASKED.setdefault(_kind, type(f"Masked{_kind.__name__}", (_layer, _kind), {}))


class MapNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y * self.active.map(y)


class GRN(nn.Module):
    def __init__(self, width: int, scope: str) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, width)) for _ in range(2))
        self.scope = scope

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, H, W, C], mask [B, H, W, 1] or 1."""
        squares = (x * mask).square()
        if self.scope == "batch":
            size = squares.sum((0, 1, 2), keepdim=True).sqrt()
        else:
            total = squares.sum((1, 2), keepdim=True)
            size = (total + 1e-6 if self.scope == "sample" else total).sqrt()
        return self.gamma * (x * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.beta + x


class Block(nn.Module):
    """ConvNeXt block; grn None: V1 with a layer scale. active None: a dense map."""

    def __init__(self, width: int, grn: str | None, active: Active | None) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.grn = None if grn is None else GRN(4 * width, grn)
        self.gamma = nn.Parameter(torch.zeros(width)) if grn is None else None
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x)
        mask = 1 if self.active is None else self.active.map(y).permute(0, 2, 3, 1)
        y = F.gelu(self.pwconv1(self.norm(y.permute(0, 2, 3, 1))))
        y = self.pwconv2(y if self.grn is None else self.grn(y, mask))
        y = y if self.gamma is None else self.gamma * y
        return x + (y * mask).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, depths, widths, in_chans: int, grn: str | None, active: Active) -> None:
        super().__init__()
        stem = nn.Sequential(MaskedConv2d(in_chans, widths[0], 4, 4), MapNorm(widths[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for cin, cout in itertools.pairwise(widths):
            self.downsample_layers.append(nn.Sequential(MapNorm(cin, eps=1e-6), MaskedConv2d(cin, cout, 2, 2)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width, grn, active) for _ in range(depth)))
            for depth, width in zip(depths, widths, strict=True)
        )
        share(self, active)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
            maps.append(x)
        return maps


def share(model: nn.Module, active: Active) -> None:
    for module in model.modules():
        if isinstance(module, (*MASKED.values(), MapNorm)):
            module.active = active


def masked(model: nn.Module, active: Active) -> nn.Module:
    """A dense convnet with each spatial layer multiplied by the mask; in place."""
    for module in model.modules():
        if type(module) in MASKED:
            module.__class__ = MASKED[type(module)]
        if getattr(module, "inplace", False):
            module.inplace = False
    share(model, active)
    return model


def draw(images: Tensor, grid: tuple[int, int], keep: int, noise: Tensor) -> Tensor:
    """bool [B, 1, f, f]: the cells with the `keep` lowest values are active."""
    chosen = noise.argsort(1)[:, :keep]
    flat = torch.zeros_like(noise, dtype=torch.bool).scatter_(1, chosen, True)
    return flat.view(images.shape[0], 1, *grid)


def patchify(images: Tensor, side: int) -> Tensor:
    batch, channels, height, width = images.shape
    blocks = images.reshape(batch, channels, height // side, side, width // side, side)
    return blocks.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * channels)


def masked_loss(pred: Tensor, images: Tensor, side: int, active: Tensor, norm: bool) -> Tensor:
    target = patchify(images, side)
    if norm:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    removed = (~active).flatten(1).to(pred.dtype)
    return ((pred - target).square().mean(-1) * removed).sum() / removed.sum()


class PlainSparK(nn.Module):
    """For state dicts of `maefast.models.SparK`. side: of a cell."""

    def __init__(self, cnn: nn.Module, active: Active, ours: nn.Module) -> None:
        """`ours`: the maefast model, for sizes alone."""
        super().__init__()
        self.active, self.grid, self.side = active, ours.grid_size, ours.patch_size[0]
        self.sparse_encoder = nn.Module()
        self.sparse_encoder.sp_cnn = cnn
        widths = ours.dense_decoder.widths
        self.dense_decoder = nn.Module()
        self.dense_decoder.dec = nn.ModuleList(self.block(a, b) for a, b in itertools.pairwise(widths))
        self.dense_decoder.proj = nn.Conv2d(widths[-1], ours.in_chans, 1)
        self.mask_tokens = nn.ParameterList(torch.zeros_like(t) for t in ours.mask_tokens)
        self.densify_norms, self.densify_projs = nn.ModuleList(), nn.ModuleList()
        for norm, proj in zip(ours.densify_norms, ours.densify_projs, strict=True):
            if isinstance(norm, nn.LayerNorm):
                self.densify_norms.append(MapNorm(norm.normalized_shape, eps=1e-6))
            else:
                self.densify_norms.append(MaskedBatchNorm2d(norm.num_features))
            same = isinstance(proj, nn.Identity)
            kernel = None if same else proj.kernel_size[0]
            args = None if same else (proj.in_channels, proj.out_channels, kernel)
            self.densify_projs.append(nn.Identity() if same else nn.Conv2d(*args, padding=kernel // 2))
        share(self, active)
        for name in ("imn_m", "imn_s", "norm_black"):
            self.register_buffer(name, torch.empty_like(getattr(ours, name)))

    @staticmethod
    def block(cin: int, cout: int) -> nn.Module:
        block = nn.Module()
        block.up_sample = nn.ConvTranspose2d(cin, cin, 4, 2, 1)
        block.conv = nn.Sequential(
            nn.Conv2d(cin, cin, 3, 1, 1, bias=False),
            nn.BatchNorm2d(cin),
            nn.ReLU6(inplace=True),
            nn.Conv2d(cin, cout, 3, 1, 1, bias=False),
            nn.BatchNorm2d(cout),
        )
        return block

    def encode(self, images: Tensor, active: Tensor) -> list[Tensor]:
        self.active.set(active)
        cnn = self.sparse_encoder.sp_cnn
        masked = images * self.active.map(images)
        return cnn(masked, hierarchical=True) if isinstance(cnn, ResNet) else cnn(masked)

    def forward(self, images: Tensor, mask_ratio: float, noise: Tensor) -> tuple[Tensor, Tensor]:
        keep = round(noise.shape[1] * (1 - mask_ratio))
        active = draw(images, self.grid, keep, noise)
        x = 0
        maps = []
        for i, features in enumerate(reversed(self.encode(images, active))):
            features = self.densify_norms[i](features)
            features = torch.where(self.active.map(features).bool(), features, self.mask_tokens[i].to(features.dtype))
            maps.append(self.densify_projs[i](features))
        for i, block in enumerate(self.dense_decoder.dec):
            x = x + maps[i] if i < len(maps) else x
            x = block.conv(block.up_sample(x))
        pred = patchify(self.dense_decoder.proj(x), self.side)
        return masked_loss(pred, images, self.side, active, True), pred


class PlainFCMAE(nn.Module):
    """For state dicts of `maefast.models.FCMAE`."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.active, self.norm = Active(), config["norm_pix_loss"]
        widths, width, channels = config["widths"], config["decoder_embed_dim"], config["in_chans"]
        self.encoder = ConvNeXt(config["depths"], widths, channels, config["grn_scope"], self.active)
        self.side = 2 ** (len(widths) + 1)
        self.grid = tuple(n // self.side for n in config["img_size"])
        self.proj = nn.Conv2d(widths[-1], width, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.decoder = nn.Sequential(*(Block(width, "dense", None) for _ in range(config["decoder_depth"])))
        self.pred = nn.Conv2d(width, self.side**2 * channels, 1)

    def forward(self, images: Tensor, mask_ratio: float, noise: Tensor) -> tuple[Tensor, Tensor]:
        active = draw(images, self.grid, int(noise.shape[1] * (1 - mask_ratio)), noise)
        self.active.set(active)
        x = self.proj(self.encoder(images * self.active.map(images))[-1])
        x = torch.where(active, x, self.mask_token.to(x.dtype))
        pred = self.pred(self.decoder(x)).flatten(2).transpose(1, 2)
        return masked_loss(pred, images, self.side, active, self.norm), pred


def build(ours: nn.Module) -> nn.Module:
    """The plain model with the weights of `ours`: an FCMAE, or a SparK around one of its encoders; no drop path."""
    if not hasattr(ours, "sparse_encoder"):
        model: nn.Module = PlainFCMAE(ours.config)
    else:
        active, encoder = Active(), ours.sparse_encoder.sp_cnn
        if isinstance(encoder, ResNet):
            depths = tuple(len(getattr(encoder, f"layer{i + 1}")) for i in range(encoder.num_stages))
            cnn: nn.Module = masked(ResNet(depths, encoder.conv1.out_channels, ours.in_chans), active)
        else:
            depths = [len(stage) for stage in encoder.stages]
            cnn = ConvNeXt(depths, encoder.widths, ours.in_chans, None, active)
        model = PlainSparK(cnn, active, ours)
    model.load_state_dict(ours.state_dict(), strict=True)
    return model
