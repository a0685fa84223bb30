"""SparK: "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling" (Tian et al., 2023).

Parameter names, mask count, target and loss are those of the public code, so that its checkpoints load with
``strict=True`` and the same noise gives the same loss. The encoder computes active cells only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.models import convnext, resnet
from maefast.models.base import MaskedAutoencoder
from maefast.nn import Cells, sparsify
from maefast.nn.batch_norm import batch_norm_map
from maefast.nn.decoder import PREDICTIONS
from maefast.nn.init import TOKEN_STD
from maefast.nn.patch_embed import pair
from maefast.nn.sync_batch_norm import SyncBatchNorm2d, synchronise_
from maefast.ops import CellMask, TokenMask
from maefast.ops._checks import one_of

ENCODERS = ("resnet50", "resnet101", "convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
# Stochastic depth of the public recipes.
DROP_PATH = {"resnet50": 0.05, "resnet101": 0.08, "convnext_small": 0.2, "convnext_base": 0.3, "convnext_large": 0.4}


class SparseEncoder(nn.Module):
    """Any convnet that gives the maps of its stages, on cells. Its weights stand under ``sp_cnn``."""

    def __init__(self, cnn: nn.Module) -> None:
        super().__init__()
        self.sp_cnn = sparsify(cnn)

    def forward(self, x: Cells) -> list[Cells]:
        return self.sp_cnn(x, hierarchical=True)


class UpBlock(nn.Module):
    """Twice the resolution: a transposed convolution, then two 3x3 convolutions with batch norms, ReLU6 between."""

    def __init__(self, cin: int, cout: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.up_sample = nn.ConvTranspose2d(cin, cin, 4, 2, 1)
        self.conv = nn.Sequential(
            nn.Conv2d(cin, cin, 3, 1, 1, bias=False),
            norm(cin),
            nn.ReLU6(inplace=True),
            nn.Conv2d(cin, cout, 3, 1, 1, bias=False),
            norm(cout),
        )

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C', 2H, 2W], plus `skip`, each norm in one pass with what follows it."""
        first, norm1, _, second, norm2 = self.conv
        x = batch_norm_map(norm1, first(self.up_sample(x)), "relu6")
        return batch_norm_map(norm2, second(x), residual=skip)


