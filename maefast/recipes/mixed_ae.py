"""MixedAE: images are mixed patch by patch, told apart and restored (Chen et al., CVPR 2023, arXiv:2303.17152).

Four images make one sequence in which each place has the patch of one of them, at random. In the encoder each patch
attends to the quarter of all patches that it looks at most, which should be those of its own image; the decoder sees
each image's own latents in place and mask tokens elsewhere. With z_n the latents of a sequence, s_nm = cos(z_n, z_m) /
tau, and P(n) the other patches of n's image,

    loss = MAE's loss on the patches of each image that are not in the mix
        + weight * mean over n of -mean over p in P(n) of log(exp(s_np) / sum over m != n of exp(s_nm))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maefast import masking, ops
from maefast.data.images.batch import ImageBatch
from maefast.names import MAE_DECODER, Names
from maefast.nn import Decoder, Encoder, PatchEmbed, position_table, run_blocks, run_norm
from maefast.nn.contrast import sup_con
from maefast.nn.init import init_tokens_
from maefast.nn.patch_embed import pair, patch_grid
from maefast.nn.patches import reconstruct
from maefast.nn.topk import run_topk_blocks
from maefast.ops import TokenMask
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._images import ImageRecipe, mean_colour
from maefast.recipes._sizes import ENCODERS


class MixedAE(ImageRecipe):
    """Args:
        img_size, patch_size: int or (height, width).
        group: images in a mix, 1 / r; images that follow each other in a batch. A batch that it does not divide is
            filled up with its first images.
        top: how many tokens each one attends to; None: N / group. homologous: how many of the first blocks attend so;
            None: all.
        segments: a learned vector for each place in the group is added to the tokens of its image.
        weight, temperature: of the contrast. norm_pix: normalised pixels.
        embed_dim, depth, num_heads: of the encoder; decoder_*: of the decoder.

    Shapes: images [B, 3, H, W]; plan of B samples, N / group patches visible in each; latents [B / group, 1 + N, D], in
    the order of the group's plans, the class token first; pred [B, N - N / group, 3 * p * p].
    """

    spec = Spec(
        name="mixed_ae",
        title="MixedAE",
        paper="Chen et al., CVPR 2023, arXiv:2303.17152",
        modality="images",
        sizes={size: ENCODERS[size] for size in ("base", "large")},
        training={"epochs": 1600, "warmup": 0.025},
        demo={
            "model_args": {"norm_pix": False, "embed_dim": 96, "depth": 4, "num_heads": 3, "decoder_embed_dim": 64,
                           "decoder_depth": 2, "decoder_num_heads": 2},
            "img_size": 64, "patch_size": 8, "steps": 250, "batch_size": 16, "lr": 2e-3, "warmup": 0.1,
        },
        baseline="the mean colour, and latents that are all alike",
    )  # fmt: skip
    names = Names(("", "encoder."), *MAE_DECODER, ("segments", "segments"), optional=("segments",))

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        group: int = 4,
        top: int | None = None,
        homologous: int | None = None,
        segments: bool = True,
        weight: float = 0.1,
        temperature: float = 0.25,
        norm_pix: bool = True,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
    ) -> None:
        size, patch = pair("img_size", img_size), pair("patch_size", patch_size)
        super().__init__(3, size)
        self.patch, self.grid = patch, patch_grid(size, patch)
        self.patches = self.grid[0] * self.grid[1]
        if group < 2 or self.patches % group:
            raise ValueError(f"group must be at least 2 and divide the {self.patches} patches, got {group}")
        self.top, self.homologous = (
            self.patches // group if top is None else top,
            depth if homologous is None else homologous,
        )
        if not (1 <= self.top <= self.patches + 1 and 0 <= self.homologous <= depth):
            raise ValueError(
                f"top must lie in 1 to {self.patches + 1}, the tokens, and homologous in 0 to {depth}, the blocks, got"
                f" {self.top} and {self.homologous}"
            )
        self.group, self.weight, self.temperature = group, weight, temperature
        self.norm = "mae" if norm_pix else "none"
        table = position_table("sincos", embed_dim, self.grid)
        self.encoder = Encoder(PatchEmbed(patch, 3, embed_dim), table, embed_dim, depth, num_heads)
        self.segments = nn.Parameter(torch.empty(group, embed_dim)) if segments else None
        if segments:
            init_tokens_(self.segments)
        table = position_table("sincos", decoder_embed_dim, self.grid)
        values = 3 * patch[0] * patch[1]
        self.decoder = Decoder(embed_dim, values, table, decoder_embed_dim, decoder_depth, decoder_num_heads)

    def prepare(self, batch: ImageBatch, draw: Draw, progress: Progress) -> View:
        images = self.images(batch)
        noise = draw.uniform("mask", self.patches, images.device)[:: self.group]
        filled = len(noise) * self.group
        if filled > len(images):
            images = images[torch.arange(filled, device=images.device) % len(images)]
        return View(images, masking.mixing(filled, self.patches, self.group, noise=noise))

    def mixed(self, images: Tensor, plan: TokenMask) -> Tensor:
        """Latents of the mixes, [B / group, 1 + N, D]: what is visible of a group's images, one after the other."""
        encoder = self.encoder
        lead, pos = encoder.pos_embed.split([1, self.patches], 1)
        x = encoder.patch_embed(images, plan, pos=pos).unflatten(0, (-1, self.group))
        if self.segments is not None:
            x = x + self.segments[:, None]
        x = x.flatten(1, 2)
        x = torch.cat([(encoder.cls_token + lead).to(x.dtype).expand(len(x), -1, -1), x], 1)
        x, delta = run_topk_blocks(encoder.blocks[: self.homologous], x, self.top)
        if self.homologous < len(encoder.blocks):
            x, delta = run_blocks(encoder.blocks[self.homologous :], x if delta is None else x + delta)
        return run_norm(encoder.norm, x, delta)

    def unmixed(self, latents: Tensor) -> Tensor:
        """[B / group, 1 + N, D] -> [B, 1 + N / group, D]: each image's own behind the class token of its mix."""
        own = latents[:, 1:].unflatten(1, (self.group, -1)).flatten(0, 1)
        return torch.cat([latents[:, :1].repeat_interleave(self.group, 0), own], 1)

    def compute(self, view: View) -> Output:
        latents = self.mixed(view.parts, view.plan)
        pred = self.decoder(self.unmixed(latents), view.plan)
        source = torch.arange(self.patches, device=latents.device) // (self.patches // self.group)
        contrast = sup_con(latents[:, 1:], source, self.temperature)
        return Output({"pixels": self._pixels(pred, view), "contrast": self.weight * contrast}, pred, view)

    def _pixels(self, pred: Tensor, view: View) -> Tensor:
        return ops.patch_loss(pred, view.parts, view.plan, self.patch, norm=self.norm)

    def baseline(self, view: View) -> Output:
        pred = mean_colour(view.parts, self.patch, view.plan.total_masked) * (self.norm == "none")
        pixels = self._pixels(pred, view)
        alike = pixels.new_tensor(self.weight * math.log(self.patches - 1))
        return Output({"pixels": pixels, "contrast": alike}, pred, view)

    def encode(self, batch: ImageBatch) -> Tensor:
        """[B, 1 + N, D] of whole images by a plain ViT, class token first: nothing is mixed, and all tokens see all."""
        return self.encoder(self.images(batch))

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images import pictures

        pred = self.compute(view).pred
        shown = reconstruct(pred, view.parts, view.plan, self.patch, self.norm)
        mix = shown.masked.unflatten(0, (-1, self.group)).sum(1).repeat_interleave(self.group, 0)
        columns = [shown.original, mix, shown.masked, shown.pasted]
        columns = [pictures.to_pixels(column[: len(names)], self.mean, self.std) for column in columns]
        labels = ("original", "mix", "its patches", "restored")
        return pictures.Sheet(columns, names, f"{self.group} images, rows that follow each other, make a mix", labels)
