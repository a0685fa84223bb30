"""ViT-MAE: "Masked Autoencoders Are Scalable Vision Learners" (He et al., 2021), on maefast's ops.

Parameter names, mask draw, targets and loss are those of the original, so that its checkpoints load with
``strict=True`` and the same noise gives the same loss. What the loss does not need is not computed: masked patches are
never embedded, and the last decoder block runs queries, projection, MLP and head for masked tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maefast import ops
from maefast.models.base import MaskedAutoencoder
from maefast.nn import Decoder, Encoder, PatchEmbed, encoder_states, position_table, run_decoder, run_encoder
from maefast.nn.decoder import PREDICTIONS, decoder_states
from maefast.nn.patch_embed import pair, patch_grid
from maefast.ops import TokenMask
from maefast.ops._checks import one_of


class MaskedAutoencoderViT(MaskedAutoencoder):
    """A masked autoencoder with a ViT encoder and a light transformer decoder.

    Args:
        img_size, patch_size: int or (height, width). in_chans: any number of channels C.
        embed_dim, depth, num_heads: of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder. mlp_ratio: of both.
        norm_pix_loss: targets are normalised patch by patch, (t - mean) / sqrt(unbiased_var + 1e-6).
        positions: "sincos" (frozen, the original's) or "learned", in both halves.
        norm_eps: of every LayerNorm.
        name: recorded in `config`.

    Attributes:
        config: plain dict, can be written as JSON; ``maefast.models.create(**model.config)`` rebuilds the model.
        num_patches: N. grid_size: (rows, columns). recompute: set True to trade time for memory in training:
            activations inside the blocks are computed again in the backward (not in the last decoder block).
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
        positions: str = "sincos",
        norm_eps: float = 1e-6,
        name: str = "mae",
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = pair("img_size", img_size), pair("patch_size", patch_size)
        self.in_chans, self.norm_pix_loss = in_chans, bool(norm_pix_loss)
        self.recompute = False
        self.config = {
            "name": name,
            "img_size": list(self.img_size),
            "patch_size": list(self.patch_size),
            "in_chans": in_chans,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "decoder_embed_dim": decoder_embed_dim,
            "decoder_depth": decoder_depth,
            "decoder_num_heads": decoder_num_heads,
            "mlp_ratio": mlp_ratio,
            "norm_pix_loss": self.norm_pix_loss,
            "positions": positions,
            "norm_eps": norm_eps,
        }
        for key in ("in_chans", "embed_dim", "depth", "decoder_embed_dim", "decoder_depth"):
            value = self.config[key]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{key} must be a positive int, got {value!r}")

        self.grid_size = patch_grid(self.img_size, self.patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        encoder = Encoder(
            PatchEmbed(self.patch_size, in_chans, embed_dim),
            position_table(positions, embed_dim, self.grid_size),
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            norm_eps=norm_eps,
        )
        decoder = Decoder(
            embed_dim,
            in_chans * self.patch_size[0] * self.patch_size[1],
            position_table(positions, decoder_embed_dim, self.grid_size),
            decoder_embed_dim,
            decoder_depth,
            decoder_num_heads,
            mlp_ratio,
            norm_eps=norm_eps,
        )
        # The original's parameter names are flat: take the parts over, in its order.
        self.cls_token, self.pos_embed = encoder.cls_token, encoder.pos_embed
        self.mask_token, self.decoder_pos_embed = decoder.mask_token, decoder.pos_embed
        self.patch_embed, self.blocks, self.norm = encoder.patch_embed, encoder.blocks, encoder.norm
        self.decoder_embed, self.decoder_blocks = decoder.embed, decoder.blocks
        self.decoder_norm, self.decoder_pred = decoder.norm, decoder.pred

    # --- training -------------------------------------------------------------------------------------------

    def forward(
        self,
        images: Tensor,
        mask_ratio: float | Sequence[float] = 0.75,
        noise: Tensor | None = None,
        mask: TokenMask | Tensor | None = None,
        pred: str = "masked",
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, reconstruct, score.

        Args:
            images: [B, C, H, W] in the dtype of the weights (any floating dtype under autocast).
            mask_ratio: share of patches removed, int(N * (1 - ratio)) stay; one number, or one for each sample.
            noise: [B, N], the patches with the lowest values stay; None draws ``torch.rand(B, N, device=...)``, as
                the original does.
            mask: use this mask and draw nothing (`mask_ratio` is ignored): a TokenMask, or bool [B, N], True =
                removed.
            pred: "masked" predicts masked patches only; "full" predicts all of them, which costs more.
            generator: of the images' device, what `noise` is drawn from instead of the default one.

        Returns:
            loss: scalar, mean over the pixels of removed patches; float32 (float64 in a float64 model).
            pred: "masked": [B, removed, K], or packed [M, K] where the samples differ in their number, in plan
                order; "full": [B, N, K] in place. K = ph * pw * C, in this order.
            mask: float [B, N], 1 where removed.

        Raises:
            TypeError, ValueError: wrong shape, dtype, device or ratio; a mask that removes nothing.
        """
        one_of("pred", pred, PREDICTIONS)
        plan = self.plan(images, mask_ratio, noise, mask, generator)
        if plan.total_masked == 0:
            raise ValueError("the mask removes no patch, so there is no loss; use encode() for whole images")
        out = self.decode(self.encode_visible(images, plan), plan, pred)
        loss = ops.patch_loss(
            out,
            images,
            plan,
            self.patch_size,
            norm="mae" if self.norm_pix_loss else "none",
            rows="masked" if pred == "masked" else "all",
        )
        return loss, out, plan.mask.float()

    def encode_visible(
        self,
        images: Tensor,
        plan: TokenMask | None = None,
        features: bool = False,
        taps: dict[int, Tensor | None] | None = None,
    ) -> Tensor:
        """Latents after the final norm: [B, 1 + keep, D], class token first; packed [B + T, D] for a ragged plan.

        Under autocast they come in its dtype; as `features`, in that of the residual stream. The outputs of the blocks
        whose indices are keys of `taps` are written there.
        """
        return run_encoder(
            images,
            plan,
            **self._encoder(),
            norm=self.norm,
            recompute=self.recompute and self.training,
            features=features,
            taps=taps,
        )

    def states(self, images: Tensor, plan: TokenMask | None = None, at: Sequence[int] = (-1,)) -> list[Tensor]:
        """Outputs of the encoder's blocks `at` (from 0; negative numbers count from the last), before the final norm
        and laid out as the latents; no block behind the last of them is run."""
        return encoder_states(images, plan, [i % len(self.blocks) for i in at], **self._encoder())

    def _encoder(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("patch_embed", "cls_token", "pos_embed", "blocks")}

    def decode(self, latent: Tensor, plan: TokenMask, pred: str = "masked") -> Tensor:
        """Predictions from `encode_visible`'s latents: see `forward`."""
        return run_decoder(
            latent,
            plan,
            embed=self.decoder_embed,
            mask_token=self.mask_token,
            pos_embed=self.decoder_pos_embed,
            blocks=self.decoder_blocks,
            norm=self.decoder_norm,
            pred=self.decoder_pred,
            which=pred,
            recompute=self.recompute and self.training,
        )

    def decoder_states(self, latent: Tensor, plan: TokenMask, at: Sequence[int] = (-1,)) -> list[Tensor]:
        """Outputs of the decoder's blocks `at` from `encode_visible`'s latents, [B, 1 + N, D] each: see
        `maefast.nn.decoder.decoder_states`; negative numbers count from the last."""
        return decoder_states(
            latent,
            plan,
            [i % len(self.decoder_blocks) for i in at],
            embed=self.decoder_embed,
            mask_token=self.mask_token,
            pos_embed=self.decoder_pos_embed,
            blocks=self.decoder_blocks,
        )

    # --- use ------------------------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        """Features of whole images, nothing masked: [B, C, H, W] -> [B, 1 + N, D] after the final norm."""
        self._check_images(images)
        return self.encode_visible(images, features=True)

    def predict(self, images: Tensor, plan: TokenMask) -> Tensor:
        return self.decode(self.encode_visible(images, plan), plan, "full")