class LightDecoder(nn.Module):
    """Blocks of halving width from `width` up to the image, with the densified maps added on the way."""

    def __init__(self, ratio: int, width: int, out_chans: int, norm: type[nn.Module]) -> None:
        super().__init__()
        levels = ratio.bit_length() - 1
        if 2**levels != ratio or width % 2**levels:
            raise ValueError(
                f"the decoder needs a ratio of a power of two that divides its width; got {ratio}, {width}"
            )
        self.widths = [width // 2**i for i in range(levels + 1)]
        self.dec = nn.ModuleList(UpBlock(a, b, norm) for a, b in zip(self.widths, self.widths[1:]))
        self.proj = nn.Conv2d(self.widths[-1], out_chans, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps from coarse to fine, each twice the size of the last -> [B, out_chans, H, W]."""
        x = maps[0]
        for i, block in enumerate(self.dec, 1):
            x = block(x, maps[i] if i < len(maps) else None)
        return self.proj(x)


class SparK(MaskedAutoencoder):
    """A masked autoencoder around a convnet.

    Args:
        encoder: a name of `ENCODERS`, or a module with the interface of SparK's custom nets:
            ``get_downsample_ratio()``, ``get_feature_map_channels()``, ``forward(x, hierarchical=True) -> list``.
        img_size: int or (height, width), multiples of the encoder's downsampling, which is the cell's side.
        in_chans: C. decoder_width: of the coarsest level. drop_path: None takes the published rate of the encoder.
        sync_bn: statistics over all processes.
        name: recorded in `config`.

    The target is normalised cell by cell, as in the paper.
    """

    keep_rule = "round"
    usual_mask_ratio = 0.6
    no_decay = ("mask_tokens.",)

    def __init__(
        self,
        encoder: str | nn.Module = "resnet50",
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        decoder_width: int = 768,
        drop_path: float | None = None,
        sync_bn: bool = False,
        name: str = "spark",
    ) -> None:
        super().__init__()
        self.config = None
        if isinstance(encoder, str):
            self.config = {
                "name": name,
                "encoder": encoder,
                "img_size": list(pair("img_size", img_size)),
                "in_chans": in_chans,
                "decoder_width": decoder_width,
                "drop_path": drop_path,
                "sync_bn": sync_bn,
            }
            encoder = build_encoder(encoder, in_chans, drop_path)
        self.img_size, self.in_chans, self.norm_pix_loss = pair("img_size", img_size), in_chans, True
        ratio = encoder.get_downsample_ratio()
        if any(side % ratio or side < ratio for side in self.img_size):
            raise ValueError(f"img_size {self.img_size} is no multiple of the encoder's downsampling, {ratio}")
        self.patch_size = (ratio, ratio)
        self.grid_size = tuple(side // ratio for side in self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

        plain = isinstance(encoder, convnext.ConvNeXt)
        norm = SyncBatchNorm2d if sync_bn else nn.BatchNorm2d
        if sync_bn:
            synchronise_(encoder)
        self.sparse_encoder = SparseEncoder(encoder)
        self.dense_decoder = LightDecoder(ratio, decoder_width, in_chans, norm)
        self.densify_norms, self.densify_projs = nn.ModuleList(), nn.ModuleList()
        self.mask_tokens = nn.ParameterList()
        for i, width in enumerate(reversed(encoder.get_feature_map_channels())):
            token = nn.init.trunc_normal_(torch.empty(1, width, 1, 1), std=TOKEN_STD, a=-TOKEN_STD, b=TOKEN_STD)
            self.mask_tokens.append(nn.Parameter(token))
            self.densify_norms.append(convnext.MapNorm(width, eps=convnext.EPS) if plain else norm(width))
            cout, side = self.dense_decoder.widths[i], 3 if i else 1
            same = i == 0 and width == cout
            self.densify_projs.append(nn.Identity() if same else nn.Conv2d(width, cout, side, padding=side // 2))
        sparsify(self.densify_norms)
        # The public checkpoints hold these; nothing reads them.
        self.register_buffer("imn_m", torch.zeros(1, in_chans, 1, 1))
        self.register_buffer("imn_s", torch.ones(1, in_chans, 1, 1))
        self.register_buffer("norm_black", torch.zeros(1, in_chans, *self.img_size))
        convnext.init_convnext_(self.dense_decoder)

    def forward(
        self,
        images: Tensor,
        mask_ratio: float | Sequence[float] = 0.6,
        noise: Tensor | None = None,
        mask: TokenMask | Tensor | None = None,
        pred: str = "masked",
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, reconstruct, score; arguments as in `MaskedAutoencoderViT.forward`. round(N * (1 - ratio)) cells stay.

        Returns:
            loss: scalar, mean over the removed cells. pred: [B, N, K] ("full") or those of the removed cells; the
            decoder is dense, so both cost the same. mask: float [B, N], 1 where removed.
        """
        one_of("pred", pred, PREDICTIONS)
        plan = self.plan(images, mask_ratio, noise, mask, generator)
        if plan.total_masked == 0:
            raise ValueError("the mask removes no cell, so there is no loss; use encode() for whole images")
        out = self.predict(images, plan)
        loss = ops.patch_loss(out, images, plan, self.patch_size, norm="mae", rows="all")
        if pred == "masked":
            out = ops.gather_tokens(out, plan, "masked")
        return loss, out, plan.mask.float()

    def predict(self, images: Tensor, plan: TokenMask) -> Tensor:
        cells = CellMask(plan, self.grid_size)
        maps = self.sparse_encoder(Cells.pack(images, cells))
        dense = []
        for i, features in enumerate(reversed(maps)):
            features = self.densify_norms[i](features).dense(self.mask_tokens[i].flatten())
            dense.append(self.densify_projs[i](features))
        return self._patches(self.dense_decoder(dense))

    def encode(self, images: Tensor) -> list[Tensor]:
        """Maps of the encoder's stages for whole images, nothing masked: list of [B, C, H, W], fine to coarse."""
        self._check_images(images)
        return self.sparse_encoder.sp_cnn(images, hierarchical=True)

    def _patches(self, picture: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, K] in (ph, pw, C) order."""
        (rows, columns), (ph, pw) = self.grid_size, self.patch_size
        blocks = picture.permute(0, 2, 3, 1).reshape(-1, rows, ph, columns, pw, self.in_chans)
        return blocks.transpose(2, 3).reshape(-1, self.num_patches, ph * pw * self.in_chans)


def build_encoder(name: str, in_chans: int = 3, drop_path: float | None = None) -> nn.Module:
    """The convnet of `ENCODERS` without a classifier, dense until `sparsify` makes it ready for cells."""
    one_of("encoder", name, ENCODERS)
    rate = DROP_PATH.get(name, 0.0) if drop_path is None else drop_path
    if name in resnet.DEPTHS:
        return resnet.ResNet(resnet.DEPTHS[name], in_chans=in_chans, drop_path=rate)
    depths, widths = convnext.SIZES[name.removeprefix("convnext_")]
    return convnext.ConvNeXt(depths, widths, in_chans, rate, grn_scope=None)
