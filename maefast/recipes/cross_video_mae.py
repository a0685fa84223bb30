"""CrossVideoMAE: clips and single frames, each beside a changed view, that find each other (Ahamed et al., 2025,
arXiv:2502.07811).

Tubelets of a clip and of its changed view (another crop, other colours) are hidden, and patches of one frame of both.
With z the projected mean of a view's visible latents, zv and zf those of clips and frames, a and b the two views,

    loss = pixels(clips) + pixels(frames) + intra * (NT-Xent(zv_a, zv_b) + NT-Xent(zf_a, zf_b))
         + cross * NT-Xent((zv_a + zv_b) / 2, (zf_a + zf_b) / 2)

No code is public; what the paper leaves open is an argument or said on the recipe's page.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, prod

import torch
from torch import Tensor

from maefast import masking, ops
from maefast.data.clips import ClipBatch, Clips
from maefast.data.images.batch import normaliser
from maefast.data.jitter import NUMBERS, jitter_clips
from maefast.nn import Decoder, Encoder, Mlp, PatchEmbed, encode_together, pool_visible, sincos_2d, sincos_interleaved
from maefast.nn.contrast import nt_xent
from maefast.nn.init import init_weights_
from maefast.nn.patch_embed import pair, patch_grid, triple
from maefast.nn.patches import Reconstruction, reconstruct
from maefast.ops import _checks
from maefast.recipe import Draw, Output, Picture, Progress, Recipe, Spec, View
from maefast.recipes._sizes import ENCODERS, check_visible


class CrossVideoMAE(Recipe):
    """Args:
        frames, img_size, tubelet, stride: of the clips. patch_size: of the frames, int or (H, W).
        mask_ratio, frame_mask_ratio: of the tubelets and of the patches; one, or two for the views a and b.
        norm_pix: targets are normalised, as MAE's.
        intra, cross: weights of the contrasts. temperature: of both. proj_dim: width of z.
        scale, colour: of the changed view, see `jitter_clips`.
        shared: both kinds of tokens go through the same blocks, all views in one packed batch; otherwise frames have an
            encoder of their own, as in the paper. Decoders, projections, norms and tokens are apart in any case.
        embed_dim, depth, num_heads: of the encoders. decoder_*: of the decoders; frame_decoder_depth: of the frames'.

    Shapes: clips [B, 3, T, H, W]. Views of a batch come one after the other, a before b: parts are clips [2 B, 3, T, H,
    W] and frames [2 B, 3, H, W]; plan and pred are pairs (clips, frames), packed where the views' ratios differ.
    """

    spec = Spec(
        name="cross_video_mae",
        title="CrossVideoMAE",
        paper="Ahamed et al., 2025, arXiv:2502.07811",
        modality="video",
        sizes={size: ENCODERS[size] for size in ("base", "small", "large")},
        training={"blr": 1.5e-4, "warmup": 0.05, "epochs": 800, "crop_scale": (0.5, 1.0), "flip": 0.5},
        demo={
            "model_args": {
                "frames": 4, "img_size": 48, "tubelet": [2, 8, 8], "patch_size": 8, "stride": 1, "mask_ratio": 0.8,
                "colour": 0.2, "shared": True, "intra": 0.2, "cross": 0.2, "embed_dim": 64, "depth": 2, "num_heads": 2,
                "decoder_embed_dim": 48, "decoder_depth": 1, "frame_decoder_depth": 1, "decoder_num_heads": 2,
                "proj_dim": 32,
            },
            "steps": 250, "batch_size": 12, "lr": 2e-3, "warmup": 0.1, "picture_rows": 2,
        },
        baseline="predicting each patch's mean, and partners at random",
    )  # fmt: skip

    def __init__(
        self,
        frames: int = 16,
        img_size: int | Sequence[int] = 224,
        tubelet: Sequence[int] = (2, 16, 16),
        stride: int = 4,
        patch_size: int | Sequence[int] = 16,
        mask_ratio: float | Sequence[float] = 0.9,
        frame_mask_ratio: float | Sequence[float] = 0.75,
        norm_pix: bool = True,
        intra: float = 1.0,
        cross: float = 1.0,
        temperature: float = 0.1,
        proj_dim: int = 256,
        scale: Sequence[float] = (0.5, 1.0),
        colour: float = 0.4,
        shared: bool = False,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 4,
        decoder_num_heads: int = 16,
        frame_decoder_depth: int = 8,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        _checks.positive("temperature", temperature)
        size = pair("img_size", img_size)
        self.wants = Clips(frames, size, stride)
        self.patches = triple("tubelet", tubelet), pair("patch_size", patch_size)
        self.grids = patch_grid((frames, *size), self.patches[0]), patch_grid(size, self.patches[1])
        self.ratios = _two("mask_ratio", mask_ratio), _two("frame_mask_ratio", frame_mask_ratio)
        for name, grid, ratios in zip(("mask_ratio", "frame_mask_ratio"), self.grids, self.ratios):
            check_visible(name, max(ratios), prod(grid))
        self.norm, self.shared, self.change = "mae" if norm_pix else "none", shared, (tuple(scale), colour)
        self.intra, self.cross, self.temperature = intra, cross, temperature
        for name, patch, grid, blocks, decoders in (
            ("", self.patches[0], self.grids[0], depth, decoder_depth),
            ("frame_", self.patches[1], self.grids[1], 0 if shared else depth, frame_decoder_depth),
        ):
            table, told = (
                sincos_interleaved(width, prod(grid), 1) if len(grid) == 3 else sincos_2d(width, grid, 1)
                for width in (embed_dim, decoder_embed_dim)
            )
            encoder = Encoder(PatchEmbed(patch, 3, embed_dim), table, embed_dim, blocks, num_heads, mlp_ratio)
            decoder = Decoder(
                embed_dim, 3 * prod(patch), told, decoder_embed_dim, decoders, decoder_num_heads, mlp_ratio
            )
            projector = Mlp(embed_dim, embed_dim, proj_dim)
            init_weights_(projector)
            for part, module in (("encoder", encoder), ("decoder", decoder), ("projector", projector)):
                self.add_module(f"{name}{part}", module)
        mean, std = normaliser(3)
        self.register_buffer("mean", mean[..., None], persistent=False)
        self.register_buffer("std", std[..., None], persistent=False)

    def prepare(self, batch: ClipBatch, draw: Draw, progress: Progress) -> View:
        """parts: both views of the clips, and the same frame of both; plan: random tokens are hidden."""
        clips = self._pixels(batch)
        scale, colour = self.change
        changed = jitter_clips(clips, draw.uniform("view", NUMBERS, clips.device), scale, colour=colour)
        both = torch.cat([clips, changed])
        index = (draw.uniform("frame", 1, clips.device)[:, 0] * clips.shape[2]).long().repeat(2)
        parts = (both - self.mean) / self.std
        frames = parts[torch.arange(len(parts), device=parts.device), :, index]
        plans = []
        for what, grid, ratios in zip(("mask", "frame mask"), self.grids, self.ratios):
            tokens = prod(grid)
            noise = draw.uniform(what, 2 * tokens, clips.device).view(-1, 2, tokens).transpose(0, 1).flatten(0, 1)
            ratio = [ratio for ratio in ratios for _ in range(len(clips))] if ratios[0] != ratios[1] else ratios[0]
            plans.append(masking.random(len(noise), tokens, ratio, noise=noise))
        return View((parts, frames), tuple(plans))

    def _pixels(self, batch: ClipBatch) -> Tensor:
        """In [0, 1]."""
        self.wants.check(batch)
        return batch.clips.to(self.mean.dtype) / 255

    def compute(self, view: View) -> Output:
        encoders = self.encoder, self.frame_encoder
        if self.shared:
            latents = encode_together(encoders, view.parts, view.plan, self.encoder.blocks)
        else:
            latents = [encoder(*given) for encoder, *given in zip(encoders, view.parts, view.plan)]
        decoders, projectors = (self.decoder, self.frame_decoder), (self.projector, self.frame_projector)
        pred = tuple(decoder(latent, plan) for decoder, latent, plan in zip(decoders, latents, view.plan))
        pooled = (pool_visible(latent, plan, prefix=1) for latent, plan in zip(latents, view.plan))
        clips, frames = (to(mean).unflatten(0, (2, -1)) for to, mean in zip(projectors, pooled))
        terms = self._score(pred, view)
        terms["clip contrast"] = self.intra * nt_xent(*clips, self.temperature)
        terms["frame contrast"] = self.intra * nt_xent(*frames, self.temperature)
        terms["cross contrast"] = self.cross * nt_xent(clips.mean(0), frames.mean(0), self.temperature)
        return Output(terms, pred, view)

    def _score(self, pred: Sequence[Tensor], view: View) -> dict[str, Tensor]:
        each = zip(pred, view.parts, view.plan, self.patches)
        return dict(zip(("clips", "frames"), (ops.patch_loss(*given, norm=self.norm) for given in each)))

    def baseline(self, view: View) -> Output:
        sizes = zip(view.parts, view.plan, self.patches)
        pred = tuple(part.new_zeros(plan.total_masked, 3 * prod(patch)) for part, plan, patch in sizes)
        chance = view.parts[0].new_tensor(log(len(view.parts[0]) - 1))
        weights = {"clip contrast": self.intra, "frame contrast": self.intra, "cross contrast": self.cross}
        return Output({**self._score(pred, view), **{name: w * chance for name, w in weights.items()}}, pred, view)

    def encode(self, batch: ClipBatch) -> Tensor:
        """[B, 1 + N, D] of the clips, the class token first, then tubelets row-major over (time, rows, columns)."""
        return self.encoder((self._pixels(batch) - self.mean) / self.std)

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.clips import sheet

        shown = reconstruct(self.compute(view).pred[0], view.parts[0], view.plan[0], self.patches[0], self.norm)
        *images, mask = shown  # patches are normalised in the scale of the parts
        shown = Reconstruction(*(clips * self.std + self.mean for clips in images), mask)
        how = "; masked tubelets have their true mean and variance" if self.norm != "none" else ""
        shares = " and ".join(f"{ratio:.0%}" for ratio in sorted(set(self.ratios[0])))
        return sheet(shown, [*names, *(f"{name}, changed" for name in names)], f"{shares} masked{how}")


def _two(name: str, ratio: float | Sequence[float]) -> tuple[float, float]:
    ratios = tuple(ratio) if isinstance(ratio, (tuple, list)) else (ratio, ratio)
    if len(ratios) != 2 or not all(0 < value < 1 for value in ratios):
        raise ValueError(f"{name} must lie in (0, 1), one or two of them, got {ratio}")
    return ratios
