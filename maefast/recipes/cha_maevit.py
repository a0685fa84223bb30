"""ChA-MAEViT: images of many channels, patches and whole channels of which are hidden (Pham et al., NeurIPS 2025,
arXiv:2503.19331). The self-supervised part.

A token is a patch of one channel: all channels share one embedding, and each has a learned token that is added to its
patches beside their positions. Memory tokens stand beside the class token. Of each sample either patches are hidden, in
each channel by itself, or whole channels, so that they must be found from the others. With t a hidden patch, normalised
by its own mean and variance, and F its two-dimensional spectrum,

    loss = (1 - spectrum) * mean (pred - t)^2 + spectrum * mean | |F(pred)| - |F(t)| |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maefast import masking, ops
from maefast.data.channels import ChannelBatch, Channels
from maefast.nn import LayerNorm, Linear, PatchEmbed, run_decoder, run_encoder
from maefast.nn.encoder import make_blocks
from maefast.nn.init import init_tokens_, init_weights_
from maefast.nn.patch_embed import pair, patch_grid
from maefast.nn.patches import patchify, reconstruct, statistics
from maefast.ops import TokenMask
from maefast.recipe import Draw, Output, Picture, Progress, Recipe, Spec, View


class ChAMAEViT(Recipe):
    """Args:
        channels: C. img_size, patch_size: int or (height, width).
        mask_ratio: int((1 - ratio) * P) of the P patches of a channel stay visible where patches are hidden.
        patches_only, channels_only: shares of the samples of which patches, or whole channels, are hidden; of the rest
            both. At least one channel of a sample stays, and at least one is hidden where channels are.
        memory: tokens beside the class token. spectrum: weight of the spectral term.
        embed_dim, depth, num_heads: of the encoder. decoder_depth, decoder_num_heads: of the decoder, as wide.

    Shapes: images [B, C, H, W] -> C * P tokens, channel by channel; pred [B, hidden, p * p], packed where samples
    differ.
    """

    spec = Spec(
        name="cha_maevit",
        title="ChA-MAEViT, its self-supervised part",
        paper="Pham et al., NeurIPS 2025, arXiv:2503.19331",
        modality="images of many channels",
        sizes={"small": {}},
        training={"lr": 4e-4, "clip": 1.0, "graph": "off"},  # the numbers of tokens change from step to step
        demo={
            "model_args": {"channels": 5, "embed_dim": 96, "depth": 3, "num_heads": 3, "decoder_num_heads": 3},
            "img_size": 32, "patch_size": 8, "steps": 700, "batch_size": 16, "lr": 2e-3, "warmup": 0.1,
            "picture_rows": 4,
        },
        baseline="each patch's mean",
    )  # fmt: skip

    def __init__(
        self,
        channels: int = 8,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        mask_ratio: float = 0.75,
        patches_only: float = 0.5,
        channels_only: float = 0.5,
        memory: int = 4,
        spectrum: float = 0.01,
        embed_dim: int = 384,
        depth: int = 11,
        num_heads: int = 6,
        decoder_depth: int = 1,
        decoder_num_heads: int = 16,
    ) -> None:
        super().__init__()
        size, patch = pair("img_size", img_size), pair("patch_size", patch_size)
        if min(patches_only, channels_only) < 0 or patches_only + channels_only > 1:
            raise ValueError(f"patches_only {patches_only} and channels_only {channels_only} must be shares of one")
        if channels < 2:
            raise ValueError(f"channels can only be found from others: 2 at least, got {channels}")
        self.wants, self.patch, grid = Channels(channels, size), (1, *patch), patch_grid(size, patch)
        self.channels, self.patches, self.mask_ratio = channels, grid[0] * grid[1], mask_ratio
        self.patches_only, self.channels_only, self.spectrum = patches_only, channels_only, spectrum
        self.patch_embed = PatchEmbed(self.patch, 1, embed_dim)
        self.channel_tokens = nn.Parameter(torch.empty(channels, embed_dim))
        nn.init.orthogonal_(self.channel_tokens)
        self.cls_token = nn.Parameter(torch.empty(1, 1 + memory, embed_dim))  # and the memory tokens
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + memory + self.patches, embed_dim))
        self.blocks = make_blocks(embed_dim, depth, num_heads, 4.0, 1e-6)
        self.norm = LayerNorm(embed_dim, eps=1e-6)
        self.decoder_embed = Linear(embed_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.decoder_blocks = make_blocks(embed_dim, decoder_depth, decoder_num_heads, 4.0, 1e-6)
        self.decoder_norm = LayerNorm(embed_dim, eps=1e-6)
        self.decoder_pred = Linear(embed_dim, patch[0] * patch[1])
        init_tokens_(self.cls_token, self.pos_embed, self.mask_token)
        for part in (self.blocks, self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            init_weights_(part)

    def prepare(self, batch: ChannelBatch, draw: Draw, progress: Progress) -> View:
        """parts: [B, 1, C, H, W], channels in the place of frames."""
        self.wants.check(batch)
        images, device = batch.images.to(self.pos_embed.dtype), batch.images.device
        sizes = len(images), self.channels, self.patches
        there = torch.ones(sizes[:2], dtype=torch.bool, device=device) if batch.present is None else batch.present
        noise = draw.uniform("mask", sizes[1] * sizes[2], device).view(sizes)
        numbers, kind = draw.uniform("channels", sizes[1] + 1, device), draw.uniform("strategy", 1, device)
        count = there.sum(1, keepdim=True)
        # k = 1 + floor(u * (n - 1)) of n channels, as a number that `masking.channels` multiplies by n.
        k = 1 + (numbers[:, :1] * (count - 1)).floor()
        numbers = torch.cat([(k + 0.5) / count, numbers[:, 1:]], 1)
        patches = masking.channels(*sizes, self.mask_ratio, noise=noise, present=batch.present).mask
        whole = masking.channels(*sizes, mode="channel", channel_noise=numbers, present=batch.present).mask
        whole &= count > 1
        only_patches = (kind < self.patches_only) | (count == 1)
        only_channels = ~only_patches & (kind < self.patches_only + self.channels_only)
        masked = torch.where(only_patches, patches, torch.where(only_channels, whole, patches | whole))
        absent = None if batch.present is None else ~there.repeat_interleave(self.patches, 1)
        return View(images[:, None], TokenMask.from_bool(masked, absent=absent))

    def table(self) -> Tensor:
        """[1, 1 + memory + C * P, D]: positions, and each channel's token."""
        lead, pos = self.pos_embed.split([self.cls_token.shape[1], self.patches], 1)
        return torch.cat([lead, (pos + self.channel_tokens[:, None]).reshape(1, -1, pos.shape[-1])], 1)

    def latents(self, parts: Tensor, plan: TokenMask | None, features: bool = False) -> Tensor:
        """Of class and memory tokens and visible ones."""
        return run_encoder(
            parts,
            plan,
            patch_embed=self.patch_embed,
            cls_token=self.cls_token,
            pos_embed=self.table(),
            blocks=self.blocks,
            norm=self.norm,
            features=features,
        )

    def compute(self, view: View) -> Output:
        pred = run_decoder(
            self.latents(view.parts, view.plan),
            view.plan,
            embed=self.decoder_embed,
            mask_token=self.mask_token,
            pos_embed=self.table(),
            blocks=self.decoder_blocks,
            norm=self.decoder_norm,
            pred=self.decoder_pred,
            prefix=self.cls_token.shape[1],
        )
        return Output(self._terms(pred, view), pred, view)

    def _terms(self, pred: Tensor, view: View) -> dict[str, Tensor]:
        pixels = ops.patch_loss(pred, view.parts, view.plan, self.patch, norm="mae")
        terms = {"pixels": (1 - self.spectrum) * pixels}
        if self.spectrum:
            true = patchify(view.parts, self.patch)
            shift, scale = statistics(true, "mae", 1)
            rows = ((true - shift) / scale).flatten(0, 1)[view.plan.masked.long()]
            mine, theirs = (
                torch.fft.fft2(part.reshape(-1, *self.patch[1:]).to(rows.dtype)).abs() for part in (pred, rows)
            )
            terms["spectrum"] = self.spectrum * (mine - theirs).abs().mean()
        return terms

    def baseline(self, view: View) -> Output:
        pred = view.parts.new_zeros(view.plan.total_masked, self.patch[1] * self.patch[2])
        return Output(self._terms(pred, view), pred, view)

    def encode(self, batch: ChannelBatch) -> Tensor:
        """[B, 1 + memory + C * P, D] of images with all their channels. ValueError: some are missing."""
        self.wants.check(batch)
        if batch.present is not None and not bool(batch.present.all()):
            raise ValueError("encode takes images with all their channels; some are missing in `present`")
        return self.latents(batch.images.to(self.pos_embed.dtype)[:, None], None, features=True)

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images import pictures

        shown = reconstruct(self.compute(view).pred, view.parts, view.plan, self.patch, "mae")
        columns = [
            (column[:, 0].flatten(0, 1)[:, None].float().add(2).div(4).clamp(0, 1) * 255).to(torch.uint8).cpu()
            for column in shown[:4]
        ]
        rows = [f"{name}, channel {channel}" for name in names for channel in range(self.channels)]
        return pictures.Sheet(columns, rows, "masked patches have their true mean and variance")
