"""Point-CMAE: two masks of one cloud, whose decoders shall agree on what neither saw (Ren et al., 2024,
arXiv:2407.05862).

One encoder sees the visible groups of both masks, each behind a class token of its own; two decoders that share nothing
restore them. With a_i and b_j the unit vectors of the last states of both decoders, in the order of the groups,

    loss = 1000 * (chamfer_1 + chamfer_2) + mean over groups i hidden twice of mean_j (1 - a_i . b_j)

The paper's text compares the same group only (j = i, `pairing="same"`); the authors' code all of them ("all").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import masking, ops
from maefast.data.points import PointBatch
from maefast.names import Names
from maefast.nn import CentrePositions, Decoder, Encoder, Groups, PointEmbed, run_blocks, run_norm
from maefast.nn.decoder import decoder_states
from maefast.nn.init import init_tokens_
from maefast.ops import TokenMask
from maefast.ops._checks import one_of
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._points import DEMO, TRAINING, GroupedPoints, start_as_published

PAIRINGS = ("all", "same")


class PointCMAE(GroupedPoints):
    """Args:
        points: N. groups: G. group_size: K. mask_ratio: int(ratio * G) groups are hidden, in each of two draws.
        pairing: which groups are compared, see above. chamfer: its weight.
        embed_dim, depth, num_heads: of the encoder; the decoders have the same width. drop_path: of all.

    Shapes: points [B, N, 3] -> groups [B, G, K, 3], embedded once; latents [2 B, 1 + visible, D]; pred: two of
    [B, hidden, K * 3]. The plan is a pair.
    """

    spec = Spec(
        name="point_cmae",
        title="Point-CMAE",
        paper="Ren et al., 2024, arXiv:2407.05862",
        modality="point clouds",
        sizes={"small": {}},
        training=TRAINING,
        demo=DEMO,
        baseline="the mean group",
    )
    lead = 1
    names = Names(
        ("MAE_encoder.encoder.", "encoder.patch_embed."),
        ("MAE_encoder.pos_embed.", "encoder.pos_embed."),
        ("MAE_encoder.blocks.blocks.", "encoder.blocks."),
        ("MAE_encoder.norm.", "encoder.norm."),
        *(
            (f"{name}{branch + 1}{dot}", f"{ours}.{branch}{dot}" if ours else f"decoders.{branch}.{part}{dot}")
            for branch in (0, 1)
            for name, ours, part, dot in (
                ("MAE_encoder.cls_token", "cls_tokens", "", ""),
                ("MAE_encoder.cls_pos", "cls_positions", "", ""),
                ("mask_token", "", "mask_token", ""),
                ("decoder_pos_embed", "", "pos_embed", "."),
            )
        ),
        ("MAE_decoder.", "decoders.0."),
        ("MAE_decoder_.", "decoders.1."),
        ("increase_dim.0.", "decoders.0.pred."),
        ("increase_dim_.0.", "decoders.1.pred."),
        pointwise=("MAE_encoder.encoder.", "increase_dim"),
        unused=("MAE_encoder.proj_cls.",),
    )

    def __init__(
        self,
        points: int = 1024,
        groups: int = 64,
        group_size: int = 32,
        mask_ratio: float = 0.6,
        pairing: str = "all",
        chamfer: float = 1000.0,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        decoder_depth: int = 4,
        decoder_num_heads: int = 6,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__(points, groups, group_size)
        one_of("pairing", pairing, PAIRINGS)
        self.mask_ratio, self.pairing, self.chamfer = mask_ratio, pairing, chamfer
        how = {"prefix": 0, "bias": "none", "norm_eps": 1e-5, "drop_path": drop_path}
        embed, positions = PointEmbed(embed_dim), CentrePositions(embed_dim)
        self.encoder = Encoder(embed, positions, embed_dim, depth, num_heads, **how)
        self.cls_tokens, self.cls_positions = (
            nn.ParameterList(nn.Parameter(torch.empty(1, 1, embed_dim)) for _ in range(2)) for _ in range(2)
        )
        self.decoders = nn.ModuleList(
            Decoder(
                embed_dim,
                3 * group_size,
                CentrePositions(embed_dim),
                embed_dim,
                decoder_depth,
                decoder_num_heads,
                embed_bias=None,
                **how,
            )
            for _ in range(2)
        )
        start_as_published(self.encoder)
        init_tokens_(*self.cls_tokens, *self.cls_positions)

    def prepare(self, batch: PointBatch, draw: Draw, progress: Progress) -> View:
        """parts: `maefast.nn.Groups`; plan: two of groups, drawn independently."""
        parts = self.parts(batch)
        noise = (draw.uniform(what, self.groups, parts.centres.device) for what in ("mask", "second mask"))
        plans = (masking.random(*n.shape, self.mask_ratio, noise=n, rule="complement") for n in noise)
        return View(parts, tuple(plans))

    def compute(self, view: View) -> Output:
        latents = self.latents(view.parts, view.plan)
        preds, states = zip(*map(self._decode, self.decoders, latents, view.plan, [view.parts] * 2))
        contrast = self.contrast(*states, view.plan[0].mask & view.plan[1].mask)
        return Output({"chamfer": self._distances(preds, view), "contrast": contrast}, preds, view)

    def latents(self, parts: Groups, plans: Sequence[TokenMask]) -> tuple[Tensor, Tensor]:
        """[B, visible, D] of each mask: both in one batch, groups embedded once."""
        tokens, positions = self.encoder.patch_embed(parts), self.encoder.pos_embed(parts)
        x, each = (
            torch.cat([torch.cat([lead.expand(len(t), -1, -1), ops.gather_tokens(t, plan)], 1)
                       for lead, plan in zip(leads, plans)])
            for t, leads in ((tokens, self.cls_tokens), (positions, self.cls_positions))
        )  # fmt: skip
        x = run_norm(self.encoder.norm, *run_blocks(self.encoder.blocks, x, each=each))
        return x[:, 1:].chunk(2)

    def _decode(self, decoder: Decoder, latent: Tensor, plan: TokenMask, parts: Groups) -> tuple[Tensor, Tensor]:
        """Predictions [B, hidden, K * 3]; the last states [B, G, D] of all groups in their order, not normalised."""
        last = len(decoder.blocks) - 1
        (state,) = decoder_states(
            latent,
            plan,
            (last,),
            embed=decoder.embed,
            mask_token=decoder.mask_token,
            pos_embed=None,
            blocks=decoder.blocks,
            prefix=0,
            each=decoder.pos_embed(parts),
        )
        return decoder.pred(decoder.norm(ops.gather_tokens(state, plan, "masked"))), state

    def contrast(self, a: Tensor, b: Tensor, twice: Tensor) -> Tensor:
        """The second part of the loss; zero where no group is hidden twice. The sum over all j is one over b."""
        a, b = (F.normalize(t.to(torch.promote_types(t.dtype, torch.float32)), dim=-1) for t in (a, b))
        other = b if self.pairing == "same" else b.mean(1, keepdim=True)
        apart = 1 - (a * other).sum(-1)
        return (apart * twice).sum() / twice.sum().clamp_min(1)

    def _distances(self, preds: Sequence[Tensor], view: View) -> Tensor:
        first, second = (self.distance(pred, view.parts, plan) for pred, plan in zip(preds, view.plan))
        return self.chamfer * (first + second)

    def baseline(self, view: View) -> Output:
        preds = [self.mean_group(view.parts, plan) for plan in view.plan]
        return Output({"chamfer": self._distances(preds, view)}, preds, view)

    def encode(self, batch: PointBatch) -> Tensor:
        """[B, 1 + G, D], the first class token in front."""
        parts = self.parts(batch)
        tokens, positions = self.encoder.patch_embed(parts), self.encoder.pos_embed(parts)
        x, each = (
            torch.cat([lead[0].expand(len(t), -1, -1), t], 1)
            for lead, t in ((self.cls_tokens, tokens), (self.cls_positions, positions))
        )
        return run_norm(self.encoder.norm, *run_blocks(self.encoder.blocks, x, each=each))

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        return self.scatter(self.compute(view).pred[0], view.parts, view.plan[0], names)
