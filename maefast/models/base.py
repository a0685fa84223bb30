"""What masked autoencoders of images have in common: the mask, patches, and pictures of what they predict."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor, nn

from maefast import masking
from maefast.masking.counts import listed
from maefast.nn import patches
from maefast.nn.patches import Reconstruction
from maefast.ops import TokenMask
from maefast.ops._checks import tensor


class MaskedAutoencoder(nn.Module):
    """Base of the models. A subclass sets the attributes below, and defines `forward` and `predict`.

    Attributes:
        img_size, patch_size: (height, width); a patch is what is masked. in_chans: C.
        grid_size: (rows, columns) of patches. num_patches: N.
        norm_pix_loss: targets are normalised patch by patch, (t - mean) / sqrt(unbiased_var + 1e-6).
        keep_rule: how a mask ratio becomes a count, see `maefast.masking.keep_count`.
        usual_mask_ratio: that of the paper. no_decay: starts of the names of parameters that its recipe leaves without
            weight decay, besides vectors and biases.
    """

    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    grid_size: tuple[int, int]
    in_chans: int
    num_patches: int
    norm_pix_loss: bool
    keep_rule = "floor"
    usual_mask_ratio = 0.75
    no_decay: tuple[str, ...] = ()

    def predict(self, images: Tensor, plan: TokenMask) -> Tensor:
        """Predictions of all patches, [B, N, K] in (ph, pw, C) order; those of visible patches were never trained."""
        raise NotImplementedError

    def plan(
        self,
        images: Tensor,
        mask_ratio: float | Sequence[float] | Tensor = 0.75,
        noise: Tensor | None = None,
        mask: TokenMask | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenMask:
        """The TokenMask that `forward` would use; arguments as there."""
        self._check_images(images)
        batch = images.shape[0]
        if mask is None:
            if noise is not None:
                self._check_map("noise", noise, images)
            mask_ratio = listed(mask_ratio)
            each = isinstance(mask_ratio, (list, tuple))
            if each and len(mask_ratio) != batch:
                raise ValueError(f"mask_ratio has {len(mask_ratio)} values for a batch of {batch}")
            # index(): torch.compile turns a ratio that changes into a symbol, but a count must stay a number.
            keep = [
                index(masking.keep_count(self.num_patches, r, self.keep_rule))
                for r in (mask_ratio if each else [mask_ratio])
            ]
            return masking.random(
                batch,
                self.num_patches,
                keep=keep if each else keep[0],
                noise=noise,
                generator=generator,
                device=images.device,
            )
        if noise is not None or generator is not None:
            raise ValueError(f"give `{'generator' if noise is None else 'noise'}` or `mask`, not both")
        if isinstance(mask, TokenMask):
            if (mask.batch, mask.num_tokens) != (batch, self.num_patches):
                raise ValueError(f"the images are {batch} samples of {self.num_patches} patches, but mask is {mask}")
            if mask.device != images.device:
                raise ValueError(f"mask is on {mask.device} but images are on {images.device}")
            return mask
        self._check_map("mask", mask, images)
        return TokenMask.from_bool(mask)

    @torch.no_grad()
    def reconstruct(
        self,
        images: Tensor,
        mask_ratio: float | Sequence[float] = 0.75,
        noise: Tensor | None = None,
        mask: TokenMask | Tensor | None = None,
        fill: float = 0.0,
        raw: bool = False,
    ) -> Reconstruction:
        """Pictures of what the model makes of masked images; arguments as in `forward`.

        Returns:
            Reconstruction: `original`; `masked` (removed pixels are `fill`, in the scale of the images);
            `reconstruction`, the model's picture of every patch; `pasted`, the original with the removed patches
            reconstructed; `mask`.

        A model trained with `norm_pix_loss` predicts normalised patches, which are put back with the mean and
        standard deviation of the true patch, so its pictures show texture, not how well brightness is guessed: even an
        untrained model's resemble the truth. With `raw` the predictions are the picture as they are, mean zero and
        variance one, which uses nothing of the hidden pixels. Visible patches were never trained: their part of
        `reconstruction` is poor in every MAE. Look at `pasted`.
        """
        plan = self.plan(images, mask_ratio, noise, mask)
        out = self.predict(images, plan)
        out = out.to(torch.promote_types(images.dtype, torch.float32))
        if self.norm_pix_loss and not raw:
            shift, scale = patches.statistics(self.patchify(images.to(out.dtype)), "mae", self.in_chans)
            out = out * scale + shift
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
        return patches.patchify(images, self.patch_size)

    def unpatchify(self, rows: Tensor) -> Tensor:
        """The inverse of `patchify`: [B, N, K] -> [B, C, H, W]."""
        want = (self.num_patches, self.patch_size[0] * self.patch_size[1] * self.in_chans)
        if rows.ndim != 3 or tuple(rows.shape[1:]) != want:
            raise ValueError(f"patches must be [B, {want[0]}, {want[1]}], got {tuple(rows.shape)}")
        return patches.unpatchify(rows, self.patch_size, self.img_size)

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
