"""Bird-MAE: spectrograms of bird sound, patches of which are hidden (Rauch et al., 2025, arXiv:2504.12880).

Five seconds at 32 kHz are log-mel filter banks of 128 filters, a frame every 10 ms, filled up to 512 frames; 16 x 16
patches of them are the 32 x 8 tokens of a plain MAE. With t a patch's 256 values,

    loss = mean over masked patches of (pred - (t - mean(t)) / sqrt(var(t) + 1e-6))^2
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maefast import masking, ops
from maefast.data.fbank import Fbank
from maefast.data.spectrograms import SpectrogramBatch, Spectrograms
from maefast.names import Names
from maefast.nn import Decoder, Encoder, PatchEmbed, position_table
from maefast.nn.patch_embed import pair, patch_grid
from maefast.nn.patches import reconstruct
from maefast.ops import _checks
from maefast.recipe import Draw, Picture, Progress, Spec, View
from maefast.recipes._autoencoder import Autoencoder
from maefast.recipes._sizes import ENCODERS


class BirdMAE(Autoencoder):
    """Args:
        frames: T. mels: filters. rate, seconds: of the clips; see `Spectrograms` for these and `padding`.
        patch_size: int or (frames, mels). mask_ratio: share of the patches that is hidden.
        norm_pix: targets are normalised, as above; otherwise they are the normalised spectrogram's values.
        mean, std: of log-mel values; the spectrogram is taken as (x - mean) / (2 std).
        positions: "grid", each token has the sine-cosine code of its frame and filter; "release": as in the authors'
            code, whose table is that of a grid of (mels, frames), read row by row for tokens that stand in rows of
            (frames, mels), so that neighbours in time are not neighbours in it.
        embed_dim, depth, num_heads: of the encoder. decoder_*: of the decoder. mlp_ratio: of both.

    Shapes: spectrograms [B, 1, T, mels] -> N tokens, row-major over (time, frequency); latents [B, 1 + visible, D],
    the class token first; pred [B, masked, values of a patch].
    """

    spec = Spec(
        name="bird_mae",
        title="Bird-MAE",
        paper="Rauch et al., 2025, arXiv:2504.12880",
        modality="audio",
        sizes={size: ENCODERS[size] for size in ("base", "large", "huge")},
        training={
            "blr": 1e-4, "weight_decay": 1e-4, "clip": 1.0, "epochs": 150, "warmup": 0.09375, "batch_size": 256,
        },
        demo={
            "model_args": {
                "frames": 128, "mels": 64, "patch_size": 8, "rate": 16000, "seconds": 1.28, "embed_dim": 128,
                "depth": 4, "num_heads": 4, "decoder_embed_dim": 64, "decoder_depth": 2, "decoder_num_heads": 2,
            },
            "steps": 400, "batch_size": 32, "lr": 2e-3, "warmup": 0.1, "weight_decay": 0.05,
        },
        baseline="predicting each patch's mean",
    )  # fmt: skip
    names = Names(
        ("decoder.decoder_embed.", "decoder.embed."),
        ("decoder.decoder_pos_embed", "decoder.pos_embed"),
        ("decoder.decoder_norm.", "decoder.norm."),
        ("decoder.decoder_pred.", "decoder.pred."),
    )

    def __init__(
        self,
        frames: int = 512,
        mels: int = 128,
        patch_size: int | Sequence[int] = 16,
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
        rate: int = 32000,
        seconds: float = 5.0,
        padding: str = "clip",
        mean: float = -7.2,
        std: float = 4.43,
        positions: str = "grid",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        _checks.one_of("positions", positions, ("grid", "release"))
        _checks.positive("std", std)
        self.patch_size = pair("patch_size", patch_size)
        self.wants = Spectrograms(frames, Fbank(rate, mels), seconds, padding)
        self.grid = patch_grid((frames, mels), self.patch_size)
        self.mask_ratio, self.norm = mask_ratio, "mae" if norm_pix else "none"
        table = self.grid if positions == "grid" else self.grid[::-1]
        self.encoder = Encoder(
            PatchEmbed(self.patch_size, 1, embed_dim),
            position_table("sincos", embed_dim, table),
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            grid_size=self.grid,
        )
        self.decoder = Decoder(
            embed_dim,
            self.patch_size[0] * self.patch_size[1],
            position_table("sincos", decoder_embed_dim, table),
            decoder_embed_dim,
            decoder_depth,
            decoder_num_heads,
            mlp_ratio,
        )
        self.register_buffer("mean", torch.tensor(float(mean)), persistent=False)
        self.register_buffer("scale", torch.tensor(2.0 * std), persistent=False)

    def prepare(self, batch: SpectrogramBatch, draw: Draw, progress: Progress) -> View:
        """parts: [B, 1, T, mels], normalised; plan: random patches are hidden."""
        parts = self._normalised(batch)
        tokens = self.grid[0] * self.grid[1]
        noise = draw.uniform("mask", tokens, parts.device)
        return View(parts, masking.random(len(parts), tokens, self.mask_ratio, noise=noise))

    def _normalised(self, batch: SpectrogramBatch) -> Tensor:
        self.wants.check(batch)
        return (batch.spectrograms.to(self.mean.dtype) - self.mean) / self.scale

    def score(self, pred: Tensor, view: View) -> dict[str, Tensor]:
        return {"patches": ops.patch_loss(pred, view.parts, view.plan, self.patch_size, norm=self.norm)}

    def encode(self, batch: SpectrogramBatch) -> Tensor:
        """[B, 1 + N, D], the class token first."""
        return self.encoder(self._normalised(batch))

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.spectrograms import sheet

        shown = reconstruct(self.compute(view).pred, view.parts, view.plan, self.patch_size, self.norm)
        how = "; masked patches have their true mean and variance" if self.norm != "none" else ""
        return sheet(shown, names, f"{self.mask_ratio:.0%} masked{how}")
