"""What the VideoMAE recipes share: clips in tubelets, a joint encoder, pixels as targets."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from maefast import ops
from maefast.data.clips import ClipBatch, Clips
from maefast.data.images.batch import normaliser
from maefast.names import Names
from maefast.nn import Decoder, Encoder, PatchEmbed, sincos_interleaved
from maefast.nn.patch_embed import pair, patch_grid, triple
from maefast.nn.patches import Reconstruction, reconstruct
from maefast.recipe import Picture, View
from maefast.recipes._autoencoder import Autoencoder

DEMO = {
    "model_args": {
        "frames": 8, "img_size": 48, "tubelet": [2, 8, 8], "stride": 1, "embed_dim": 128, "depth": 4,
        "num_heads": 4, "decoder_embed_dim": 64, "decoder_depth": 2, "decoder_num_heads": 2,
    },
    "mask_ratio": 0.75, "steps": 600, "batch_size": 16, "lr": 2e-3, "warmup": 0.1,
}  # fmt: skip


class ClipAutoencoder(Autoencoder):
    """Args:
        frames: T. img_size: int or (H, W). tubelet: (pt, ph, pw). stride: of the frames that a clip takes.
        mask_ratio: share of a frame's positions that is hidden, int(ratio * S) of them.
        norm_pix: targets are normalised, as above; otherwise they are pixels in [0, 1].
        embed_dim, depth, num_heads: of the encoder. decoder_*: of the decoder. mlp_ratio: of both.
        drop_path: of the encoder.

    Shapes: clips [B, 3, T, H, W] -> N = T / pt * S tokens; latents [B, visible, D]; pred [B, masked, 3 * pt * ph * pw].
    """

    names = Names(
        ("encoder_to_decoder.", "decoder.embed."),
        ("mask_token", "decoder.mask_token"),
        ("decoder.head.", "decoder.pred."),
    )

    def __init__(
        self,
        frames: int = 16,
        img_size: int | Sequence[int] = 224,
        tubelet: Sequence[int] = (2, 16, 16),
        stride: int = 4,
        mask_ratio: float = 0.9,
        norm_pix: bool = True,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 384,
        decoder_depth: int = 4,
        decoder_num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        size, self.tubelet = pair("img_size", img_size), triple("tubelet", tubelet)
        self.wants = Clips(frames, size, stride)
        self.grid = patch_grid((frames, *size), self.tubelet)
        self.mask_ratio, self.norm = mask_ratio, "videomae" if norm_pix else "none"
        tokens = self.grid[0] * self.grid[1] * self.grid[2]
        self.encoder = Encoder(
            PatchEmbed(self.tubelet, 3, embed_dim),
            sincos_interleaved(embed_dim, tokens),
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            prefix=0,
            bias="qv",
            drop_path=drop_path,
        )
        self.decoder = Decoder(
            embed_dim,
            3 * self.tubelet[0] * self.tubelet[1] * self.tubelet[2],
            sincos_interleaved(decoder_embed_dim, tokens),
            decoder_embed_dim,
            decoder_depth,
            decoder_num_heads,
            mlp_ratio,
            prefix=0,
            embed_bias=False,
            bias="qv",
        )
        mean, std = normaliser(3)
        self.register_buffer("mean", mean[..., None], persistent=False)
        self.register_buffer("std", std[..., None], persistent=False)

    def normalised(self, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """Clips as the encoder takes them, and the same in [0, 1], both [B, 3, T, H, W]."""
        self.wants.check(batch)
        clips = batch.clips.to(self.mean.dtype) / 255
        return (clips - self.mean) / self.std, clips

    def score(self, pred: Tensor, view: View) -> dict[str, Tensor]:
        return {"pixels": ops.patch_loss(pred, view.target, view.plan, self.tubelet, norm=self.norm)}

    def encode(self, batch: ClipBatch) -> Tensor:
        """[B, N, D], tokens row-major over (time, rows, columns)."""
        return self.encoder(self.normalised(batch)[0])

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.clips import sheet

        shown, caption = self.shown(view)
        return sheet(shown, names, caption)

    def shown(self, view: View) -> tuple[Reconstruction, str]:
        """Clips with what is predicted of them, and what must be known of the picture."""
        pred = self.compute(view).pred
        how = "; masked tubelets have their true mean and variance" if self.norm != "none" else ""
        shown = reconstruct(pred, view.target, view.plan, self.tubelet, self.norm, fill=0.5)
        return shown, f"{self.mask_ratio:.0%} masked{how}"
