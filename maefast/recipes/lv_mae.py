"""LV-MAE: long videos as sequences of embeddings of their segments, some of which are hidden (Naiman et al., ICCV 2025,
arXiv:2504.03501).

A frozen model embeds each five seconds; the embeddings e, of length 1, are the tokens, as many as the video has. With
M the masked segments of all sequences,

    loss = mean over M of mean((pred - e)^2), or of 1 - cos(pred, e)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import masking, ops
from maefast.data.embeddings import EmbeddingBatch, Embeddings
from maefast.names import MAE_DECODER, Names
from maefast.nn import Decoder, Encoder, GivenTokens, sincos_1d
from maefast.ops import TokenMask, _checks
from maefast.recipe import Draw, Picture, Progress, Spec, View
from maefast.recipes._autoencoder import Autoencoder


class LVMAE(Autoencoder):
    """Args:
        length: L, the longest sequence. dim: of an embedding. shortest: see `Embeddings`.
        mask_ratio: of a sequence of n segments int(n * (1 - ratio)) stay visible; short ones may show the class token
            alone.
        masking: "semantic", by likeness to the segment before, or "random".
        order: of semantic masking: "paper" masks the segments least like the one before, "release" (the authors' code)
            keeps those.
        loss: "mse" or "cosine".
        embed_dim: D, of the encoder; None: that of the embeddings, without a linear map, as published.
        depth, num_heads: of the encoder. decoder_*: of the decoder. mlp_ratio: of both.

    Shapes: values [B, L, dim] of lengths [B]. Sequences run packed: latents [B + visible, D], each behind its class
    token; pred [masked, dim].
    """

    spec = Spec(
        name="lv_mae",
        title="LV-MAE",
        paper="Naiman et al., ICCV 2025, arXiv:2504.03501",
        modality="embeddings",
        sizes={"base": {"depth": 32, "num_heads": 16}, "small": {"depth": 8, "num_heads": 16}},
        training={
            "blr": 1e-3, "weight_decay": 0.05, "epochs": 150, "warmup": 40 / 150, "batch_size": 128,
            "graph": "off",  # each batch has another number of tokens
        },
        demo={
            "model_args": {
                "length": 32, "dim": 192, "shortest": 8, "masking": "random", "embed_dim": 128, "depth": 2,
                "num_heads": 4, "decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 4, "loss": "cosine",
            },
            "steps": 800, "batch_size": 32, "lr": 1e-3, "warmup": 0.1, "clip": 1.0,
        },
        baseline="predicting the mean of a sequence's visible embeddings",
    )  # fmt: skip
    names = Names(("", "encoder."), *MAE_DECODER)

    def __init__(
        self,
        length: int = 256,
        dim: int = 1024,
        shortest: int = 2,
        mask_ratio: float = 0.5,
        masking: str = "semantic",
        order: str = "paper",
        loss: str = "mse",
        embed_dim: int | None = None,
        depth: int = 32,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        _checks.one_of("masking", masking, ("semantic", "random"))
        _checks.one_of("order", order, ("paper", "release"))
        _checks.one_of("loss", loss, ("mse", "cosine"))
        self.wants = Embeddings(length, dim, shortest)
        self.mask_ratio, self.masking, self.order, self.loss = mask_ratio, masking, order, loss
        tokens, width = GivenTokens(dim, embed_dim), dim if embed_dim is None else embed_dim
        self.encoder = Encoder(tokens, _positions(width, length), width, depth, num_heads, mlp_ratio)
        table = _positions(decoder_embed_dim, length)
        self.decoder = Decoder(width, dim, table, decoder_embed_dim, decoder_depth, decoder_num_heads, mlp_ratio)

    def prepare(self, batch: EmbeddingBatch, draw: Draw, progress: Progress) -> View:
        """parts: [B, L, dim], each embedding of length 1; plan: masked within each length, absent beyond."""
        values, lengths = self._normalised(batch)
        if self.masking == "semantic":
            return View(values, masking.similar(values, lengths, self.mask_ratio, order=self.order))
        noise = draw.uniform("mask", self.wants.length, values.device)
        return View(values, masking.ragged(lengths, self.wants.length, self.mask_ratio, noise=noise))

    def _normalised(self, batch: EmbeddingBatch) -> tuple[Tensor, list[int]]:
        self.wants.check(batch)
        return F.normalize(batch.values.to(self.encoder.cls_token.dtype), dim=-1), batch.lengths.tolist()

    def score(self, pred: Tensor, view: View) -> dict[str, Tensor]:
        rows, how = pred.flatten(0, -2), {"loss": self.loss, "eps": 1e-6}  # the authors' eps of the cosine
        return {"segments": ops.feature_loss(rows, view.parts, index=view.plan.masked, **how)}

    def guess(self, view: View) -> Tensor:
        plan: TokenMask = view.plan
        seen = (plan.slot >= 0).view(plan.batch, -1, 1)
        mean = view.parts.masked_fill(~seen, 0.0).sum(1) / seen.sum(1).clamp_min(1)
        return mean[plan.masked.long() // plan.num_tokens]

    def encode(self, batch: EmbeddingBatch) -> Tensor:
        """Each sequence behind its class token: packed [B + all, D], or [B, 1 + n, D] where all have n segments."""
        values, lengths = self._normalised(batch)
        return self.encoder(
            values, masking.ragged(lengths, self.wants.length, 0.0, order="position", device=values.device)
        )

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.embeddings import sheet

        pred = self.compute(view).pred
        pred = F.normalize(pred, dim=-1) if self.loss == "cosine" else pred
        caption = f"{self.mask_ratio:.0%} masked; the first principal components of each segment"
        return sheet(view.parts, pred, view.plan, names, caption)


def _positions(width: int, length: int) -> nn.Parameter:
    """[1, 1 + length, width], fixed; zero for the class token."""
    table = torch.cat([torch.zeros(1, width), sincos_1d(width, torch.arange(length)).float()])
    return nn.Parameter(table[None], requires_grad=False)
