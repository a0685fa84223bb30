"""Point-MAE: point clouds, groups of whose points are hidden (Pang et al., ECCV 2022, arXiv:2203.06604).

A token is the 32 points nearest to one of 64 centres that lie far apart. The encoder sees the visible groups, with
their positions added in front of every block; the decoder sees mask tokens with the positions of the hidden ones. With
P and Q the predicted and the true points of a hidden group, relative to its centre,

    loss = mean over hidden groups of mean_p min_q |p - q|^2 + mean_q min_p |p - q|^2
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from maefast import masking
from maefast.data.points import PointBatch
from maefast.names import Names
from maefast.nn import CentrePositions, Decoder, Encoder, PointEmbed
from maefast.ops._checks import one_of
from maefast.recipe import Draw, Picture, Progress, Spec, View
from maefast.recipes._autoencoder import Autoencoder
from maefast.recipes._points import DEMO, TRAINING, GroupedPoints, start_as_published

MASKS = ("random", "near")


class PointMAE(GroupedPoints, Autoencoder):
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
        training=TRAINING,
        demo=DEMO,
        baseline="the mean group",
    )
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
        super().__init__(points, groups, group_size)
        one_of("mask", mask, MASKS)
        self.mask, self.mask_ratio = mask, mask_ratio
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
        start_as_published(self.encoder)

    def prepare(self, batch: PointBatch, draw: Draw, progress: Progress) -> View:
        """parts: `maefast.nn.Groups`; plan: of groups."""
        parts = self.parts(batch)
        if self.mask == "near":
            noise = draw.uniform("mask", 1, parts.centres.device)[:, 0]
            return View(parts, masking.near(parts.centres, self.mask_ratio, noise=noise))
        noise = draw.uniform("mask", self.groups, parts.centres.device)
        return View(parts, masking.random(*noise.shape, self.mask_ratio, noise=noise, rule="complement"))

    def score(self, pred: Tensor, view: View) -> dict[str, Tensor]:
        return {"chamfer": self.distance(pred, view.parts, view.plan)}

    def guess(self, view: View) -> Tensor:
        return self.mean_group(view.parts, view.plan)

    def encode(self, batch: PointBatch) -> Tensor:
        """[B, G, D]."""
        return self.encoder(self.parts(batch))

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        return self.scatter(self.compute(view).pred, view.parts, view.plan, names)
