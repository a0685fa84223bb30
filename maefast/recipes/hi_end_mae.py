"""Hi-End-MAE: volumes, patches of which are hidden, and a decoder that looks at the encoder layer by layer
(Tang et al., Medical Image Analysis 2025, arXiv:2502.08347).

Visible patches and a class token go through a ViT. Its latents and mask tokens pass two blocks of self-attention, then
blocks that also look at the states of three of its blocks, the deepest first. With t a patch's voxels and var their
biased variance,

    loss = mean over masked patches of (pred - (t - mean(t)) / sqrt(var(t) + 1e-6))^2
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from maefast import masking, ops
from maefast.data.volumes import VolumeBatch, Volumes
from maefast.names import Names
from maefast.nn import Encoder, HierarchicalDecoder, PatchEmbed, sincos_3d
from maefast.nn.patch_embed import cube, patch_grid
from maefast.nn.patches import reconstruct
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._autoencoder import Autoencoder

_BASE = {"embed_dim": 768, "num_heads": 12, "decoder_embed_dim": 384, "decoder_num_heads": 12}
_LARGE = {"embed_dim": 1536, "num_heads": 16, "decoder_embed_dim": 528, "decoder_num_heads": 16}


class HiEndMAE(Autoencoder):
    """Args:
        img_size: int or (D, H, W). patch_size: int or (pd, ph, pw). channels: C.
        window: values that become 0 and 1, in Hounsfield units; None: each volume is standardised. foreground, turn,
            jitter: of the crops, see `maefast.data.volumes.Volumes`.
        mask_ratio: share of the patches that is hidden; int(N * (1 - ratio)) stay.
        norm_pix: targets are normalised, as above; otherwise they are voxels as they are taken.
        states: blocks of the encoder, from 0 and rising, whose outputs the decoder looks at.
        embed_dim, depth, num_heads: of the encoder. decoder_*: of the decoder, whose depth counts the blocks in front
            of those that look at states. mlp_ratio: of both. Widths are multiples of 6.

    Shapes: volumes [B, C, D, H, W] -> N patches, row-major; latents [B, 1 + visible, width], the class token first;
    pred [B, masked, pd * ph * pw * C].
    """

    spec = Spec(
        name="hi_end_mae",
        title="Hi-End-MAE",
        paper="Tang et al., Medical Image Analysis 2025, arXiv:2502.08347",
        modality="volumes",
        sizes={
            "base16": {"patch_size": 16, **_BASE},
            "large16": {"patch_size": 16, **_LARGE},
            "large12": {"patch_size": 12, **_LARGE},
        },
        training={"lr": 1e-4, "warmup": 0.01, "epochs": 1000, "batch_size": 24, "flip": 0.5},
        demo={
            "model_args": {
                "img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 6, "states": [0, 1, 2],
                "decoder_embed_dim": 48, "decoder_depth": 1, "decoder_num_heads": 6,
            },
            "steps": 200, "batch_size": 12, "lr": 2e-3, "warmup": 0.1, "picture_rows": 4,
        },
        baseline="predicting each patch's mean",
    )  # fmt: skip
    names = Names(
        ("encoder_to_decoder.", "decoder.embed."),
        ("mask_token", "decoder.mask_token"),
        ("decoder.cross_attention_blocks.", "decoder.cross_blocks."),
        ("decoder.head.", "decoder.pred."),
        unused=("encoder_pos_embed", "decoder_pos_embed"),
    )

    def __init__(
        self,
        img_size: int | Sequence[int] = 96,
        patch_size: int | Sequence[int] = 16,
        channels: int = 1,
        window: Sequence[float] | None = (-175.0, 250.0),
        foreground: float = 0.75,
        turn: float = 0.3,
        jitter: Sequence[float] = (0.1, 0.1),
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
        states: Sequence[int] = (3, 6, 9),
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 384,
        decoder_depth: int = 2,
        decoder_num_heads: int = 12,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        size, self.patch_size = cube("img_size", img_size), cube("patch_size", patch_size)
        window = None if window is None else tuple(window)
        self.wants = Volumes(channels, size, window, foreground, turn, tuple(jitter))
        self.grid, self.states = patch_grid(size, self.patch_size), tuple(states)
        if sorted({*self.states}) != [*self.states] or not all(0 <= at < depth for at in self.states):
            raise ValueError(f"states must name blocks of the encoder below {depth}, from 0 and rising, got {states}")
        self.mask_ratio, self.norm = mask_ratio, "layernorm" if norm_pix else "none"
        self.encoder = Encoder(
            PatchEmbed(self.patch_size, channels, embed_dim),
            sincos_3d(embed_dim, self.grid, prefix=1),
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
        )
        self.decoder = HierarchicalDecoder(
            embed_dim,
            channels * prod(self.patch_size),
            sincos_3d(decoder_embed_dim, self.grid, prefix=1),
            len(self.states),
            decoder_embed_dim,
            decoder_depth,
            decoder_num_heads,
            mlp_ratio,
        )

    def prepare(self, batch: VolumeBatch, draw: Draw, progress: Progress) -> View:
        """parts: [B, C, D, H, W]; plan: random patches are hidden."""
        parts, tokens = self._volumes(batch), prod(self.grid)
        noise = draw.uniform("mask", tokens, parts.device)
        return View(parts, masking.random(len(parts), tokens, self.mask_ratio, noise=noise))

    def _volumes(self, batch: VolumeBatch) -> Tensor:
        self.wants.check(batch)
        return batch.volumes.to(self.decoder.mask_token.dtype)

    def compute(self, view: View) -> Output:
        taps = dict.fromkeys(self.states)
        latent = self.encoder(view.parts, view.plan, taps, features=False)
        pred = self.decoder(latent, view.plan, list(taps.values()))
        return Output(self.score(pred, view), pred, view)

    def score(self, pred: Tensor, view: View) -> dict[str, Tensor]:
        return {"voxels": ops.patch_loss(pred, view.parts, view.plan, self.patch_size, norm=self.norm)}

    def encode(self, batch: VolumeBatch) -> Tensor:
        """[B, 1 + N, width], the class token first."""
        return self.encoder(self._volumes(batch))

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.volumes import sheet

        shown = reconstruct(self.compute(view).pred, view.parts, view.plan, self.patch_size, self.norm)
        how = "; masked patches have their true mean and variance" if self.norm != "none" else ""
        return sheet(shown, names, f"{self.mask_ratio:.0%} masked{how}")
