"""How far apart two images are to a frozen masked autoencoder: a loss, and maps of anomalies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import ops
from maefast.models.resize import resize_patches, resize_positions
from maefast.nn.encoder import run_blocks
from maefast.ops._checks import integer

States = tuple[tuple[Tensor, ...], ...]  # of each patch size, of each block: [B, N, D]


class PerceptualMAE(nn.Module):
    """The encoder of an MAE with patches of several sizes (Dalmonte et al., WACV 2026, arXiv:2507.18481): weights of
    its embedding and its table of positions are resized for each, as timm does, and its blocks serve all.

    Args:
        model: a `maefast.models.MaskedAutoencoderViT`, whose blocks are used as they are. patch_sizes: square ones that
            divide its images. at: all blocks, from 0, whose outputs may be asked for; those behind are left out.
    """

    def __init__(self, model: nn.Module, patch_sizes: Sequence[int], at: Sequence[int]) -> None:
        super().__init__()
        if not at or not all(0 <= index < len(model.blocks) for index in at):
            raise ValueError(f"at must name some of the {len(model.blocks)} blocks, from 0, got {list(at)}")
        self.size, grid = tuple(model.img_size), model.grid_size
        self.blocks, self.cls_token = model.blocks[: max(at) + 1], model.cls_token
        self.bias = model.patch_embed.proj.bias
        self.grids = {}
        for side in patch_sizes:
            integer("patch_sizes", side, 1)
            if any(length % side for length in self.size):
                raise ValueError(f"patch_sizes must divide images of {self.size}, got {side}")
            self.grids[side] = tuple(length // side for length in self.size)
            weight = resize_patches(model.patch_embed.proj.weight.detach(), (side, side), "bicubic")
            table = resize_positions(model.pos_embed.detach(), grid, self.grids[side])
            self.register_buffer(f"weight_{side}", weight)
            self.register_buffer(f"pos_{side}", table)

    def states(self, images: Tensor, side: int, at: Sequence[int]) -> tuple[Tensor, ...]:
        """Outputs of the blocks `at` for patches of `side`, without the class token: [B, N, D] each."""
        weight, table = getattr(self, f"weight_{side}"), getattr(self, f"pos_{side}")
        prefix = self.cls_token + table[:, :1]
        x = ops.patch_embed(images, weight, self.bias, pos=table[:, 1:], prefix=prefix)
        taps = dict.fromkeys(at)
        run_blocks(self.blocks[: max(at) + 1], x, taps=taps)
        return tuple(taps[index][:, 1:] for index in at)

    def forward(self, images: Tensor, patch_sizes: Sequence[int], at: Sequence[int]) -> States:
        """Images [B, 3, H, W], normalised as the model's."""
        return tuple(self.states(images, side, at) for side in patch_sizes)

    def maps(self, images: Tensor, target: States, patch_sizes: Sequence[int], at: Sequence[int]) -> Tensor:
        """With h the states of images and t those of `target`, which gets no gradient,

        product over patch sizes of upsample(1 - cos(h, t)), bilinear: [len(at), B, H, W]
        """
        product = None
        for side, wanted in zip(patch_sizes, target, strict=True):
            rows = [
                ops.feature_loss(state, true, loss="cosine", reduction="none").view(len(images), *self.grids[side])
                for state, true in zip(self.states(images, side, at), wanted, strict=True)
            ]
            far = F.interpolate(torch.stack(rows), self.size, mode="bilinear", align_corners=False)
            product = far if product is None else product * far
        return product
