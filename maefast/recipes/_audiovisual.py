"""What recipes of clips with sound share: normalised clips and spectrograms, masks of tubes of the ones and of patches
of the others, pictures of both."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from maefast import masking, ops
from maefast.data.audiovisual import AudioVisual, AudioVisualBatch, sheet
from maefast.data.clips import Clips
from maefast.data.images.batch import normaliser
from maefast.data.spectrograms import Spectrograms
from maefast.nn.patch_embed import pair, patch_grid, triple
from maefast.nn.patches import reconstruct
from maefast.ops import TokenMask, _checks
from maefast.recipe import Draw, Picture, Recipe, View

Pair = tuple[Tensor | None, Tensor | None]  # of the clips and of their sound; None: there is none


class AudioVisualRecipe(Recipe):
    """Args:
    clips, sound: what is wanted. tubelet: (pt, ph, pw). patch_size: of the spectrograms, int or (frames, mels).
    mask_ratios: of the positions of a frame, and of the patches of a spectrogram; int(ratio * N) are hidden.
    mean, std: of log-mel values; a spectrogram is taken as (x - mean) / (2 std).
    norm_pix: targets are normalised for each patch and channel, as VideoMAE's.
    """

    def __init__(
        self,
        clips: Clips,
        tubelet: Sequence[int],
        sound: Spectrograms,
        patch_size: int | Sequence[int],
        mask_ratios: tuple[float, float],
        mean: float,
        std: float,
        norm_pix: bool,
    ) -> None:
        super().__init__()
        _checks.positive("std", std)
        self.wants = AudioVisual(clips, sound)
        self.tubelet, self.patch_size = triple("tubelet", tubelet), pair("patch_size", patch_size)
        self.grid = patch_grid((clips.frames, *clips.size), self.tubelet)
        self.sound_grid = patch_grid((sound.frames, sound.bank.mels), self.patch_size)
        self.mask_ratios, self.norm = mask_ratios, "videomae" if norm_pix else "none"
        for name, value in zip(("mean", "std"), normaliser(3)):
            self.register_buffer(name, value[..., None], persistent=False)
        self.register_buffer("sound_mean", torch.tensor(float(mean)), persistent=False)
        self.register_buffer("sound_scale", torch.tensor(2.0 * std), persistent=False)

    def normalised(self, batch: AudioVisualBatch) -> tuple[Pair, Tensor | None]:
        """Clips and spectrograms as encoders take them, and clips in [0, 1]."""
        self.wants.check(batch)
        clips, sound = batch.clips, batch.spectrograms
        clips = None if clips is None else clips.to(self.mean.dtype) / 255
        sound = None if sound is None else (sound.to(self.mean.dtype) - self.sound_mean) / self.sound_scale
        return (None if clips is None else (clips - self.mean) / self.std, sound), clips

    def plans(self, parts: Pair, draw: Draw) -> tuple[TokenMask | None, TokenMask | None]:
        """Tubes of the clips, random patches of the spectrograms; each from noise of its own."""
        clips, sound = parts
        seen = heard = None
        if clips is not None:
            frames, spatial = self.grid[0], self.grid[1] * self.grid[2]
            noise = draw.uniform("mask", spatial, clips.device)
            seen = masking.tube(len(clips), frames, spatial, self.mask_ratios[0], noise=noise)
        if sound is not None:
            noise = draw.uniform("sound mask", prod(self.sound_grid), sound.device)
            heard = masking.random(*noise.shape, self.mask_ratios[1], noise=noise, rule="complement")
        return seen, heard

    def score(self, pred: Pair, view: View) -> dict[str, Tensor]:
        """Mean squared errors, of the hidden tubelets to `view.target` and of the hidden patches of sound."""
        terms, (clips, sound) = {}, pred
        if clips is not None:
            terms["clips"] = ops.feature_loss(clips, view.target)
        if sound is not None:
            terms["sound"] = ops.patch_loss(sound, view.parts[1], view.plan[1], self.patch_size, norm=self.norm)
        return terms

    def pictures(self, pred: Pair, view: View, names: Sequence[str]) -> Picture:
        """Of predictions of the hidden tubelets, as frames, and of the hidden patches of sound."""
        seen = heard = None
        if pred[0] is not None:
            clips = view.parts[0] * self.std + self.mean
            seen = reconstruct(pred[0], clips, view.plan[0], self.tubelet, self.norm)
        if pred[1] is not None:
            heard = reconstruct(pred[1], view.parts[1], view.plan[1], self.patch_size, self.norm)
        how = "; masked patches have their true mean and variance" if self.norm != "none" else ""
        shares = " and ".join(f"{ratio:.0%}" for ratio in self.mask_ratios)
        return sheet(seen, heard, names, f"{shares} masked{how}")
