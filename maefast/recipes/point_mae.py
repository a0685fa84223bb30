"""Point-MAE: point clouds, groups of whose points are hidden (Pang et al., ECCV 2022, arXiv:2203.06604).

A token is the 32 points nearest to one of 64 centres that lie far apart. The encoder sees the visible groups, with
their positions added in front of every block; the decoder sees mask tokens with the positions of the hidden ones. With
P and Q the predicted and the true points of a hidden group, relative to its centre,

    loss = mean over hidden groups of mean_p min_q |p - q|^2 + mean_q min_p |p - q|^2
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from maefast import masking, ops
from maefast.data.points import PointBatch, Points, Scatter
from maefast.names import Names
from maefast.nn import CentrePositions, Decoder, Encoder, PointEmbed, group_points
from maefast.ops._checks import one_of
from maefast.recipe import Draw, Picture, Progress, Spec, View
from maefast.recipes._autoencoder import Autoencoder

MASKS = ("random", "near")


class PointMAE(Autoencoder):
    """Args:
        points: N. groups: G. group_size: K.
        mask: "random" groups are hidden, or those "near" a random centre, a connected piece.
        mask_ratio: int(ratio * G) groups are hidden.
        embed_dim, depth, num_heads: of the encoder; the decoder has the same width. drop_path: of both.
        embed_all: see `maefast.nn.PointEmbed`.

    Shapes: points [B, N, 3] -> groups [B, G, K, 3]; latents [B, visible, D]; pred [B, hidden, K * 3].
    """

    spec = Spec(
        name="point_mae",
        title="Point-MAE",
        paper="Pang et al., ECCV 2022, arXiv:2203.06604",
        modality="point clouds",
        sizes={"small": {}, "tiny": {"embed_dim": 192, "num_heads": 3}},
        training={"lr": 1e-3, "betas": (0.9, 0.999), "epochs": 300, "warmup": 1 / 30, "batch_size": 128},
        demo={
            "model_args": {"points": 512, "groups": 32, "group_size": 16, "embed_dim": 96, "depth": 4, "num_heads": 3,
                           "decoder_depth": 2, "decoder_num_heads": 3, "drop_path": 0.0},
            "steps": 500, "batch_size": 16, "lr": 1e-3, "warmup": 0.1, "picture_rows": 4,
        },
        baseline="the mean group",
    )  # fmt: skip
    names = Names(
        ("MAE_encoder.encoder.", "encoder.patch_embed."),
        ("MAE_encoder.pos_embed.", "encoder.pos_embed."),
        ("MAE_encoder.blocks.blocks.", "encoder.blocks."),
        ("MAE_encoder.norm.", "encoder.norm."),
        ("decoder_pos_embed.", "decoder.pos_embed."),
        ("MAE_decoder.", "decoder."),
        ("mask_token", "decoder.mask_token"),
        ("increase_dim.0.", "decoder.pred."),
        pointwise=("MAE_encoder.encoder.", "increase_dim.0."),
    )

    def __init__(
        self,
        points: int = 1024,
        groups: int = 64,
        group_size: int = 32,
        mask: str = "random",
        mask_ratio: float = 0.6,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        decoder_depth: int = 4,
        decoder_num_heads: int = 6,
        drop_path: float = 0.1,
        embed_all: bool = True,
    ) -> None:
        super().__init__()
        one_of("mask", mask, MASKS)
        if not 0 < max(groups, group_size) <= points:
            raise ValueError(f"{groups} groups of {group_size} points do not fit clouds of {points}")
        self.wants = Points(points)
        self.groups, self.group_size, self.mask, self.mask_ratio = groups, group_size, mask, mask_ratio
        how = {"prefix": 0, "bias": "none", "norm_eps": 1e-5, "drop_path": drop_path}
        embed, positions = PointEmbed(embed_dim, embed_all), CentrePositions(embed_dim)
        self.encoder = Encoder(embed, positions, embed_dim, depth, num_heads, **how)
        self.decoder = Decoder(
            embed_dim,
            3 * group_size,
            CentrePositions(embed_dim),
            embed_dim,
            decoder_depth,
            decoder_num_heads,
            embed_bias=None,
            **how,
        )
        for layer in self.encoder.modules():  # as the authors start theirs; the decoder starts as MAE's
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def prepare(self, batch: PointBatch, draw: Draw, progress: Progress) -> View:
        """parts: `maefast.nn.Groups`; plan: of groups."""
        self.wants.check(batch)
        parts = group_points(batch.points.to(self.decoder.mask_token.dtype), self.groups, self.group_size)
        if self.mask == "near":
            noise = draw.uniform("mask", 1, parts.centres.device)[:, 0]
            return View(parts, masking.near(parts.centres, self.mask_ratio, noise=noise))
        noise = draw.uniform("mask", self.groups, parts.centres.device)
        return View(parts, masking.random(*noise.shape, self.mask_ratio, noise=noise, rule="complement"))

    def score(self, pred: Tensor, view: View) -> dict[str, Tensor]:
        true = ops.gather_tokens(view.parts.points.flatten(2), view.plan, "masked")
        pred, true = (groups.reshape(-1, self.group_size, 3) for groups in (pred, true))
        return {"chamfer": ops.chamfer(pred.to(true.dtype), true)}

    def guess(self, view: View) -> Tensor:
        """The mean of all groups, point by point in the order of their distances."""
        return view.parts.points.mean((0, 1)).flatten().expand(view.plan.total_masked, -1)

    def encode(self, batch: PointBatch) -> Tensor:
        """[B, G, D]."""
        self.wants.check(batch)
        return self.encoder(group_points(batch.points.to(self.decoder.mask_token.dtype), self.groups, self.group_size))

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        pred, (points, centres), plan = self.compute(view).pred, view.parts, view.plan
        seen, hidden = (ops.gather_tokens(centres, plan, which) for which in ("visible", "masked"))
        visible = ops.gather_tokens(points.flatten(2), plan).unflatten(2, (-1, 3)) + seen[:, :, None]
        made = pred.unflatten(-1, (-1, 3)) + hidden[:, :, None]
        both = [clouds.flatten(1, 2) for clouds in (points + centres[:, :, None], visible, made)]
        columns = dict(zip(("original", "visible", "reconstruction"), both))
        return Scatter(columns, names, f"{self.mask_ratio:.0%} of the groups masked")
