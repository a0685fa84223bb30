"""DMJD: two views of which one masks what the other sees, HOG of masked and of visible tokens (Ma et al., 2023,
arXiv:2301.00230).

One permutation of the blocks of 2 x 2 tokens: view 1 sees the first `keep`, view 2 as many, beginning `extra` further.
Both go through the encoder of ConvMAE as one batch. With h_n the normalised histograms of gradients of token n, y_n
the decoder's prediction and z_n that of an MLP on the latent, each mean over both views,

    loss = mean over masked n of |y_n - h_n|^2 + theta * mean over visible n of smooth_l1(z_n - h_n; beta = 2)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import masking, ops
from maefast.data.images.batch import ImageBatch
from maefast.data.images.hog import hog
from maefast.names import MAE_DECODER, Names
from maefast.nn import Decoder, LayerNorm, Linear, position_table
from maefast.nn.conv_vit import PATCH, ConvViT
from maefast.nn.init import init_weights_
from maefast.nn.patch_embed import pair, patch_grid
from maefast.ops._checks import one_of
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._images import ImageRecipe, feature_sheet
from maefast.recipes._sizes import check_visible

CELL, BINS = 8, 9
SIDE = PATCH // CELL  # cells of a token each way
LOSSES = ("mse", "smooth_l1")


class DMJD(ImageRecipe):
    """Args:
        img_size: int or (height, width), multiples of 16 * block. Tokens are of 16 x 16 pixels.
        mask_ratio: int(blocks * (1 - ratio)) blocks of each view stay visible.
        pred_ratio: share of the blocks that is masked in one view at least, from `mask_ratio` to 1.
        block: side of a block of the mask, in tokens; 1 is random masking.
        theta: weight of the visible tokens. masked_loss, visible_loss: "mse", or "smooth_l1" with beta = 2.
        paired: each visible token learns its own target. False: as the authors' code, which holds predictions in plan
            order against targets in raster order.
        conv_dims, conv_depths, embed_dim, depth, num_heads: of the encoder, see `ConvViT`; decoder_*: of the decoder,
            whose width is that of the visible branch too.

    Shapes: images [B, 3, H, W]; target [B, N, 108]; plan of 2 B, view 1 of all samples first; latents [2 B, keep, D];
    pred: of masked and of visible tokens, [2 B, masked, 108] and [2 B, keep, 108].
    """

    spec = Spec(
        name="dmjd",
        title="DMJD",
        paper="Ma et al., 2023, arXiv:2301.00230",
        modality="images",
        sizes={
            "base": {},
            "base_light": {"decoder_depth": 2},
            "large": {"conv_dims": (384, 768), "embed_dim": 1024, "depth": 23, "num_heads": 16},
        },
        # Their rate is 6e-4 * batch * pred_ratio / mask_ratio / 256.
        training={"blr": 1e-3, "epochs": 400, "warmup": 0.05, "crop_scale": (0.5, 1.0)},
        demo={
            "model_args": {"conv_dims": [32, 48], "conv_depths": [1, 1], "embed_dim": 96, "depth": 3, "num_heads": 3,
                           "decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 2},
            "img_size": 128, "steps": 500, "batch_size": 8, "lr": 3e-3, "warmup": 0.1,
        },
        baseline="the mean histogram",
    )  # fmt: skip
    names = Names(("", "encoder."), *MAE_DECODER, ("proj_embed.", "projector."), ("predictor.", "predictor."))
    lead = 0

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        mask_ratio: float = 0.6,
        pred_ratio: float = 1.0,
        block: int = 2,
        theta: float = 1.0,
        masked_loss: str = "mse",
        visible_loss: str = "smooth_l1",
        paired: bool = True,
        conv_dims: Sequence[int] = (256, 384),
        conv_depths: Sequence[int] = (2, 2),
        embed_dim: int = 768,
        depth: int = 11,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
    ) -> None:
        size = pair("img_size", img_size)
        super().__init__(3, size)
        self.grid, self.blocks = patch_grid(size, (PATCH, PATCH)), patch_grid(size, pair("block", block * PATCH))
        one_of("masked_loss", masked_loss, LOSSES)
        one_of("visible_loss", visible_loss, LOSSES)
        if not 0 < mask_ratio <= pred_ratio <= 1:
            raise ValueError(f"0 < mask_ratio <= pred_ratio <= 1 must hold, got {mask_ratio} and {pred_ratio}")
        check_visible("mask_ratio", mask_ratio, self.blocks[0] * self.blocks[1])
        self.block, self.mask_ratio, self.theta, self.paired = block, mask_ratio, theta, paired
        self.extra = int(min(pred_ratio - mask_ratio, mask_ratio) * self.blocks[0] * self.blocks[1])
        self.losses = masked_loss, visible_loss
        width, values = decoder_embed_dim, SIDE * SIDE * BINS * 3
        self.encoder = ConvViT(self.grid, 3, conv_dims, conv_depths, embed_dim, depth, num_heads)
        self.decoder = Decoder(
            embed_dim,
            values,
            position_table("sincos", width, self.grid, prefix=0),
            width,
            decoder_depth,
            decoder_num_heads,
            mlp_ratio=8.0,
            prefix=0,
        )
        self.projector = nn.Sequential(
            *(Linear(embed_dim, width), LayerNorm(width, eps=1e-6), nn.GELU()),
            *(Linear(width, width), LayerNorm(width, eps=1e-6), nn.GELU()),
            *(Linear(width, width), nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)),
        )
        self.predictor = nn.Sequential(Linear(width, values))
        for branch in (self.projector, self.predictor):
            for layer in branch:
                if isinstance(layer, Linear):
                    init_weights_(layer)

    def prepare(self, batch: ImageBatch, draw: Draw, progress: Progress) -> View:
        images, count = self.images(batch), self.blocks[0] * self.blocks[1]
        noise = draw.uniform("mask", count, images.device)
        plans = masking.disjoint(*noise.shape, self.mask_ratio, noise=noise, step=self.extra)
        ranks = torch.cat([plan.ids_restore for plan in plans])
        plan = masking.from_ids_restore(ranks, plans[0].keep)
        return View(images, masking.enlarge(plan, self.blocks, self.block), self.histograms(batch.images))

    def histograms(self, images: Tensor) -> Tensor:
        """[B, N, 108] of uint8 [B, 3, H, W]: nine normalised numbers for each cell and channel, in (row, column, bin,
        channel) order within a token, as published."""
        found = hog(images.to(self.mean.dtype), BINS, CELL)
        found = F.layer_norm(found, (BINS,))
        found = found.unflatten(3, (-1, SIDE)).unflatten(2, (-1, SIDE))  # [B, C, rows, 2, columns, 2, 9]
        return found.permute(0, 2, 4, 3, 5, 6, 1).flatten(3).flatten(1, 2)

    def compute(self, view: View) -> Output:
        latents = self.encoder(torch.cat([view.parts] * 2), view.plan, features=False)
        pred = self.decoder(latents, view.plan), self.predictor(self.projector(latents))
        return Output(self._terms(pred, view), pred, view)

    def _terms(self, pred: Sequence[Tensor], view: View) -> dict[str, Tensor]:
        plan, rows = view.plan, view.target.shape[0] * view.target.shape[1]
        visible = plan.visible if self.paired else plan.visible.sort()[0]
        masked, seen = (
            ops.feature_loss(p, view.target, index=torch.remainder(index, rows), loss=loss, beta=2.0)
            for p, index, loss in zip(pred, (plan.masked, visible), self.losses)
        )
        return {"masked": masked, "visible": self.theta * seen}

    def baseline(self, view: View) -> Output:
        mean = view.target.flatten(0, 1).mean(0)
        pred = [mean.expand(view.plan.batch, count, -1) for count in (view.plan.hide, view.plan.keep)]
        return Output(self._terms(pred, view), pred, view)

    def encode(self, batch: ImageBatch) -> Tensor:
        """[B, N, D], no class token."""
        return self.encoder(self.images(batch))

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images import pictures

        plan, (masked, visible) = view.plan, self.compute(view).pred
        mine = masked.new_empty(plan.batch * plan.num_tokens, masked.shape[-1])
        mine[plan.masked.long()], mine[plan.visible.long()] = masked.flatten(0, 1), visible.flatten(0, 1).to(mine)
        mine = mine.view(plan.batch, plan.num_tokens, -1)[: len(view.parts)]
        shown = ~plan.mask[: len(view.parts)]
        grid = tuple(side * SIDE for side in self.grid)
        cells = [self._cells(x) for x in (shown[..., None].expand_as(mine), view.target, mine.to(view.target))]
        columns = feature_sheet(view.parts * self.std + self.mean, cells[0][..., 0], cells[1:], grid)
        caption = f"view 1 of two, {self.mask_ratio:.0%} masked\nhistograms of gradients as colours"
        return pictures.Sheet(columns, names, caption, ("original", "visible", "target", "predicted"))

    def _cells(self, x: Tensor) -> Tensor:
        """Tokens [B, N, 108] as cells in raster order, [B, 4 N, 27]."""
        x = x.unflatten(2, (SIDE, SIDE, -1)).unflatten(1, self.grid)
        return x.transpose(2, 3).flatten(1, 4)
