"""ViT-MAE: "Masked Autoencoders Are Scalable Vision Learners" (He et al., 2021), on maefast's ops.

Parameter names, mask draw, targets and loss are those of the original, so that its checkpoints load with
``strict=True`` and the same noise gives the same loss. What the loss does not need is not computed: masked patches are
never embedded, and the last decoder block runs queries, projection, MLP and head for masked tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maefast import masking, ops
from maefast.nn import Decoder, Encoder, run_decoder, run_encoder
from maefast.nn.decoder import PREDICTIONS
from maefast.nn.patch_embed import pair
from maefast.ops import TokenMask
from maefast.ops._checks import one_of, tensor

EPS = 1e-6  # of the target normalisation


class Reconstruction(NamedTuple):
    """Pictures [B, C, H, W] in the scale of the images that were given; `mask` is bool, True where removed."""

    original: Tensor
    masked: Tensor
    reconstruction: Tensor
    pasted: Tensor
    mask: Tensor


class MaskedAutoencoderViT(nn.Module):
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

        encoder = Encoder(
            self.img_size,
            self.patch_size,
            in_chans,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            positions,
            norm_eps,
        )
        self.grid_size = encoder.grid_size
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        decoder = Decoder(
            embed_dim,
            in_chans * self.patch_size[0] * self.patch_size[1],
            self.grid_size,
            decoder_embed_dim,
            decoder_depth,
            decoder_num_heads,
            mlp_ratio,
            positions,
            norm_eps,
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

        Returns:
            loss: scalar, mean over the pixels of removed patches; float32 (float64 in a float64 model).
            pred: "masked": [B, removed, K], or packed [M, K] where the samples differ in their number, in plan
                order; "full": [B, N, K] in place. K = ph * pw * C, in this order.
            mask: float [B, N], 1 where removed.

        Raises:
            TypeError, ValueError: wrong shape, dtype, device or ratio; a mask that removes nothing.
        """
        one_of("pred", pred, PREDICTIONS)
        plan = self.plan(images, mask_ratio, noise, mask)
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

    def plan(
        self,
        images: Tensor,
        mask_ratio: float | Sequence[float] = 0.75,
        noise: Tensor | None = None,
        mask: TokenMask | Tensor | None = None,
    ) -> TokenMask:
        """The TokenMask that `forward` would use; arguments as there."""
        self._check_images(images)
        batch = images.shape[0]
        if mask is None:
            if noise is not None:
                self._check_map("noise", noise, images)
            each = isinstance(mask_ratio, (list, tuple))
            if each and len(mask_ratio) != batch:
                raise ValueError(f"mask_ratio has {len(mask_ratio)} values for a batch of {batch}")
            # index(): torch.compile turns a ratio that changes into a symbol, but a count must stay a number.
            keep = [index(masking.keep_count(self.num_patches, r)) for r in (mask_ratio if each else [mask_ratio])]
            return masking.random(
                batch, self.num_patches, keep=keep if each else keep[0], noise=noise, device=images.device
            )
        if noise is not None:
            raise ValueError("give `noise` or `mask`, not both")
        if isinstance(mask, TokenMask):
            if (mask.batch, mask.num_tokens) != (batch, self.num_patches):
                raise ValueError(f"the images are {batch} samples of {self.num_patches} patches, but mask is {mask}")
            if mask.device != images.device:
                raise ValueError(f"mask is on {mask.device} but images are on {images.device}")
            return mask
        self._check_map("mask", mask, images)
        return TokenMask.from_bool(mask)

    def encode_visible(self, images: Tensor, plan: TokenMask | None = None, features: bool = False) -> Tensor:
        """Latents after the final norm: [B, 1 + keep, D], class token first; packed [B + T, D] for a ragged plan.

        Under autocast they come in its dtype; as `features`, in that of the residual stream.
        """
        return run_encoder(
            images,
            plan,
            patch_embed=self.patch_embed,
            cls_token=self.cls_token,
            pos_embed=self.pos_embed,
            blocks=self.blocks,
            norm=self.norm,
            recompute=self.recompute and self.training,
            features=features,
        )

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

    # --- use ------------------------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        """Features of whole images, nothing masked: [B, C, H, W] -> [B, 1 + N, D] after the final norm."""
        self._check_images(images)
        return self.encode_visible(images, features=True)

    @torch.no_grad()
    def reconstruct(
        self,
        images: Tensor,
        mask_ratio: float | Sequence[float] = 0.75,
        noise: Tensor | None = None,
        mask: TokenMask | Tensor | None = None,
        fill: float = 0.0,
    ) -> Reconstruction:
        """Pictures of what the model makes of masked images; arguments as in `forward`.

        Returns:
            Reconstruction: `original`; `masked` (removed pixels are `fill`, in the scale of the images);
            `reconstruction`, the model's picture of every patch; `pasted`, the original with the removed patches
            reconstructed; `mask`.

        A model trained with `norm_pix_loss` predicts normalised patches, which are put back with the mean and
        standard deviation of the true patch, so its pictures show texture, not how well brightness is guessed. Visible
        patches were never trained: their part of `reconstruction` is poor in every MAE. Look at `pasted`.
        """
        plan = self.plan(images, mask_ratio, noise, mask)
        out = self.decode(self.encode_visible(images, plan), plan, "full")
        out = out.to(torch.promote_types(images.dtype, torch.float32))
        if self.norm_pix_loss:
            target = self.patchify(images.to(out.dtype))
            out = out * (target.var(-1, keepdim=True) + EPS).sqrt() + target.mean(-1, keepdim=True)
        picture = self.unpatchify(out).to(images.dtype)
        removed = self.unpatchify(plan.mask[..., None].expand_as(out))
        return Reconstruction(
            original=images,
            masked=images.masked_fill(removed, fill),
            reconstruction=picture,
            pasted=torch.where(removed, picture, images),
            mask=removed,
        )

    def patchify(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, K], values of a patch in (ph, pw, C) order."""
        self._check_images(images)
        (rows, columns), (ph, pw) = self.grid_size, self.patch_size
        blocks = images.reshape(-1, self.in_chans, rows, ph, columns, pw)
        return blocks.permute(0, 2, 4, 3, 5, 1).reshape(-1, self.num_patches, ph * pw * self.in_chans)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """The inverse of `patchify`: [B, N, K] -> [B, C, H, W]."""
        (rows, columns), (ph, pw) = self.grid_size, self.patch_size
        want = (self.num_patches, ph * pw * self.in_chans)
        if patches.ndim != 3 or tuple(patches.shape[1:]) != want:
            raise ValueError(f"patches must be [B, {want[0]}, {want[1]}], got {tuple(patches.shape)}")
        blocks = patches.reshape(-1, rows, columns, ph, pw, self.in_chans)
        return blocks.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_chans, *self.img_size)

    def _check_images(self, images: Tensor) -> None:
        tensor("images", images, ndim=4)
        if tuple(images.shape[1:]) != (self.in_chans, *self.img_size) or images.shape[0] < 1:
            want = ", ".join(str(size) for size in (self.in_chans, *self.img_size))
            raise ValueError(f"this model takes images [B, {want}] with B >= 1, got {tuple(images.shape)}")

    def _check_map(self, name: str, value: Tensor, images: Tensor) -> None:
        """noise or mask: [B, N] beside the images."""
        tensor(name, value, floating=name == "noise")
        if name == "mask" and value.dtype is not torch.bool:
            raise TypeError(f"mask must be a bool tensor (True = removed) or a TokenMask, got {value.dtype}")
        want = (images.shape[0], self.num_patches)
        if tuple(value.shape) != want:
            raise ValueError(f"{name} must have shape {list(want)}, got {list(value.shape)}")
        if value.device != images.device:
            raise ValueError(f"{name} is on {value.device} but images are on {images.device}")
