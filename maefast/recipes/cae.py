"""CAE: hidden patches are predicted in the space of latents, and from there their codes (Chen et al., 2022,
arXiv:2202.03026).

The encoder sees visible patches. A regressor makes latents of the hidden ones from them by cross-attention, a decoder
that sees nothing else their codes. With z the regressor's latents and h those that the same encoder gives for the
hidden patches alone, without gradient,

    loss = cross_entropy(decoder(z), codes) + 2 * mean (z - h)^2
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import masking, ops
from maefast.data.images.batch import ImageBatch
from maefast.names import Names
from maefast.nn import Encoder, LayerNorm, Linear, PatchEmbed, Regressor, run_blocks, run_norm
from maefast.nn.encoder import make_blocks
from maefast.nn.init import init_tokens_, init_weights_
from maefast.nn.patch_embed import pair, patch_grid
from maefast.nn.patches import patchify
from maefast.nn.positions import sincos_2d
from maefast.nn.teachers import Frozen
from maefast.ops import TokenMask, _checks
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._images import ImageRecipe
from maefast.recipes._sizes import ENCODERS


class CAE(ImageRecipe):
    """Args:
        tokenizer: a module, images [B, 3, H, W] normalised as ImageNet's -> codes int64 [B, N] below `codes`, frozen;
            or "random": signs of fixed random projections of the patches, for demos.
        codes: how many there are. mask_ratio: of the patches, int(ratio * N) in BEiT's rectangles.
        align: weight of the distance of latents.
        img_size, patch_size, embed_dim, depth, num_heads: of the encoder; regressor and decoder have its width.
        regressor_depth, decoder_depth; layer_scale, drop_path: of all three.

    Shapes: images [B, 3, H, W]; target: codes [B, masked]; pred: logits [B, masked, codes].
    """

    spec = Spec(
        name="cae",
        title="CAE",
        paper="Chen et al., 2022, arXiv:2202.03026",
        modality="images, a tokenizer",
        sizes={size: ENCODERS[size] for size in ("base", "small", "large")},
        training={"lr": 1.5e-3, "betas": (0.9, 0.98), "epochs": 300, "clip": 3.0, "warmup": 0.03},
        demo={
            "model_args": {"tokenizer": "random", "codes": 16, "embed_dim": 96, "depth": 4, "num_heads": 3,
                           "regressor_depth": 2, "decoder_depth": 1, "drop_path": 0.0},
            "img_size": 64, "patch_size": 8, "steps": 200, "batch_size": 16, "lr": 2e-3, "warmup": 0.1,
        },
        baseline="the codes as often as they occur",
    )  # fmt: skip
    names = Names(
        ("regresser.regressor_blocks.", "regressor.blocks."),
        ("regresser.", "regressor."),
        ("decoder.decoder_blocks.", "decoder.blocks."),
        unused=("alignment_encoder.", "rd_pos_embed"),
    )

    def __init__(
        self,
        tokenizer: nn.Module | str | None = None,
        codes: int = 8192,
        mask_ratio: float = 0.5,
        align: float = 2.0,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        regressor_depth: int = 4,
        decoder_depth: int = 4,
        layer_scale: float = 0.1,
        drop_path: float = 0.1,
    ) -> None:
        size, patch = pair("img_size", img_size), pair("patch_size", patch_size)
        super().__init__(3, size)
        self.grid, self.mask_ratio, self.align = patch_grid(size, patch), mask_ratio, align
        self.codes = codes
        if tokenizer == "random":
            tokenizer = RandomCodes(codes, patch)
        if not (tokenizer is None or isinstance(tokenizer, nn.Module)):
            raise TypeError(f"tokenizer must be a module or 'random', got {tokenizer!r}")
        self.tokenizer = None if tokenizer is None else Frozen(tokenizer, exact=True)
        table = sincos_2d(embed_dim, self.grid, prefix=1)[None]
        table = torch.cat(table.chunk(2, 2)[::-1], 2)  # rows in the first half, where MAE has columns
        how = {"bias": "qv", "layer_scale": layer_scale, "drop_path": drop_path}
        positions = nn.Parameter(table, requires_grad=False)
        self.encoder = Encoder(PatchEmbed(patch, 3, embed_dim), positions, embed_dim, depth, num_heads, **how)
        self.regressor = Regressor(embed_dim, regressor_depth, num_heads, 4.0, layer_scale, drop_path)
        self.decoder = nn.ModuleDict(
            {
                "blocks": make_blocks(embed_dim, decoder_depth, num_heads, 4.0, 1e-6, **how),
                "norm": LayerNorm(embed_dim, eps=1e-6),
                "head": Linear(embed_dim, codes),
            }
        )
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        init_tokens_(self.mask_token)
        init_weights_(self.decoder)

    def missing(self) -> str | None:
        return None if self.tokenizer else "a tokenizer: a module in Python, or tokenizer=random (--model-arg)"

    def prepare(self, batch: ImageBatch, draw: Draw, progress: Progress) -> View:
        self.require()
        images, tokens = self.images(batch), self.grid[0] * self.grid[1]
        keep = masking.keep_count(tokens, self.mask_ratio, "complement")
        # Rectangles are drawn on the host, those of each sample from numbers of its own.
        seeds = (draw.uniform("mask", 2).double() * 2**24).long()
        maps = [
            masking.block(1, self.grid, keep=keep, generator=torch.Generator().manual_seed(int(a) << 24 | int(b))).mask
            for a, b in seeds
        ]
        scores = torch.cat(maps).float().to(images.device, non_blocking=True)
        plan = TokenMask.from_scores(scores, keep, order="position")
        return View(images, plan, self._told(images).gather(1, plan.ids_masked))

    def _told(self, images: Tensor) -> Tensor:
        """The tokenizer's codes, int64 [B, N], looked at."""
        codes, want = self.tokenizer(images), (len(images), self.grid[0] * self.grid[1])
        if not isinstance(codes, Tensor) or codes.dtype is not torch.int64 or tuple(codes.shape) != want:
            got = f"{codes.dtype} {list(codes.shape)}" if isinstance(codes, Tensor) else type(codes).__name__
            raise ValueError(f"the tokenizer must give codes int64 {list(want)}, got {got}")
        _checks.holds((codes >= 0) & (codes < self.codes), f"the tokenizer gives codes beyond 0 to {self.codes - 1}")
        return codes

    def compute(self, view: View) -> Output:
        images, plan = view.parts, view.plan
        visible = self.encoder(images, plan)[:, 1:]
        with torch.no_grad():
            theirs = self.encoder(images, plan.complement())[:, 1:]
        table = self.encoder.pos_embed[:, 1:].expand(plan.batch, -1, -1)
        shown, hidden = (ops.gather_tokens(table, plan, which) for which in ("visible", "masked"))
        mine = self.regressor(self.mask_token.expand_as(hidden), visible, hidden, shown)
        x, delta = run_blocks(self.decoder["blocks"], mine + hidden)
        logits = self.decoder["head"](run_norm(self.decoder["norm"], x, delta))
        terms = self._codes(logits, view)
        terms["latents"] = self.align * ops.feature_loss(mine, theirs)
        return Output(terms, logits, view)

    def _codes(self, logits: Tensor, view: View) -> dict[str, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        return {"codes": F.cross_entropy(logits.flatten(0, 1).to(wide), view.target.flatten())}

    def baseline(self, view: View) -> Output:
        counts = torch.bincount(view.target.flatten(), minlength=self.codes).to(view.parts.dtype)
        logits = (counts / counts.sum()).log().expand(*view.target.shape, -1)
        return Output(self._codes(logits, view), logits, view)

    def encode(self, batch: ImageBatch) -> Tensor:
        """[B, 1 + N, D], class token first."""
        return self.encoder(self.images(batch))

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images import pictures

        images, plan = view.parts * self.std + self.mean, view.plan
        found = self.compute(view).pred.argmax(-1)
        colours = torch.rand(self.codes, 3, generator=torch.Generator().manual_seed(0)).to(images)
        size = tuple(images.shape[2:])
        seen = F.interpolate((~plan.mask).view(-1, 1, *self.grid).float(), size)
        columns = [images.float(), images * seen]
        for codes in (view.target, found):
            cells = torch.zeros(plan.batch, plan.num_tokens, 3).to(images)
            cells.scatter_(1, plan.ids_masked[..., None].expand(-1, -1, 3), colours[codes])
            columns.append(F.interpolate(cells.transpose(1, 2).unflatten(2, self.grid).float(), size))
        columns = [pictures.to_pixels(column) for column in columns]
        right = (found == view.target).double().mean()
        caption = f"{self.mask_ratio:.0%} masked\ncodes as colours; {right:.0%} of the predicted ones are right"
        return pictures.Sheet(columns, names, caption, ("original", "visible", "codes", "predicted"))


class RandomCodes(nn.Module):
    """Codes of patches without a trained tokenizer: the signs of log2(`codes`) fixed random projections of a patch's
    pixels, as bits."""

    def __init__(self, codes: int, patch: tuple[int, int]) -> None:
        super().__init__()
        bits = codes.bit_length() - 1
        if bits < 1 or codes != 1 << bits:
            raise ValueError(f"codes of random projections are a power of two, at least 2, got {codes}")
        self.patch = patch
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("planes", torch.randn(3 * patch[0] * patch[1], bits, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> int64 [B, N]."""
        signs = patchify(images, self.patch) @ self.planes.to(images) > 0
        return (signs.long() << torch.arange(signs.shape[-1], device=images.device)).sum(-1)
