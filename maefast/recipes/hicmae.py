"""HiCMAE: clips and their sound, each with an encoder, which look at each other before they are decoded (Sun et al., 2024,
arXiv:2401.05698).

Tubes of the clip and patches of its spectrogram are hidden. The encoders' latents are fused by cross-attention, and
each decoder also looks at states of its own encoder, the deepest first. In the middle of the encoders what is seen and
what is heard must find each other. With v and a the hidden tubelets and patches, normalised, the second frame of each
pair less the first, and V_l and A_l the means of the visible tokens' states after block l,

    loss = mean (pred_v - v)^2 + mean (pred_a - a)^2 + 0.0025 * sum over l of InfoNCE(V_l, A_l)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from maefast import masking, ops
from maefast.data.audiovisual import AudioVisual, AudioVisualBatch
from maefast.data.clips import Clips
from maefast.data.fbank import Fbank
from maefast.data.images.batch import normaliser
from maefast.data.spectrograms import Spectrograms
from maefast.names import Names
from maefast.nn import CrossDecoder, CrossFusion, Encoder, PatchEmbed, sincos_interleaved
from maefast.nn.contrast import info_nce
from maefast.nn.patch_embed import pair, patch_grid, triple
from maefast.nn.patches import frame_differences, patchify, reconstruct, statistics
from maefast.ops import TokenMask, _checks
from maefast.recipe import Draw, Output, Picture, Progress, Recipe, Spec, View


class HiCMAE(Recipe):
    """Args:
        frames, img_size, tubelet, stride: of the clips, as of VideoMAE. mask_ratio: of the positions of a frame.
        sound_frames, mels, rate, seconds, roll: of the spectrograms, see `Spectrograms`. patch_size: of their patches.
        sound_mask_ratio: of these. mean, std: of log-mel values; the spectrogram is taken as (x - mean) / (2 std).
        norm_pix: targets are normalised; otherwise pixels in [0, 1] and values of the normalised spectrogram.
        difference: frames of a group of which all but the first are told as what they differ by from it; 1: none.
        contrast: weight of InfoNCE. temperature: of it.
        taps: blocks of the encoders, from 0, that are contrasted and that the decoders look at; they have a block more
            than there are taps.
        embed_dim, depth, num_heads: of the encoders; fusion_depth: layers between. decoder_*: of the decoders.

    Shapes: clips [B, 3, T, H, W] and spectrograms [B, 1, S, mels]; either may be missing, then the other's encoder and
    decoder are trained without fusion and contrast. parts, plan and pred are pairs (clips, sound); target: [B, masked,
    3 * pt * ph * pw], of the clips.
    """

    spec = Spec(
        name="hicmae",
        title="HiCMAE",
        paper="Sun et al., 2024, arXiv:2401.05698",
        modality="video with sound",
        sizes={
            "base": {"embed_dim": 512, "num_heads": 8, "decoder_embed_dim": 384, "decoder_num_heads": 6},
            "small": {"embed_dim": 384, "num_heads": 6, "decoder_embed_dim": 192, "decoder_num_heads": 3},
        },
        training={
            "blr": 3e-4, "warmup": 0.05, "epochs": 100, "batch_size": 160, "crop_scale": (0.5, 1.0), "flip": 0.0,
        },
        demo={
            "model_args": {
                "frames": 8, "img_size": 48, "tubelet": [2, 8, 8], "stride": 1, "mask_ratio": 0.75,
                "sound_frames": 64, "mels": 32, "patch_size": 8, "seconds": 0.655, "roll": False, "contrast": 0.02,
                "taps": [1, 2], "embed_dim": 96, "depth": 4, "num_heads": 3, "fusion_depth": 1,
                "decoder_embed_dim": 64, "decoder_num_heads": 2,
            },
            "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "steps": 400, "batch_size": 16, "lr": 2e-3,
            "warmup": 0.1,
        },
        baseline="predicting means, and partners at random",
    )  # fmt: skip
    names = Names(
        ("encoder_to_decoder.", "decoder.embed."),
        ("encoder_to_decoder_audio.", "decoder_audio.embed."),
        ("mask_token", "decoder.mask_token"),
        ("mask_token_audio", "decoder_audio.mask_token"),
        ("decoder.head.", "decoder.pred."),
        ("decoder_audio.head.", "decoder_audio.pred."),
        ("encoder_fusion.blocks.", "fusion.streams.0.blocks."),
        ("encoder_fusion.norm.", "fusion.streams.0.norm."),
        ("encoder_fusion.blocks_audio.", "fusion.streams.1.blocks."),
        ("encoder_fusion.norm_audio.", "fusion.streams.1.norm."),
    )

    def __init__(
        self,
        frames: int = 16,
        img_size: int | Sequence[int] = 160,
        tubelet: Sequence[int] = (2, 16, 16),
        stride: int = 4,
        mask_ratio: float = 0.9,
        sound_frames: int = 256,
        mels: int = 128,
        patch_size: int | Sequence[int] = 16,
        sound_mask_ratio: float = 0.8,
        rate: int = 16000,
        seconds: float = 2.575,
        roll: bool = True,
        mean: float = -4.2677393,
        std: float = 4.5689974,
        norm_pix: bool = True,
        difference: int = 2,
        contrast: float = 0.0025,
        temperature: float = 0.07,
        taps: Sequence[int] = (3, 6, 9),
        embed_dim: int = 512,
        depth: int = 10,
        num_heads: int = 8,
        fusion_depth: int = 2,
        decoder_embed_dim: int = 384,
        decoder_num_heads: int = 6,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        for name, value in (("std", std), ("temperature", temperature)):
            _checks.positive(name, value)
        size, self.tubelet, self.patch_size = (
            pair("img_size", img_size),
            triple("tubelet", tubelet),
            pair("patch_size", patch_size),
        )
        self.grid = patch_grid((frames, *size), self.tubelet)
        self.sound_grid = patch_grid((sound_frames, mels), self.patch_size)
        self.taps, self.frames, self.difference = tuple(taps), frames, difference
        if list(self.taps) != sorted(set(self.taps)) or not all(0 <= tap < depth for tap in self.taps):
            raise ValueError(f"taps must rise and name some of {depth} blocks, from 0, got {list(taps)}")
        if difference < 1 or frames % difference:
            raise ValueError(f"difference must divide the {frames} frames of a clip, got {difference}")
        sound = Spectrograms(sound_frames, Fbank(rate, mels), seconds, roll=roll)
        self.wants = AudioVisual(Clips(frames, size, stride), sound)
        self.ratios, self.norm = (mask_ratio, sound_mask_ratio), "videomae" if norm_pix else "none"
        self.contrast, self.temperature = contrast, temperature
        for name, patch, channels, grid in (
            ("", self.tubelet, 3, self.grid), ("_audio", self.patch_size, 1, self.sound_grid),
        ):  # fmt: skip
            tokens, how = math.prod(grid), {"bias": "qv"}
            table, told = sincos_interleaved(embed_dim, tokens), sincos_interleaved(decoder_embed_dim, tokens)
            embed, values = PatchEmbed(patch, channels, embed_dim), channels * math.prod(patch)
            encoder = Encoder(embed, table, embed_dim, depth, num_heads, mlp_ratio, prefix=0, **how)
            decoder = CrossDecoder(
                embed_dim, values, told, decoder_embed_dim, 1 + len(self.taps), decoder_num_heads, mlp_ratio,
                embed_bias=False, **how,
            )  # fmt: skip
            self.add_module(f"encoder{name}", encoder)
            self.add_module(f"decoder{name}", decoder)
        self.fusion = CrossFusion((embed_dim, embed_dim), fusion_depth, num_heads, mlp_ratio, bias="qv")
        for name, value in zip(("mean", "std"), normaliser(3)):
            self.register_buffer(name, value[..., None], persistent=False)
        self.register_buffer("sound_mean", torch.tensor(float(mean)), persistent=False)
        self.register_buffer("sound_scale", torch.tensor(2.0 * std), persistent=False)

    def prepare(self, batch: AudioVisualBatch, draw: Draw, progress: Progress) -> View:
        """parts: normalised clips and spectrograms; plan: of tubes, and of random patches; target: see above."""
        parts, clips = self._normalised(batch)
        plans, target = [None, None], None
        if clips is not None:
            frames, spatial = self.grid[0], self.grid[1] * self.grid[2]
            noise = draw.uniform("mask", spatial, clips.device)
            plans[0] = masking.tube(len(clips), frames, spatial, self.ratios[0], noise=noise)
            hidden = ops.gather_tokens(patchify(clips, self.tubelet), plans[0], "masked")
            shift, scale = statistics(hidden, self.norm, 3)
            target = frame_differences((hidden - shift) / scale, self.tubelet, self.frames, self.difference)
        if parts[1] is not None:
            tokens = math.prod(self.sound_grid)
            noise = draw.uniform("sound mask", tokens, parts[1].device)
            plans[1] = masking.random(len(noise), tokens, self.ratios[1], noise=noise, rule="complement")
        return View(parts, tuple(plans), target)

    def _normalised(self, batch: AudioVisualBatch) -> tuple[tuple[Tensor | None, Tensor | None], Tensor | None]:
        """Clips and spectrograms as the encoders take them, and clips in [0, 1]."""
        self.wants.check(batch)
        clips, sound = batch.clips, batch.spectrograms
        clips = None if clips is None else clips.to(self.mean.dtype) / 255
        sound = None if sound is None else (sound.to(self.mean.dtype) - self.sound_mean) / self.sound_scale
        return (None if clips is None else (clips - self.mean) / self.std, sound), clips

    def compute(self, view: View) -> Output:
        latents, states = zip(*map(self._states, (self.encoder, self.encoder_audio), view.parts, view.plan))
        terms = {}
        if None not in view.parts:
            pooled = zip(*([state.mean(1) for state in stream] for stream in states))
            found = [info_nce(*both, self.temperature) for both in pooled]
            terms["contrast"] = self.contrast * sum(found, latents[0].new_zeros(()))
            latents = self.fusion(*latents)
        decoders = self.decoder, self.decoder_audio
        pred = tuple(
            None if latent is None else decoder(latent, plan, stream)
            for decoder, latent, plan, stream in zip(decoders, latents, view.plan, states)
        )
        return Output({**self._score(pred, view), **terms}, pred, view)

    def _states(
        self, encoder: Encoder, parts: Tensor | None, plan: TokenMask | None
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Latents of visible tokens, and the states at the taps, through the encoder's norm."""
        if parts is None:
            return None, []
        taps = dict.fromkeys(self.taps)
        latent = encoder(parts, plan, taps=taps)
        return latent, [encoder.norm(state) for state in taps.values()]

    def _score(self, pred: tuple[Tensor | None, Tensor | None], view: View) -> dict[str, Tensor]:
        terms, (clips, sound) = {}, pred
        if clips is not None:
            terms["clips"] = ops.feature_loss(clips, view.target)
        if sound is not None:
            terms["sound"] = ops.patch_loss(sound, view.parts[1], view.plan[1], self.patch_size, norm=self.norm)
        return terms

    def baseline(self, view: View) -> Output:
        (clips, sound), plan = view.parts, view.plan[1]
        values = self.patch_size[0] * self.patch_size[1]
        pred = (
            None if clips is None else view.target.mean((0, 1)).expand_as(view.target).contiguous(),
            None if sound is None else sound.new_zeros(plan.total_masked, values),
        )
        terms = self._score(pred, view)
        if len(terms) == 2:
            terms["contrast"] = sound.new_tensor(self.contrast * len(self.taps) * math.log(len(sound)))
        return Output(terms, pred, view)

    def encode(self, batch: AudioVisualBatch) -> Tensor:
        """Fused tokens, those of the clip, row-major over (time, rows, columns), before those of its sound: [B, N, D]."""
        parts, encoders = self._normalised(batch)[0], (self.encoder, self.encoder_audio)
        found = [encoder(part) for encoder, part in zip(encoders, parts) if part is not None]
        return torch.cat(self.fusion(*found), 1) if len(found) == 2 else found[0]

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.audiovisual import sheet

        pred, seen, heard = self.compute(view).pred, None, None
        if pred[0] is not None:
            clips = view.parts[0] * self.std + self.mean
            rows = frame_differences(pred[0], self.tubelet, self.frames, self.difference, back=True)
            seen = reconstruct(rows, clips, view.plan[0], self.tubelet, self.norm)
        if pred[1] is not None:
            heard = reconstruct(pred[1], view.parts[1], view.plan[1], self.patch_size, self.norm)
        how = "; masked patches have their true mean and variance" if self.norm != "none" else ""
        return sheet(seen, heard, names, f"{self.ratios[0]:.0%} and {self.ratios[1]:.0%} masked{how}")
