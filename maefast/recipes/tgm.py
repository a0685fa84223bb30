"""TGM: clips whose patches that fit a caption best are hidden (Fan et al., ECCV 2024, arXiv:2408.00759).

In each frame (tubelet slot) the `mask_ratio` share of the positions whose features are most like the embedding c of a
caption is masked, and VideoMAE's encoder and decoder predict their pixels. The visible tokens of a clip, which the
encoder has anyway, are also to tell which caption is theirs. With t a tubelet's pixels in [0, 1], normalised for each
channel over its values, and v = project(mean of the latents of visible tokens),

    loss = mean over masked tubelets of (pred - t)^2 + weight * InfoNCE(v, c)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import masking
from maefast.data.captioned_clips import CaptionedClipBatch, CaptionedClips
from maefast.nn import Linear
from maefast.nn.contrast import info_nce
from maefast.nn.init import init_weights_
from maefast.nn.teachers import Frozen
from maefast.ops import TokenMask, _checks
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._clips import DEMO, ClipAutoencoder
from maefast.recipes._sizes import both, check_visible

MASKS = ("highest", "lowest", "random", "tube")


@dataclass(frozen=True)
class CaptionedView(View):
    """text: [B, D], embeddings of captions. scores: [B, T', S], what the mask was made from; None for a random one."""

    text: Tensor | None = None
    scores: Tensor | None = None


class TGM(ClipAutoencoder):
    """Args:
        masks: of each frame the positions with the "highest" scores, as published; or, the paper's ablations, the
            "lowest", "random" ones, or the same random ones in all frames ("tube").
        mask_ratio: share of a frame's positions that is hidden, int(ratio * S) of them.
        text: D, width of the embeddings of captions; 512 of CLIP ViT-B/32.
        teacher: frozen, of clips [B, 3, T, H, W] in [0, 1] and text [B, D] it makes scores [B, T', S], such as
            `maefast.nn.clip_scores.ClipScores`; None: the batch has them.
        project: a linear map to D of the "video", of "both" (of captions too), or "none", where the encoder is D wide.
        weight: of the contrast; 0 for the masked autoencoder alone. temperature: see `info_nce`.
        arguments: of `ClipAutoencoder`.

    Shapes: those of `ClipAutoencoder`.
    """

    spec = Spec(
        name="tgm",
        title="TGM",
        paper="Fan et al., ECCV 2024, arXiv:2408.00759",
        modality="video with captions",
        sizes={"base": both(768, 12, 12, 384, 4, 6), "small": both(384, 12, 6, 192, 4, 3)},
        training={"blr": 1.5e-4, "warmup": 0.05, "epochs": 200, "crop_scale": (0.5, 1.0), "flip": 0.0},
        demo={
            "model_args": {**DEMO["model_args"], "frames": 4, "text": 32, "embed_dim": 96, "depth": 3},
            "mask_ratio": 0.5, "crop_scale": (0.8, 1.0), "steps": 400, "batch_size": 16, "lr": 2e-3, "warmup": 0.1,
            "picture_rows": 3,
        },
        baseline="predicting each tubelet's mean, and any caption of the batch",
    )  # fmt: skip

    def __init__(
        self,
        masks: str = "highest",
        mask_ratio: float = 0.6,
        text: int = 512,
        teacher: nn.Module | None = None,
        project: str = "video",
        weight: float = 1.0,
        temperature: float = 0.07,
        **arguments: Any,
    ) -> None:
        super().__init__(mask_ratio=mask_ratio, **arguments)
        check_visible("mask_ratio", mask_ratio, self.grid[1] * self.grid[2], "complement")
        _checks.one_of("masks", masks, MASKS)
        _checks.one_of("project", project, ("video", "both", "none"))
        _checks.positive("temperature", temperature)
        if not (teacher is None or isinstance(teacher, nn.Module)):
            raise TypeError(f"teacher must be a module, got {type(teacher).__name__}")
        self.masks, self.weight, self.temperature = masks, weight, temperature
        clips, scored = self.wants, masks in ("highest", "lowest")
        self.wants = CaptionedClips(
            clips.frames, clips.size, clips.stride, self.grid, text, scored=scored and teacher is None
        )
        self.teacher = Frozen(teacher) if teacher is not None and scored else None
        width = self.encoder.norm.weight.shape[0]
        if project == "none" and width != text:
            raise ValueError(f"project 'none' needs an encoder as wide as the text, {text}, got {width}")
        self.project = Linear(width, text) if weight and project != "none" else nn.Identity()
        self.project_text = Linear(text, text) if weight and project == "both" else nn.Identity()
        init_weights_(self.project)
        init_weights_(self.project_text)

    def prepare(self, batch: CaptionedClipBatch, draw: Draw, progress: Progress) -> CaptionedView:
        """parts: float32 [B, 3, T, H, W], normalised as ImageNet's; target: the same in [0, 1]; plan: see `masks`."""
        parts, clips = self.normalised(batch)
        text, scores = batch.text.to(parts.dtype), batch.scores
        if self.teacher is not None:
            scores = self.teacher(clips, text).to(parts.dtype)
        return CaptionedView(parts, self._plan(scores, draw, parts.device), clips, text, scores)

    def _plan(self, scores: Tensor | None, draw: Draw, device: torch.device) -> TokenMask:
        frames, spatial = self.grid[0], self.grid[1] * self.grid[2]
        if self.masks in ("highest", "lowest"):
            return masking.guided(scores, self.mask_ratio, mask=self.masks)
        if self.masks == "tube":
            noise = draw.uniform("mask", spatial, device)
            return masking.tube(len(noise), frames, spatial, self.mask_ratio, noise=noise)
        noise = draw.uniform("mask", frames * spatial, device)
        return masking.guided(noise.view(-1, frames, spatial), self.mask_ratio)

    def compute(self, view: CaptionedView) -> Output:
        latent = self.encoder(view.parts, view.plan, features=False)
        pred = self.decoder(latent, view.plan)
        terms = self.score(pred, view)
        if self.weight:
            terms["contrast"] = self.weight * info_nce(*self._pair(latent, view.text), self.temperature)
        return Output(terms, pred, view)

    def _pair(self, latent: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """A vector for each clip, the mean of what the encoder sees of it, and one for its caption."""
        mean = latent.mean(1, dtype=torch.promote_types(latent.dtype, torch.float32))
        weight = getattr(self.project, "weight", mean)
        return self.project(mean.to(weight.dtype)), self.project_text(text)

    def baseline(self, view: CaptionedView) -> Output:
        guess = super().baseline(view)
        if not self.weight:
            return guess
        any_caption = view.text.new_tensor(self.weight * math.log(len(view.text)))
        return Output({**guess.terms, "contrast": any_caption}, guess.pred, view)

    def retrieved(self, view: CaptionedView) -> Tensor:
        """bool [B]: whether the caption most like a clip, of those of the batch, is its own."""
        video, text = self._pair(self.encoder(view.parts, view.plan, features=False), view.text)
        likeness = F.normalize(video.float(), dim=1) @ F.normalize(text.float(), dim=1).t()
        return likeness.argmax(1) == torch.arange(len(text), device=text.device)

    def picture(self, view: CaptionedView, names: Sequence[str]) -> Picture:
        from maefast.data.captioned_clips import sheet

        shown, caption = self.shown(view)
        if self.weight:
            caption += f"; {int(self.retrieved(view).sum())} of {len(names)} clips find their caption"
        return sheet(shown, view.scores, self.grid, names, caption)
