"""FCMAE with the parameters of its public pre-training code, name by name and shape by shape, without MinkowskiEngine.

    model = maefast.accelerate(public_fcmae("tiny", norm_pix_loss=True))
    model.load_state_dict(torch.load("convnextv2_tiny_1k_224_fcmae.pt")["model"])

Its state dict, and that of its optimizer, are those of that code, so a run that began there goes on here and the other
way round. The sparse layers are written as dense layers times the mask, the definition of what they compute;
`maefast.accelerate` computes the visible cells only. For a new run take `maefast.models.fcmae`, whose encoder has the
names of the dense ConvNeXt V2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.models.convnames import dense_kernel
from maefast.models.convnext import EPS, SIZES
from maefast.nn.init import TOKEN_STD


class SparseConv(nn.Module):
    """`kernel` [k * k, Cin, Cout] ([k * k, C] if depthwise), `bias` [1, Cout]; of a map whose masked sites are zero."""

    def __init__(self, cin: int, cout: int, side: int, depthwise: bool = False) -> None:
        super().__init__()
        shape = (side * side, cout) if depthwise else (side * side, cin, cout)
        self.kernel, self.bias = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.zeros(1, cout))
        nn.init.trunc_normal_(self.kernel, std=TOKEN_STD, a=-2 * TOKEN_STD, b=2 * TOKEN_STD)

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        """[B, C, H, W], and [B, 1, H', W'] of the size of what is returned."""
        weight = dense_kernel(self.kernel)
        if self.kernel.ndim == 2:
            y = F.conv2d(x, weight, self.bias.flatten(), 1, weight.shape[-1] // 2, 1, len(weight))
        else:
            y = F.conv2d(x, weight, self.bias.flatten(), weight.shape[-1])
        return y * active


class SparseNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SparseLinear(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.linear = _init(nn.Linear(cin, cout))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class SparseGRN(nn.Module):
    """Over all active sites of the batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, width)) for _ in range(2))

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        """x [B, H, W, C], active [B, H, W, 1]."""
        size = torch.linalg.vector_norm(x * active, dim=(0, 1, 2))
        return self.gamma * (x * (size / (size.mean() + EPS))) + self.beta + x


class SparseBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv, self.norm = SparseConv(width, width, 7, depthwise=True), SparseNorm(width)
        self.pwconv1, self.act, self.pwconv2 = SparseLinear(width, 4 * width), nn.GELU(), SparseLinear(4 * width, width)
        self.grn, self.drop_path = SparseGRN(4 * width), nn.Identity()

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        sites = active.permute(0, 2, 3, 1)
        y = self.norm(self.dwconv(x, active)).permute(0, 2, 3, 1)
        y = self.pwconv2(self.grn(self.act(self.pwconv1(y)), sites)) * sites
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class SparseEncoder(nn.Module):
    def __init__(self, depths: tuple[int, ...], widths: tuple[int, ...], in_chans: int) -> None:
        super().__init__()
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, (depth, width) in enumerate(zip(depths, widths)):
            if i:
                layer = (SparseNorm(widths[i - 1]), SparseConv(widths[i - 1], width, 2))
            else:
                layer = (nn.Conv2d(in_chans, width, 4, 4), MapNorm(width))
            self.downsample_layers.append(nn.Sequential(*layer))
            self.stages.append(nn.Sequential(*(SparseBlock(width) for _ in range(depth))))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Images [B, C, H, W], mask [B, L] of zeros (visible) and ones -> [B, D, H / 32, W / 32], masked sites zero."""
        side = int(mask.shape[1] ** 0.5)
        visible = 1 - mask.view(-1, 1, side, side).type_as(x)
        for i, (layer, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            scale = 2 ** (len(self.stages) - 1 - i)
            active = visible.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
            x = layer[1](layer[0](x), active) if i else layer(x) * active
            for block in stage:
                x = block(x, active)
        return x


class MapNorm(nn.LayerNorm):
    """Over the channels of [B, C, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GRN(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return self.gamma * (x * (size / (size.mean(-1, keepdim=True) + EPS))) + self.beta + x


class DenseBlock(nn.Module):
    """Of the decoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = _init(nn.Conv2d(width, width, 7, padding=3, groups=width))
        self.norm, self.act, self.grn = nn.LayerNorm(width, eps=EPS), nn.GELU(), GRN(4 * width)
        self.pwconv1, self.pwconv2 = _init(nn.Linear(width, 4 * width)), _init(nn.Linear(4 * width, width))
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))
        return x + self.drop_path(self.pwconv2(self.grn(y)).permute(0, 3, 1, 2))


class PublicFCMAE(nn.Module):
    """See the module's docstring.

    Args:
        img_size: side of the images, a multiple of `patch_size`, which is 32 at four stages. in_chans: 3.
        depths, widths: of the encoder's stages. decoder_depth, decoder_embed_dim: of the decoder.
        norm_pix_loss: targets are normalised patch by patch, (t - mean) / sqrt(unbiased_var + 1e-6).

    ``model(imgs, mask_ratio=0.6)`` draws ``torch.randn(B, L)``, keeps the int(L * (1 - ratio)) lowest, and returns
    (loss, pred [B, patch_size^2 * 3, H / 32, W / 32] in (row, column, colour) order, mask [B, L] with 1 where removed).
    """

    def __init__(
        self,
        img_size: int = 224,
        in_chans: int = 3,
        depths: tuple[int, ...] = SIZES["tiny"][0],
        widths: tuple[int, ...] = SIZES["tiny"][1],
        decoder_depth: int = 1,
        decoder_embed_dim: int = 512,
        patch_size: int = 32,
        mask_ratio: float = 0.6,
        norm_pix_loss: bool = False,
    ) -> None:
        super().__init__()
        if patch_size != 2 ** (len(widths) + 1) or img_size % patch_size:
            raise ValueError(f"{len(widths)} stages make cells of {2 ** (len(widths) + 1)}; got patch_size {patch_size}"
                             f" and img_size {img_size}")  # fmt: skip
        self.img_size, self.patch_size, self.mask_ratio = img_size, patch_size, mask_ratio
        self.norm_pix_loss = norm_pix_loss
        self.encoder = SparseEncoder(tuple(depths), tuple(widths), in_chans)
        self.proj = _init(nn.Conv2d(widths[-1], decoder_embed_dim, 1))
        self.mask_token = nn.Parameter(torch.empty(1, decoder_embed_dim, 1, 1).normal_(std=TOKEN_STD))
        self.decoder = nn.Sequential(*(DenseBlock(decoder_embed_dim) for _ in range(decoder_depth)))
        self.pred = _init(nn.Conv2d(decoder_embed_dim, patch_size**2 * in_chans, 1))

    def patchify(self, imgs: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, L, patch_size^2 * C]."""
        batch, channels, height, width = imgs.shape
        side = self.patch_size
        blocks = imgs.reshape(batch, channels, height // side, side, width // side, side).permute(0, 2, 4, 3, 5, 1)
        return blocks.reshape(batch, -1, side * side * channels)

    def gen_random_mask(self, x: Tensor, mask_ratio: float) -> Tensor:
        """float [B, L], 1 where removed."""
        number = (x.shape[2] // self.patch_size) ** 2
        order = torch.randn(len(x), number, device=x.device).argsort(1)
        mask = torch.ones(len(x), number, device=x.device)
        return mask.scatter(1, order[:, : int(number * (1 - mask_ratio))], 0)

    def forward_encoder(self, imgs: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
        mask = self.gen_random_mask(imgs, mask_ratio)
        return self.encoder(imgs, mask), mask

    def forward_decoder(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.proj(x)
        removed = mask.view(-1, 1, *x.shape[2:]).type_as(x)
        return self.pred(self.decoder(x * (1 - removed) + self.mask_token * removed))

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        pred = pred.flatten(2).transpose(1, 2) if pred.ndim == 4 else pred
        target = self.patchify(imgs)
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + EPS).sqrt()
        loss = (pred - target).square().mean(-1)
        return (loss * mask).sum() / mask.sum()

    def forward(self, imgs: Tensor, labels: object = None, mask_ratio: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
        x, mask = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(x, mask)
        return self.forward_loss(imgs, pred, mask), pred, mask


def public_fcmae(size: str = "tiny", **arguments) -> PublicFCMAE:
    """The model of a name of `maefast.models.convnext.SIZES`; `arguments` as for `PublicFCMAE`."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; choose from {', '.join(SIZES)}")
    depths, widths = SIZES[size]
    return PublicFCMAE(depths=depths, widths=widths, **arguments)


def _init(layer: nn.Module) -> nn.Module:
    nn.init.trunc_normal_(layer.weight, std=TOKEN_STD, a=-2 * TOKEN_STD, b=2 * TOKEN_STD)
    nn.init.zeros_(layer.bias)
    return layer
