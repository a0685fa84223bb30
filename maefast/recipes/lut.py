"""LUT: two views of an image that share no visible patch, one restored, both to agree (Kim et al., 2023,
arXiv:2310.13593).

One permutation of the patches: view 1, the image, keeps the first quarter; view 2, another flip and other colours, the
second. Both go through the encoder as one batch. With v_k the mean of the visible patches' latents of view k, and t_k
the projection of the mean of all patches by a running average of the encoder and the projector,

    q_k = predictor(projector(v_k))
    loss = MAE's loss of view 1 + weight * (d(q_1, t_2) + d(q_2, t_1)) / 2,    d(q, t) = 2 - 2 cos(q, t)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maefast import masking, ops
from maefast.data.images.batch import ImageBatch
from maefast.data.images.photometric import NUMBERS, second_view
from maefast.names import MAE_DECODER, Names
from maefast.nn import Decoder, Encoder, Linear, PatchEmbed, position_table
from maefast.nn.init import init_weights_
from maefast.nn.patch_embed import pair, patch_grid
from maefast.nn.patches import reconstruct
from maefast.nn.teachers import Averaged, cosine_decay, teaching
from maefast.ops import TokenMask
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._images import ImageRecipe, mean_colour
from maefast.recipes._sizes import ENCODERS, check_visible


class LUT(ImageRecipe):
    """Args:
        img_size, patch_size: int or (height, width).
        mask_ratio: int(N * (1 - ratio)) patches of each view stay visible, at most half of all.
        weight: of the agreement. decay: of the running average at the start; it rises to 1.
        norm_pix: targets normalised patch by patch.
        embed_dim, depth, num_heads: of the encoder; decoder_*: of the decoder. head_dim: width inside of projector and
            predictor.

    Shapes: images [B, 3, H, W]; parts [2 B, 3, H, W]; latents [2 B, 1 + visible, D]; target [2 B, D]. The plan is a
    pair: of both views [2 B], of view 1 [B].
    """

    spec = Spec(
        name="lut",
        title="LUT",
        paper="Kim et al., 2023, arXiv:2310.13593",
        modality="images",
        sizes={size: ENCODERS[size] for size in ("base", "small", "large")},
        training={"epochs": 1600, "warmup": 0.025},
        demo={
            "model_args": {"embed_dim": 96, "depth": 4, "num_heads": 3, "decoder_embed_dim": 64, "decoder_depth": 2,
                           "decoder_num_heads": 2, "head_dim": 256, "norm_pix": False},
            "img_size": 64, "patch_size": 8, "steps": 150, "batch_size": 8, "lr": 1e-3, "warmup": 0.1,
        },
        baseline="the mean colour",
    )  # fmt: skip
    names = Names(
        ("", "encoder."),
        *MAE_DECODER,
        ("head.", "projector."),
        ("predictor.", "predictor."),
        ("teacher.", "teacher."),
        optional=("teacher.",),
    )

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        mask_ratio: float = 0.75,
        weight: float = 0.25,
        decay: float = 0.996,
        norm_pix: bool = True,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        head_dim: int = 4096,
    ) -> None:
        size, patch = pair("img_size", img_size), pair("patch_size", patch_size)
        super().__init__(3, size)
        self.patch, grid = patch, patch_grid(size, patch)
        self.patches, self.mask_ratio, self.weight, self.decay = grid[0] * grid[1], mask_ratio, weight, decay
        check_visible("mask_ratio", mask_ratio, self.patches)
        self.norm = "mae" if norm_pix else "none"
        self.encoder = Encoder(
            PatchEmbed(self.patch, 3, embed_dim),
            position_table("sincos", embed_dim, grid),
            embed_dim,
            depth,
            num_heads,
        )
        self.decoder = Decoder(
            embed_dim,
            3 * self.patch[0] * self.patch[1],
            position_table("sincos", decoder_embed_dim, grid),
            decoder_embed_dim,
            decoder_depth,
            decoder_num_heads,
        )
        self.projector, self.predictor = (head(embed_dim, head_dim) for _ in range(2))
        self.teacher = Averaged(encoder=self.encoder, projector=self.projector)

    def prepare(self, batch: ImageBatch, draw: Draw, progress: Progress) -> View:
        first = self.images(batch)
        numbers = draw.uniform("second view", NUMBERS, first.device)
        second = (second_view(first * self.std + self.mean, numbers) - self.mean) / self.std
        noise, both = draw.uniform("mask", self.patches, first.device), torch.cat([first, second])
        plans = masking.disjoint(*noise.shape, self.mask_ratio, noise=noise)
        scores = torch.cat([plan.ids_restore.float() for plan in plans])
        with teaching():
            means = _mean(self.teacher.encoder(both), self.teacher.projector).chunk(2)
            target = torch.cat([self.teacher.projector(mean) for mean in means])
        return View(both, (TokenMask.from_scores(scores, plans[0].keep), plans[0]), target)

    def compute(self, view: View) -> Output:
        return self.scored(self.encoder(view.parts, view.plan[0], features=False).chunk(2), view)

    def scored(self, latents: Sequence[Tensor], view: View) -> Output:
        """From the latents of both views, [B, 1 + visible, D] each."""
        pred = self.decoder(latents[0], view.plan[1])
        # One view after the other, as published: each has batch statistics of its own.
        q1, q2 = (self.predictor(self.projector(_mean(latent, self.projector))) for latent in latents)
        return Output({"pixels": self._pixels(pred, view), "agreement": self._agreement(q1, q2, view)}, pred, view)

    def _pixels(self, pred: Tensor, view: View) -> Tensor:
        return ops.patch_loss(pred, view.parts.chunk(2)[0], view.plan[1], self.patch, norm=self.norm)

    def _agreement(self, q1: Tensor, q2: Tensor, view: View) -> Tensor:
        t1, t2 = view.target.chunk(2)
        apart = ops.feature_loss(torch.cat([q1, q2]), torch.cat([t2, t1]), loss="cosine")
        return 2 * self.weight * apart

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        decay = cosine_decay(self.decay, progress.step - 1, progress.total)
        self.teacher.follow(decay, encoder=self.encoder, projector=self.projector)

    def after_loading(self, missing: Sequence[str]) -> None:
        self.teacher.follow(0.0, encoder=self.encoder, projector=self.projector)

    def baseline(self, view: View) -> Output:
        pred = mean_colour(view.parts.chunk(2)[0], self.patch, view.plan[1].total_masked)
        pred = pred if self.norm == "none" else pred * 0
        return Output({"pixels": self._pixels(pred, view)}, pred, view)

    def encode(self, batch: ImageBatch) -> Tensor:
        """[B, 1 + N, D], class token first."""
        return self.encoder(self.images(batch))

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images import pictures

        images, plan = view.parts.chunk(2)[0], view.plan[1]
        pred = self.decoder(self.encoder(images, plan, features=False), plan)
        shown = reconstruct(pred, images, plan, self.patch, self.norm)
        columns = pictures.four_columns(shown, self.mean, self.std)
        return pictures.Sheet(columns, names, f"{self.mask_ratio:.0%} of view 1 masked")


def _mean(latents: Tensor, of: nn.Sequential) -> Tensor:
    """[B, D] of the patches' [B, 1 + n, D], taken in float32 at least, in the dtype of the head that reads it."""
    return latents[:, 1:].to(torch.promote_types(latents.dtype, torch.float32)).mean(1).to(of[0].weight.dtype)


def head(dim: int, hidden: int) -> nn.Sequential:
    """Two linear layers without biases around a batch norm and a ReLU."""
    made = nn.Sequential(
        Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), Linear(hidden, dim, bias=False)
    )
    init_weights_(made)
    return made
