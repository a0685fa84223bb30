"""FCMAE: "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders" (Woo et al., 2023).

Parameter names are those of the dense ConvNeXt V2 in ``encoder.``, so that a pre-trained encoder is a checkpoint for
fine-tuning; the public pre-training files (sparse kernels) are translated when loaded, see `maefast.models.convert`.
Weights start at standard deviation 0.02 everywhere, as the paper's encoder does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.models.base import MaskedAutoencoder
from maefast.models.convnext import SIZES, Block, ConvNeXt, init_convnext_
from maefast.nn import Cells, sparsify
from maefast.nn.decoder import PREDICTIONS
from maefast.nn.init import init_tokens_
from maefast.nn.patch_embed import pair
from maefast.ops import CellMask, TokenMask
from maefast.ops._checks import one_of


class FCMAE(MaskedAutoencoder):
    """A fully convolutional masked autoencoder.

    Args:
        img_size: int or (height, width), multiples of 32, the side of a cell.
        in_chans: C. depths, widths: of the encoder's stages. drop_path: rate in the encoder.
        decoder_embed_dim, decoder_depth: of the decoder's ConvNeXt V2 blocks, on the map of cells.
        norm_pix_loss: targets are normalised cell by cell, (t - mean) / sqrt(unbiased_var + 1e-6).
        grn_scope: "sample" or "batch": what the encoder's GRN sums over, see `maefast.ops.grn`. The public code does
            "batch", the code behind the paper's numbers "sample".
        name: recorded in `config`.
    """

    usual_mask_ratio = 0.6

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        depths: Sequence[int] = SIZES["tiny"][0],
        widths: Sequence[int] = SIZES["tiny"][1],
        drop_path: float = 0.0,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 1,
        norm_pix_loss: bool = True,
        grn_scope: str = "sample",
        name: str = "fcmae",
    ) -> None:
        super().__init__()
        one_of("grn_scope", grn_scope, ("sample", "batch"))
        self.img_size, self.in_chans, self.norm_pix_loss = pair("img_size", img_size), in_chans, bool(norm_pix_loss)
        self.config = {
            "name": name,
            "img_size": list(self.img_size),
            "in_chans": in_chans,
            "depths": list(depths),
            "widths": list(widths),
            "drop_path": drop_path,
            "decoder_embed_dim": decoder_embed_dim,
            "decoder_depth": decoder_depth,
            "norm_pix_loss": self.norm_pix_loss,
            "grn_scope": grn_scope,
        }
        encoder = ConvNeXt(tuple(depths), tuple(widths), in_chans, drop_path, grn_scope)
        ratio = encoder.get_downsample_ratio()
        if any(side % ratio or side < ratio for side in self.img_size):
            raise ValueError(f"img_size {self.img_size} is no multiple of {ratio}, the side of a cell")
        self.patch_size = (ratio, ratio)
        self.grid_size = tuple(side // ratio for side in self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.encoder = sparsify(encoder)
        self.proj = nn.Conv2d(widths[-1], decoder_embed_dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_embed_dim, 1, 1))
        self.decoder = nn.Sequential(*(Block(decoder_embed_dim) for _ in range(decoder_depth)))
        self.pred = nn.Conv2d(decoder_embed_dim, ratio * ratio * in_chans, 1)
        for part in (self.proj, self.decoder, self.pred):
            init_convnext_(part)
        init_tokens_(self.mask_token)

    def forward(
        self,
        images: Tensor,
        mask_ratio: float | Sequence[float] = 0.6,
        noise: Tensor | None = None,
        mask: TokenMask | Tensor | None = None,
        pred: str = "masked",
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, reconstruct, score; arguments and results as in `MaskedAutoencoderViT.forward`, cells for patches."""
        one_of("pred", pred, PREDICTIONS)
        plan = self.plan(images, mask_ratio, noise, mask, generator)
        if plan.total_masked == 0:
            raise ValueError("the mask removes no cell, so there is no loss; use encode() for whole images")
        out = self._decode(self._encode(images, plan), plan, pred)
        loss = ops.patch_loss(
            out,
            images,
            plan,
            self.patch_size,
            norm="mae" if self.norm_pix_loss else "none",
            rows="masked" if pred == "masked" else "all",
        )
        return loss, out, plan.mask.float()

    def predict(self, images: Tensor, plan: TokenMask) -> Tensor:
        return self._decode(self._encode(images, plan), plan, "full")

    def encode(self, images: Tensor) -> Tensor:
        """The last map for whole images, nothing masked: [B, C, H / 32, W / 32]."""
        self._check_images(images)
        return self.encoder(images, hierarchical=True)[-1]

    def _encode(self, images: Tensor, plan: TokenMask) -> Cells:
        """[T, 1, 1, C]: the last map has one site a cell."""
        return self.encoder(Cells.pack(images, CellMask(plan, self.grid_size)), hierarchical=True)[-1]

    def _decode(self, features: Cells, plan: TokenMask, which: str) -> Tensor:
        x = self.proj(features).dense(self.mask_token.flatten())
        tokens = self.decoder(x).permute(0, 2, 3, 1).flatten(1, 2)  # [B, N, D]
        if which == "masked":
            tokens = ops.gather_tokens(tokens, plan, "masked")
        return ops.linear(tokens, self.pred.weight.flatten(1), self.pred.bias)
