"""CRATE-MAE: a masked autoencoder of white-box blocks (Pai et al., ICLR 2024, arXiv:2404.02446).

Mask tokens stand in for hidden patches in front of the encoder, so encoder and decoder see all positions. With LN a
LayerNorm, MSSA attention whose queries, keys and values are one projection, and D, A square matrices, a block of the
encoder and one of the decoder are

    h = z + MSSA(LN(z)),  u = LN(h),  z' = relu(u + step * D^T (u - D u) - step * threshold)
    y = A LN(z),                      z' = y - MSSA(LN(y))

and the loss is MAE's: with t a patch's pixels, or these normalised, the mean over hidden patches of (pred - t)^2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.data.images.batch import ImageBatch
from maefast.names import Names
from maefast.nn import LayerNorm, Linear, PatchEmbed, position_table
from maefast.nn.init import init_tokens_, init_weights_
from maefast.nn.patch_embed import pair, patch_grid
from maefast.nn.patches import reconstruct
from maefast.nn.white_box import CompressBlock, ExpandBlock
from maefast.ops import TokenMask
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._images import ImageRecipe, mean_colour


class CrateMAE(ImageRecipe):
    """Args:
        img_size, patch_size: int or (height, width).
        mask_ratio: int(N * (1 - ratio)) patches stay visible.
        norm_pix: targets normalised patch by patch; off in the authors' code.
        embed_dim, num_heads: of all blocks. depth, decoder_depth: blocks of the encoder and of the decoder.
        step, threshold: eta and lambda of the encoder's blocks, see `maefast.nn.ISTA`.

    Shapes: images [B, 3, H, W]; latents [B, 1 + N, D]; pred [B, hidden, 3 * p * p].
    """

    spec = Spec(
        name="crate_mae",
        title="CRATE-MAE",
        paper="Pai et al., ICLR 2024, arXiv:2404.02446",
        modality="images",
        sizes={
            "base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "decoder_depth": 12},
            "tiny": {"embed_dim": 384, "depth": 12, "num_heads": 6, "decoder_depth": 12},
            "small": {"embed_dim": 576, "depth": 12, "num_heads": 12, "decoder_depth": 12},
            "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "decoder_depth": 24},
        },
        demo={
            "model_args": {"embed_dim": 128, "depth": 3, "num_heads": 4, "decoder_depth": 3},
            "img_size": 64, "patch_size": 8, "steps": 300, "batch_size": 32, "lr": 3e-3, "warmup": 0.1,
        },
        baseline="the mean colour",
    )  # fmt: skip
    lead = 1

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        mask_ratio: float = 0.75,
        norm_pix: bool = False,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_depth: int = 12,
        step: float = 0.1,
        threshold: float = 0.5,
    ) -> None:
        size, patch = pair("img_size", img_size), pair("patch_size", patch_size)
        super().__init__(3, size)
        self.patch, grid = patch, patch_grid(size, patch)
        self.patches, self.mask_ratio, self.target_norm = grid[0] * grid[1], mask_ratio, "mae" if norm_pix else "none"
        self.patch_embed = PatchEmbed(patch, 3, embed_dim)
        self.cls_token, self.mask_token = (nn.Parameter(torch.empty(1, 1, embed_dim)) for _ in range(2))
        self.pos_embed = position_table("sincos", embed_dim, grid)
        self.blocks = nn.ModuleList(CompressBlock(embed_dim, num_heads, step, threshold) for _ in range(depth))
        self.norm = LayerNorm(embed_dim, eps=1e-6)
        self.decoder_blocks = nn.ModuleList(ExpandBlock(embed_dim, num_heads) for _ in range(decoder_depth))
        self.decoder_norm = LayerNorm(embed_dim, eps=1e-6)
        self.decoder_pred = Linear(embed_dim, 3 * patch[0] * patch[1])
        init_tokens_(self.cls_token, self.mask_token)
        init_weights_(self.decoder_pred)
        self.names = public_names(depth, decoder_depth)

    def prepare(self, batch: ImageBatch, draw: Draw, progress: Progress) -> View:
        """parts: float32 [B, C, H, W], normalised; plan: a TokenMask."""
        images = self.images(batch)
        return View(images, self.plan(images, draw, self.patches, self.mask_ratio))

    def latents(self, images: Tensor, plan: TokenMask | None = None) -> Tensor:
        """[B, 1 + N, D] in place, class token first; without a plan, no patch is hidden."""
        if plan is None:
            lead, pos = self.pos_embed.split([1, self.patches], 1)
            x = self.patch_embed(images, pos=pos, prefix=self.cls_token + lead)
        else:
            x = self.patch_embed(images, plan, prefix=self.cls_token)
            x = ops.restore_tokens(x, plan, self.mask_token, pos=self.pos_embed, prefix=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x, dtype=x.dtype)

    def predict(self, latents: Tensor, plan: TokenMask | None = None) -> Tensor:
        """Predictions of hidden patches in plan order, [B, hidden, K] or packed [M, K]; of all without one."""
        x = latents
        for block in self.decoder_blocks:
            x = block(x)
        x = x[:, 1:] if plan is None else ops.gather_tokens(x, plan, "masked", prefix=1, keep_prefix=False)
        return self.decoder_pred(self.decoder_norm(x))

    def compute(self, view: View) -> Output:
        return self._scored(self.predict(self.latents(view.parts, view.plan), view.plan), view)

    def _scored(self, pred: Tensor, view: View) -> Output:
        loss = ops.patch_loss(pred, view.parts, view.plan, self.patch, norm=self.target_norm)
        return Output({"pixels": loss}, pred, view)

    def baseline(self, view: View) -> Output:
        pred = mean_colour(view.parts, self.patch, view.plan.total_masked)
        return self._scored(pred * (self.target_norm == "none"), view)

    def encode(self, batch: ImageBatch) -> Tensor:
        """[B, 1 + N, D], class token first."""
        return self.latents(self.images(batch))

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images import pictures

        shown = reconstruct(self.compute(view).pred, view.parts, view.plan, self.patch, self.target_norm)
        columns = pictures.four_columns(shown, self.mean, self.std)
        return pictures.Sheet(columns, names, f"{self.mask_ratio:.0%} masked")


def public_names(depth: int, decoder_depth: int) -> Names:
    """The authors'. Their files hold two equal tables of positions, of which the decoder's is used, in front of the
    encoder, and a map between widths that is not used."""
    pairs = [("decoder_pos_embed", "pos_embed")]
    attention = (("qkv.", "subspaces."), ("to_out.0.", "proj."))
    for blocks, count, attn, other in (
        ("blocks", depth, 0, "ista"),
        ("decoder_blocks", decoder_depth, 1, "dictionary"),
    ):
        for theirs, ours in ((f"{blocks}.{i}.layers.0", f"{blocks}.{i}") for i in range(count)):
            pairs += [(f"{theirs}.{j}.norm.", f"{ours}.norm{j + 1}.") for j in range(2)]
            pairs += [(f"{theirs}.{attn}.fn.{public}", f"{ours}.attn.{own}") for public, own in attention]
            pairs.append((f"{theirs}.{1 - attn}.fn.weight", f"{ours}.{other}.weight"))
    return Names(*pairs, unused=("pos_embed", "decoder_embed."))
