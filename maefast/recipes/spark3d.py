"""SparK of volumes: a residual 3-D U-Net learns from the visible cells of a volume (Wald et al., CVPR 2025,
arXiv:2410.23132; SparK: Tian et al., ICLR 2023, arXiv:2301.03580).

Cells are hidden, and the encoder's convolutions and norms see the visible ones alone. The maps of all its stages are
made dense, with a mask token of each stage at hidden sites, and the U-Net's decoder predicts the voxels x:

    loss = mean over the voxels of hidden cells of (pred - x)^2

A stage coarser than the cells has nothing hidden; its input was zero there.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from maefast import masking, ops
from maefast.data.volumes import VolumeBatch, Volumes
from maefast.names import Names
from maefast.nn import Cells, sparsify
from maefast.nn.init import TOKEN_STD
from maefast.nn.patch_embed import cube, patch_grid
from maefast.nn.patches import patchify, reconstruct
from maefast.nn.residual_unet import Conv3d, InstanceNorm, ResidualEncoder, UNetDecoder
from maefast.ops import CellMask
from maefast.ops._checks import one_of
from maefast.recipe import Draw, Output, Picture, Progress, Recipe, Spec, View

# The public encoder holds two copies of each convolution and norm, of which `all_modules` is the one that is trained.
_BLOCKS = [f"encoder.stages.{s}.blocks.{b}.{part}." for s in range(8) for b in range(12)
           for part in ("conv1", "conv2", "skip.0", "skip.1")]  # fmt: skip
_TWICE = ("encoder.stem.convs.0.", *_BLOCKS, *(f"decoder.stages.{s}.convs.{c}." for s in range(8) for c in range(4)))
_PARTS = (("all_modules.0.", "conv."), ("all_modules.1.", "norm."))


class SparK3D(Recipe):
    """Args:
        img_size: int or (D, H, W), a multiple of the cells and of the coarsest stage's stride. cell: side or sides of a
            cell. channels: C.
        window: values that become 0 and 1; None: each volume is standardised. foreground, turn, jitter: of the crops,
            see `maefast.data.volumes.Volumes`.
        mask_ratio: share of the N cells that is hidden, int(N * ratio) of them.
        norm_cells: targets are normalised cell by cell, as in SparK; otherwise they are voxels as they are taken.
        densify: "full" norms and projects dense maps (3x3x3, but for the finest), "token" puts mask tokens in alone.
        widths, depths: channels and blocks of the encoder's stages, fine to coarse. decoder_depth: convolutions of a
            level of the decoder.

    Shapes: volumes [B, C, D, H, W] -> N cells, row-major; pred [B, N, d * h * w * C], of hidden and visible cells.
    """

    spec = Spec(
        name="spark3d",
        title="Spark3D (S3D)",
        paper="Wald et al., CVPR 2025, arXiv:2410.23132; Tian et al., ICLR 2023, arXiv:2301.03580",
        modality="volumes",
        sizes={
            "resenc_l": {"widths": (32, 64, 128, 256, 320, 320), "depths": (1, 3, 4, 6, 6, 6)},
            "resenc_m": {"widths": (32, 64, 128, 256, 320, 320), "depths": (1, 1, 2, 2, 2, 2), "img_size": 96},
        },
        training={"lr": 1e-3, "weight_decay": 1e-2, "epochs": 1000, "batch_size": 6, "clip": 12.0, "flip": 0.5},
        demo={
            "model_args": {"img_size": 32, "cell": 8, "widths": [8, 16, 32], "depths": [1, 1, 1], "mask_ratio": 0.6},
            "steps": 70, "batch_size": 4, "lr": 4e-3, "warmup": 0.1, "picture_rows": 4,
        },
        baseline="predicting the mean of the visible voxels",
    )  # fmt: skip
    names = Names(
        ("decoder.seg_layers.4.", "decoder.pred."),
        *((name + public, name + ours) for name in _TWICE for public, ours in _PARTS),
        unused=(
            *(name + ours for name in _TWICE for _, ours in _PARTS),
            *("architecture.", "decoder.encoder.", *(f"decoder.seg_layers.{i}." for i in range(4))),
        ),
    )
    lead = 0

    def __init__(
        self,
        img_size: int | Sequence[int] = 160,
        cell: int | Sequence[int] = 16,
        channels: int = 1,
        window: Sequence[float] | None = None,
        foreground: float = 0.0,
        turn: float = 0.0,
        jitter: Sequence[float] = (0.0, 0.0),
        mask_ratio: float = 0.75,
        norm_cells: bool = False,
        densify: str = "full",
        widths: Sequence[int] = (32, 64, 128, 256, 320, 320),
        depths: Sequence[int] = (1, 3, 4, 6, 6, 6),
        decoder_depth: int = 1,
    ) -> None:
        super().__init__()
        size, self.cell = cube("img_size", img_size), cube("cell", cell)
        self.wants = Volumes(channels, size, None if window is None else tuple(window), foreground, turn, tuple(jitter))
        self.grid, self.hidden = patch_grid(size, self.cell), int(prod(patch_grid(size, self.cell)) * mask_ratio)
        if not 0 < self.hidden < prod(self.grid):
            raise ValueError(f"mask_ratio {mask_ratio} hides {self.hidden} of {prod(self.grid)} cells")
        if any(side % 2 ** (len(widths) - 1) for side in size):
            raise ValueError(f"img_size {size} is no multiple of 2^{len(widths) - 1}, the stride of the last stage")
        one_of("densify", densify, ("full", "token"))
        self.mask_ratio, self.norm, full = mask_ratio, "mae" if norm_cells else "none", densify == "full"
        self.encoder = sparsify(ResidualEncoder(channels, widths, depths))
        self.decoder = UNetDecoder(widths, channels, decoder_depth)
        self.mask_tokens = nn.ParameterList(torch.empty(1, width, 1, 1, 1) for width in widths)
        for token in self.mask_tokens:
            nn.init.trunc_normal_(token, std=TOKEN_STD, a=-TOKEN_STD, b=TOKEN_STD)
        self.densify_norms = nn.ModuleList(InstanceNorm(width) if full else nn.Identity() for width in widths)
        self.densify_projs = nn.ModuleList(
            Conv3d(width, width, 3, padding=1) if full and i else nn.Identity() for i, width in enumerate(widths)
        )

    def prepare(self, batch: VolumeBatch, draw: Draw, progress: Progress) -> View:
        """parts: [B, C, D, H, W]; plan: random cells are hidden, the others in their order."""
        parts, cells = self._volumes(batch), prod(self.grid)
        noise = draw.uniform("mask", cells, parts.device)
        return View(parts, masking.random(len(parts), cells, keep=cells - self.hidden, noise=noise, order="position"))

    def _volumes(self, batch: VolumeBatch) -> Tensor:
        self.wants.check(batch)
        return batch.volumes.to(self.decoder.pred.weight.dtype)

    def compute(self, view: View) -> Output:
        dense, parts = [], zip(self.mask_tokens, self.densify_norms, self.densify_projs)
        maps = self.encoder(Cells.pack(view.parts, CellMask(view.plan, self.grid)))
        for features, (token, norm, proj) in zip(maps, parts):
            dense.append(proj(norm(features).dense(token.flatten())))
        pred = patchify(self.decoder(dense), self.cell)
        return Output(self.score(pred, view), pred, view)

    def score(self, pred: Tensor, view: View) -> dict[str, Tensor]:
        return {"voxels": ops.patch_loss(pred, view.parts, view.plan, self.cell, norm=self.norm, rows="all")}

    def baseline(self, view: View) -> Output:
        rows = patchify(view.parts, self.cell).unflatten(2, (-1, self.wants.channels))
        seen = ~view.plan.mask[:, :, None, None]
        mean = (rows * seen).sum((1, 2), keepdim=True) / (seen.sum((1, 2), keepdim=True) * rows.shape[2])
        pred = mean.expand_as(rows).flatten(2) if self.norm == "none" else rows.flatten(2) * 0
        return Output(self.score(pred.contiguous(), view), pred, view)

    def encode(self, batch: VolumeBatch) -> Tensor:
        """[B, sites, width] of the last stage."""
        return self.encoder(self._volumes(batch))[-1].flatten(2).mT

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.volumes import sheet

        pred = ops.gather_tokens(self.compute(view).pred, view.plan, "masked")
        how = "; hidden cells have their true mean and variance" if self.norm != "none" else ""
        shown = reconstruct(pred, view.parts, view.plan, self.cell, self.norm)
        return sheet(shown, names, f"{self.mask_ratio:.0%} masked{how}")
