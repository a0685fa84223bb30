"""Vec2Face: from a vector to a map of rows, hidden in part and restored, to an image (Wu et al., ICLR 2025,
arXiv:2409.02979). A feature-masked autoencoder: it is rows of features that are hidden, not patches.

With f = linear(vector) and learned numbers w_p, b_p for each of the N = h * w places, the map has the rows
t_p = w_p f + b_p. Half of them are dropped, and of the rest some are replaced by f. The encoder sees f and what is
kept; the decoder f's latent in every place that was hidden. With y_p its rows, x the image and g what a convolutional
head makes of y,

    loss = mean (y - t)^2 + mean (g - x)^2 + 0.1 (1 - SSIM(g, x))
           + 0.2 perceptual(g, x) + mean (1 - cos(identity(g), vector)) - adversarial * mean adversary(g)

where the last three need networks of yours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import masking, ops
from maefast.data.vectors import VectorBatch, Vectors
from maefast.masking.nested import Nested
from maefast.names import Names
from maefast.nn import LayerNorm, Linear, run_blocks, run_norm
from maefast.nn.encoder import make_blocks
from maefast.nn.image_decoder import ImageDecoder, ssim
from maefast.nn.init import init_tokens_, init_weights_
from maefast.nn.patch_embed import pair
from maefast.ops import _checks
from maefast.recipe import Draw, Output, Picture, Progress, Recipe, Spec, View
from maefast.recipes._sizes import ENCODERS

SSIM, PERCEPTUAL = 0.1, 0.2


class Vec2Face(Recipe):
    """Args:
        dim: K, of a vector. img_size: a multiple of 2 for each step of the head; what is left are rows and columns.
        drop_ratio: ceil(ratio * N) rows are dropped. hide_mean, hide_std: of the share that is hidden in a batch,
            normal and cut to [drop_ratio, 1].
        rows: whose distance is the loss, "all" or "hidden".
        embed_dim, depth, num_heads: of the encoder. decoder_*: of the decoder, as wide. head_*: see `ImageDecoder`.
        drop: share of the encoder's input that is left out in training.
        perceptual: (images, images) -> distances, such as LPIPS. identity: images -> [B, K]. adversary: images ->
            logits, a discriminator that you train; `adversary_from` is the share of the run before it has its say.
            Callables on the run's device, frozen, of images in [-1, 1]; gradients go through them. None: no such term.

    Shapes: vectors [B, K], images [B, 3, H, W]; pred: rows [B, N, decoder_embed_dim] and images in [-1, 1].
    """

    spec = Spec(
        name="vec2face",
        title="Vec2Face, its masked autoencoder",
        paper="Wu et al., ICLR 2025, arXiv:2409.02979",
        modality="images with vectors",
        sizes={"base": {**ENCODERS["base"], "decoder_embed_dim": 768},
               "large": {**ENCODERS["large"], "decoder_embed_dim": 1024}},
        training={
            "lr": 4e-5 * 128 / 112, "betas": (0.9, 0.99), "weight_decay": 0.01, "batch_size": 128, "epochs": 100,
            "warmup": 0.05, "clip": 2.0, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0),
        },
        demo={
            "model_args": {"dim": 32, "img_size": 16, "embed_dim": 48, "depth": 1, "num_heads": 3,
                           "decoder_embed_dim": 48, "decoder_depth": 1, "decoder_num_heads": 3, "head_in": 48,
                           "head_channels": 16, "head_multiples": [1, 2], "head_blocks": 1, "drop": 0.0},
            "steps": 380, "batch_size": 16, "lr": 6e-3, "warmup": 0.1, "clip": 2.0, "picture_rows": 8,
        },
        baseline="the mean row and the mean image",
    )  # fmt: skip
    names = Names(unused=("patch_embed.", "center_token.", "token_emb.position_ids"))
    lead = 1  # f

    def __init__(
        self,
        dim: int = 512,
        img_size: int | Sequence[int] = 112,
        drop_ratio: float = 0.5,
        hide_mean: float = 0.75,
        hide_std: float = 0.25,
        rows: str = "all",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 768,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        head_in: int = 256,
        head_channels: int = 128,
        head_multiples: Sequence[int] = (1, 1, 2, 2, 4),
        head_blocks: int = 2,
        head_shortcut: str = "output",
        drop: float = 0.1,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        identity: Callable[[Tensor], Tensor] | None = None,
        adversary: Callable[[Tensor], Tensor] | None = None,
        adversary_from: float = 0.8,
    ) -> None:
        super().__init__()
        size, step = pair("img_size", img_size), 2 ** (len(head_multiples) - 1)
        _checks.one_of("rows", rows, ("all", "hidden"))
        if any(side % step for side in size):
            raise ValueError(f"img_size {size} must be a multiple of the head's {step}")
        if not 0 <= drop_ratio < 1 or not hide_std > 0:
            raise ValueError(f"drop_ratio {drop_ratio} must lie in [0, 1), hide_std {hide_std} be positive")
        if decoder_embed_dim != embed_dim:
            raise ValueError(
                f"decoded rows are held against the encoder's: {decoder_embed_dim} must be {embed_dim} wide"
            )
        for name, call in (("perceptual", perceptual), ("identity", identity), ("adversary", adversary)):
            if not (call is None or callable(call)):
                raise TypeError(f"{name} must be callable, got {type(call).__name__}")
        self.wants, self.grid = Vectors(dim, size), (size[0] // step, size[1] // step)
        count = self.grid[0] * self.grid[1]
        self.count, self.rows, self.adversary_from = count, rows, adversary_from
        self.dropped, self.hide = math.ceil(drop_ratio * count), (drop_ratio, hide_mean, hide_std)
        if self.dropped == count:
            raise ValueError(f"drop_ratio {drop_ratio} keeps 0 of {count} rows")
        self.calls = {"perceptual": perceptual, "identity": identity, "adversary": adversary}  # no parts of it
        self.latent_prior_proj_f = Linear(dim, embed_dim)
        self.feature_token = nn.Linear(1, count)
        positions = nn.Embedding(1 + count, embed_dim)
        self.token_emb = nn.ModuleDict({"position_embeddings": positions, "LayerNorm": LayerNorm(embed_dim, eps=1e-6)})
        self.dropout = nn.Dropout(drop)
        self.blocks = make_blocks(embed_dim, depth, num_heads, 4.0, 1e-6)
        self.norm = LayerNorm(embed_dim, eps=1e-6)
        self.decoder_embed = Linear(embed_dim, decoder_embed_dim)
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, 1 + count, decoder_embed_dim))
        self.decoder_blocks = make_blocks(decoder_embed_dim, decoder_depth, decoder_num_heads, 4.0, 1e-6)
        self.decoder_norm = LayerNorm(decoder_embed_dim, eps=1e-6)
        self.im_decoder_proj = Linear(decoder_embed_dim, head_in)
        self.im_decoder = ImageDecoder(head_in, head_channels, head_multiples, head_blocks, shortcut=head_shortcut)
        init_weights_(self)
        init_tokens_(self.decoder_pos_embed_learned, positions.weight)

    def prepare(self, batch: VectorBatch, draw: Draw, progress: Progress) -> View:
        """parts: vectors; plan: `masking.nested`; target: images in [-1, 1], and the adversary's weight."""
        self.wants.check(batch)
        dtype, device = self.decoder_pos_embed_learned.dtype, batch.vectors.device
        low, mean, std = self.hide
        a, b = (torch.special.ndtr(torch.tensor((end - mean) / std, dtype=torch.float64)) for end in (low, 1.0))
        share = mean + std * float(torch.special.ndtri(a + (b - a) * draw.shared("hidden").random()))
        hide = max(self.dropped, min(self.count, math.ceil(self.count * share)))
        noise = draw.uniform("mask", self.count, device)
        plan = masking.nested(len(noise), self.count, self.dropped, hide, noise=noise)
        late = progress.step >= self.adversary_from * progress.total
        weight = torch.tensor(float(late), dtype=dtype).to(device, non_blocking=True)
        return View(batch.vectors.to(dtype), plan, (batch.images.to(dtype) / 127.5 - 1, weight))

    def map(self, f: Tensor) -> Tensor:
        """[B, D] -> rows [B, N, D]."""
        return self.feature_token.weight * f[:, None] + self.feature_token.bias[:, None]

    def latents(self, f: Tensor, rows: Tensor, plan: Nested | None) -> Tensor:
        """Of f and the rows that are kept, [B, 1 + kept, D]; all rows without a plan."""
        positions = self.token_emb["position_embeddings"].weight
        lead, pos = positions.split([1, self.count])
        if plan is not None:
            rows = torch.where(plan.hidden[..., None], f[:, None], rows)
        rows = rows + pos
        if plan is not None:
            rows = ops.gather_tokens(rows, plan.plan)
        x = torch.cat([(f + lead)[:, None], rows], 1)
        x = self.dropout(self.token_emb["LayerNorm"](x, dtype=x.dtype))
        return run_norm(self.norm, *run_blocks(self.blocks, x))

    def compute(self, view: View) -> Output:
        f = self.latent_prior_proj_f(view.parts)
        rows, plan = self.map(f), view.plan
        x = self.decoder_embed(self.latents(f, rows, plan))
        full = ops.restore_tokens(x, plan.plan, x.new_zeros(1, 1, x.shape[2]), prefix=1)
        full = torch.cat([full[:, :1], torch.where(plan.hidden[..., None], full[:, :1], full[:, 1:])], 1)
        x, delta = run_blocks(self.decoder_blocks, full + self.decoder_pos_embed_learned)
        y = run_norm(self.decoder_norm, x, delta)[:, 1:]
        features = self.im_decoder_proj(y).transpose(1, 2).unflatten(2, self.grid)
        pred = y, self.im_decoder(features)
        return Output(self._terms(pred, rows, view), pred, view)

    def _terms(self, pred: tuple[Tensor, Tensor], rows: Tensor, view: View) -> dict[str, Tensor]:
        (y, made), (images, weight) = pred, view.target
        made = made.to(images.dtype)
        if self.rows == "all":
            distance = ops.feature_loss(y, rows)
        else:
            each = ops.feature_loss(y, rows, reduction="none").view(rows.shape[:2])
            distance = (each * view.plan.hidden).sum() / view.plan.hidden.sum()
        terms = {"rows": distance, "pixels": F.mse_loss(made, images)}
        with torch.autocast(made.device.type, enabled=False):
            terms["ssim"] = SSIM * (1 - ssim((made + 1) / 2, (images + 1) / 2))
        perceptual, identity, adversary = self.calls.values()
        if perceptual is not None:
            terms["perceptual"] = PERCEPTUAL * perceptual(made, images).mean()
        if identity is not None:
            terms["identity"] = ops.feature_loss(identity(made), view.parts, loss="cosine")
        if adversary is not None:
            terms["adversary"] = -weight * adversary(made).mean()
        return terms

    def baseline(self, view: View) -> Output:
        rows, images = self.map(self.latent_prior_proj_f(view.parts)), view.target[0]
        pred = rows.mean((0, 1)).expand_as(rows), images.mean(0).expand_as(images)
        return Output(self._terms(pred, rows, view), pred, view)

    def encode(self, batch: VectorBatch) -> Tensor:
        """[B, 1 + N, D] of whole maps, the vector's token first."""
        self.wants.check(batch)
        f = self.latent_prior_proj_f(batch.vectors.to(self.decoder_pos_embed_learned.dtype))
        return self.latents(f, self.map(f), None)

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images import pictures

        images, made = view.target[0], self.compute(view).pred[1]
        hidden = view.plan.hidden.view(-1, 1, *self.grid).to(images)
        columns = [pictures.to_pixels(column, 0.5, 0.5) for column in (images, made.clamp(-1, 1))]
        shown = F.interpolate(1 - hidden, tuple(images.shape[2:])).expand(-1, 3, -1, -1)
        columns.insert(1, pictures.to_pixels(shown * 0.8))
        labels = ("image", "rows seen", "made of the vector")
        return pictures.Sheet(columns, names, "rows of features seen (bright) or hidden; no pixel is seen", labels)
