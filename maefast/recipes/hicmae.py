"""HiCMAE: clips and their sound, whose encoders' latents look at each other before they are decoded (Sun et al., 2024,
arXiv:2401.05698).

Tubes of the clip and patches of its spectrogram are hidden. The encoders' latents are fused by cross-attention, and
each decoder also looks at states of its own encoder, the deepest first. In the middle of the encoders what is seen and
what is heard must find each other. With v and a the hidden tubelets and patches, normalised, the second frame of each
pair less the first, and V_l and A_l the means of the visible tokens' states after block l,

    loss = mean (pred_v - v)^2 + mean (pred_a - a)^2 + 0.0025 * sum over l of InfoNCE(V_l, A_l)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, prod

import torch
from torch import Tensor

from maefast import ops
from maefast.data.audiovisual import AudioVisualBatch
from maefast.data.clips import Clips
from maefast.data.fbank import Fbank
from maefast.data.spectrograms import Spectrograms
from maefast.names import Names
from maefast.nn import CrossDecoder, CrossFusion, Encoder, PatchEmbed, sincos_interleaved
from maefast.nn.contrast import info_nce
from maefast.nn.patch_embed import pair
from maefast.nn.patches import frame_differences, patchify, statistics
from maefast.ops import _checks
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._audiovisual import AudioVisualRecipe
from maefast.recipes._images import mean_feature
from maefast.recipes._sizes import check_visible


class HiCMAE(AudioVisualRecipe):
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
                "frames": 4, "img_size": 48, "tubelet": [2, 8, 8], "stride": 1, "mask_ratio": 0.7,
                "sound_mask_ratio": 0.6, "sound_frames": 64, "mels": 32, "patch_size": 8, "seconds": 0.655,
                "roll": False, "contrast": 0.02, "taps": [1], "embed_dim": 64, "depth": 2, "num_heads": 2,
                "fusion_depth": 1, "decoder_embed_dim": 48, "decoder_num_heads": 2,
            },
            "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "steps": 250, "batch_size": 16, "lr": 2e-3,
            "warmup": 0.1, "picture_rows": 3,
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
        sound = Spectrograms(sound_frames, Fbank(rate, mels), seconds, roll=roll)
        super().__init__(
            Clips(frames, pair("img_size", img_size), stride), tubelet, sound, patch_size,
            (mask_ratio, sound_mask_ratio), mean, std, norm_pix,
        )  # fmt: skip
        _checks.positive("temperature", temperature)
        if list(taps) != sorted(set(taps)) or not all(0 <= tap < depth for tap in taps):
            raise ValueError(f"taps must rise and name some of {depth} blocks, from 0, got {list(taps)}")
        if difference < 1 or frames % difference:
            raise ValueError(f"difference must divide the {frames} frames of a clip, got {difference}")
        check_visible("mask_ratio", mask_ratio, prod(self.grid[1:]), "complement")
        check_visible("sound_mask_ratio", sound_mask_ratio, prod(self.sound_grid), "complement")
        self.taps, self.groups = tuple(taps), (self.tubelet, frames, difference)
        self.contrast, self.temperature = contrast, temperature
        for name, patch, channels, tokens in (
            ("", self.tubelet, 3, prod(self.grid)), ("_audio", self.patch_size, 1, prod(self.sound_grid)),
        ):  # fmt: skip
            encoder = Encoder(
                PatchEmbed(patch, channels, embed_dim), sincos_interleaved(embed_dim, tokens), embed_dim, depth,
                num_heads, mlp_ratio, prefix=0, bias="qv",
            )  # fmt: skip
            decoder = CrossDecoder(
                embed_dim, channels * prod(patch), sincos_interleaved(decoder_embed_dim, tokens), decoder_embed_dim,
                1 + len(taps), decoder_num_heads, mlp_ratio, embed_bias=False, bias="qv",
            )  # fmt: skip
            self.add_module(f"encoder{name}", encoder)
            self.add_module(f"decoder{name}", decoder)
        self.fusion = CrossFusion((embed_dim, embed_dim), fusion_depth, num_heads, mlp_ratio, bias="qv")

    def prepare(self, batch: AudioVisualBatch, draw: Draw, progress: Progress) -> View:
        """parts: normalised clips and spectrograms; plan: of tubes, and of random patches; target: see above."""
        (parts, clips), target = self.normalised(batch), None
        plan = self.plans(parts, draw)
        if clips is not None:
            hidden = ops.gather_tokens(patchify(clips, self.tubelet), plan[0], "masked")
            shift, scale = statistics(hidden, self.norm, 3)
            target = frame_differences((hidden - shift) / scale, *self.groups)
        return View(parts, plan, target)

    def compute(self, view: View) -> Output:
        encoders, decoders = (self.encoder, self.encoder_audio), (self.decoder, self.decoder_audio)
        latents, states = zip(*(
            (None, []) if parts is None else encoder.tapped(parts, plan, self.taps)
            for encoder, parts, plan in zip(encoders, view.parts, view.plan)
        ))  # fmt: skip
        contrast = {}
        if None not in view.parts:
            found = [info_nce(one.mean(1), other.mean(1), self.temperature) for one, other in zip(*states)]
            contrast = {"contrast": self.contrast * sum(found, latents[0].new_zeros(()))}
            latents = self.fusion(*latents)
        pred = tuple(
            None if latent is None else decoder(latent, plan, stream)
            for decoder, latent, plan, stream in zip(decoders, latents, view.plan, states)
        )
        return Output({**self.score(pred, view), **contrast}, pred, view)

    def baseline(self, view: View) -> Output:
        (clips, sound), plan, values = view.parts, view.plan[1], prod(self.patch_size)
        pred = (
            None if clips is None else mean_feature(view.target),
            None if sound is None else sound.new_zeros(plan.total_masked, values),
        )
        terms = self.score(pred, view)
        if len(terms) == 2:
            terms["contrast"] = sound.new_tensor(self.contrast * len(self.taps) * log(len(sound)))
        return Output(terms, pred, view)

    def encode(self, batch: AudioVisualBatch) -> Tensor:
        """Fused tokens: the clip's, row-major over (time, rows, columns), before those of its sound: [B, N, D]."""
        parts, encoders = self.normalised(batch)[0], (self.encoder, self.encoder_audio)
        found = [encoder(part) for encoder, part in zip(encoders, parts) if part is not None]
        return torch.cat(self.fusion(*found), 1) if len(found) == 2 else found[0]

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        clips, sound = self.compute(view).pred
        clips = None if clips is None else frame_differences(clips, *self.groups, back=True)
        return self.pictures((clips, sound), view, names)
