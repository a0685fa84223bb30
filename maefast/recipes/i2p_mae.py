"""I2P-MAE: point clouds in three scales, hidden where a 2-D teacher looks least (Zhang et al., CVPR 2023,
arXiv:2212.06785; on Point-M2AE, Zhang et al., NeurIPS 2022, arXiv:2205.14401).

Three depth pictures of a cloud, one along each axis, go through a frozen image model. Where its class token looks is
read at the coarsest centres, s [G_3], mean of the pictures; the visible groups are drawn without replacement in
proportion to softmax(s / temperature), and on finer scales what belongs to visible groups is visible. A transformer
on three scales sees these; a decoder restores the middle scale, and with P, Q the predicted and true members of its
hidden groups, F and f those of the teacher's features at the members of its visible groups,

    loss = mean over hidden groups of chamfer(P, Q) + mean over visible groups and members of |F - f|^2 / width
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from maefast import masking, ops
from maefast.data.images.batch import normaliser
from maefast.data.points import PointBatch
from maefast.names import Names
from maefast.nn import Linear
from maefast.nn.point_groups import PointScales, check_scales, flat_members, point_scales
from maefast.nn.point_scales import ScaleDecoder, ScaleEncoder, interpolation
from maefast.nn.point_views import VIEWS, looked_at, sample_maps, view_frame, view_pixels
from maefast.nn.teachers import FeatureTeacher, Frozen
from maefast.ops import TokenMask
from maefast.ops._checks import one_of, positive
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._images import IMAGE_TEACHERS, image_teacher
from maefast.recipes._points import DEMO, TRAINING, GroupedPoints, start_as_published

MASKS = ("attention", "random")


class I2PMAE(GroupedPoints):
    """Args:
        teacher: what `maefast.nn.teachers.FeatureTeacher` takes; or the name or folder of a
            CLIPVisionModelWithProjection or, with "dino" in it, a ViTModel, for transformers; or "random": a small
            mae_* model with fresh weights, for demos.
        points: N. groups, group_sizes: G and K of each scale, the finest first.
        mask: "attention" of the teacher, or "random". mask_ratio: int(ratio * G) groups of the coarsest scale are
            hidden. temperature: see above; 1 as published, which is nearly uniform, since attention sums to 1.
        embed_dims, depths: of the encoder's scales. decoder_depths: of all scales but the finest, the coarsest first.
            up_depths: residual layers between them. num_heads, drop_path: of all. embed_all: see
            `maefast.nn.point_scales.ScaleEncoder`.
        img_size, patch_size: of the teacher's pictures. teacher_dim: width of its features, where none is given.
        bug_compat: as the authors' code does: token 0 of sample 0 is always visible on finer scales, a CLIP sees
            pictures with ImageNet's mean and standard deviation, and `encode` leaves out what belongs to no group.

    Shapes: points [B, N, 3] -> scales of groups [B, G, K, 3]; plan: one for each scale, ragged but for the coarsest;
    target: features at the finest centres, [B, G_1, 3 * width]; pred: [M, K * 3] of hidden and [T, K * 3 * width] of
    visible groups of the second scale.
    """

    spec = Spec(
        name="i2p_mae",
        title="I2P-MAE",
        paper="Zhang et al., CVPR 2023, arXiv:2212.06785",
        modality="point clouds, a teacher of images",
        sizes={"small": {}},
        training={**TRAINING, "batch_size": 64},
        demo={
            **DEMO,
            "model_args": {
                "teacher": "random", "points": 256, "groups": [64, 32, 16], "group_sizes": [6, 6, 3],
                "embed_dims": [24, 48, 96], "depths": [1, 1, 2], "num_heads": 3, "drop_path": 0.0, "img_size": 128,
                "patch_size": 16, "teacher_dim": 32,
            },
            "steps": 200, "batch_size": 8, "lr": 4e-3,
        },
        baseline="the mean group and the mean feature",
    )  # fmt: skip
    names = Names(
        ("h_encoder.token_embed.", "encoder.embeds."),
        ("h_encoder.encoder_pos_embeds.", "encoder.pos_embeds."),
        ("h_encoder.encoder_blocks.", "encoder.stages."),
        ("h_encoder.encoder_norms.", "encoder.norms."),
        ("mask_token", "decoder.mask_token"),
        ("h_decoder.", "decoder.stages."),
        ("decoder_pos_embeds.", "decoder.pos_embeds."),
        ("token_prop.", "decoder.props."),
        ("decoder_norm.", "decoder.norm."),
        ("rec_head_3d.", "pred_points."),
        ("rec_head_2d.", "pred_features."),
        pointwise=("h_encoder.token_embed.", "token_prop.", "rec_head_"),
        unused=("clip_model.",),
    )

    def __init__(
        self,
        teacher: nn.Module | str | None = None,
        points: int = 2048,
        groups: Sequence[int] = (512, 256, 64),
        group_sizes: Sequence[int] = (16, 8, 8),
        mask: str = "attention",
        mask_ratio: float = 0.8,
        temperature: float = 1.0,
        embed_dims: Sequence[int] = (96, 192, 384),
        depths: Sequence[int] = (5, 5, 5),
        num_heads: int = 6,
        decoder_depths: Sequence[int] = (1, 1),
        up_depths: Sequence[int] = (1,),
        drop_path: float = 0.1,
        embed_all: bool = True,
        img_size: int = 224,
        patch_size: int = 16,
        teacher_dim: int = 512,
        bug_compat: bool = False,
    ) -> None:
        check_scales(points, groups, group_sizes)
        if not 2 <= len(groups) == len(embed_dims) == len(decoder_depths) + 1:
            raise ValueError(
                f"groups {groups} need a width of embed_dims each, and of decoder_depths one less, at least one"
            )
        super().__init__(points, groups[1], group_sizes[1])
        one_of("mask", mask, MASKS)
        positive("temperature", temperature)
        self.scales, self.mask, self.mask_ratio, self.temperature = (groups, group_sizes), mask, mask_ratio, temperature
        self.img_size, self.bug_compat = img_size, bug_compat
        sizes = {"embed_dim": teacher_dim, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1}
        made = image_teacher(teacher, FeatureTeacher, img_size=img_size, patch_size=patch_size, **sizes)
        self.teacher = None if made is None else Frozen(made)
        if made is not None:
            teacher_dim, made.clip = made.width, made.clip and not bug_compat
        self.encoder = ScaleEncoder(embed_dims, depths, num_heads, drop_path, embed_all)
        start_as_published(self.encoder)
        self.decoder = ScaleDecoder(embed_dims[:0:-1], decoder_depths, num_heads, up_depths, drop_path)
        self.pred_points = Linear(embed_dims[1], group_sizes[1] * 3)
        self.pred_features = Linear(embed_dims[1], group_sizes[1] * len(VIEWS) * teacher_dim)
        self.encoder.norms[0].requires_grad_(False)  # part of the published files, and read by nobody

    def missing(self) -> str | None:
        return None if self.teacher else IMAGE_TEACHERS

    def prepare(self, batch: PointBatch, draw: Draw, progress: Progress) -> View:
        """parts: `PointScales`, and `interpolation` to each scale but the finest from the next."""
        self.require()
        points = self.cloud(batch)
        scales = point_scales(points, *self.scales)
        centres = [groups.centres for groups in scales.groups]
        frame = view_frame(points, self.img_size)
        features, looks = looked_at(self.teacher, points, frame, *normaliser(3, points.device))
        noise = draw.uniform("mask", centres[-1].shape[1], points.device)
        salience = torch.zeros_like(noise)
        if self.mask == "attention":
            salience = sample_maps(looks, view_pixels(centres[-1], frame), self.img_size)[..., 0].mean(1)
        weights = (salience / self.temperature).softmax(1)
        plan = masking.weighted(weights, self.mask_ratio, noise=noise, rule="complement", order="position")
        target = sample_maps(features, view_pixels(centres[0], frame), self.img_size).transpose(1, 2).flatten(2)
        up = tuple(interpolation(fine, coarse) for fine, coarse in pairwise(centres[1:]))
        return View((scales, up), self.plans(plan, scales), target)

    def plans(self, plan: TokenMask, scales: PointScales) -> tuple[TokenMask, ...]:
        """Of all scales, the finest first, from that of the coarsest."""
        plans = [plan]
        for below, index in zip(scales.groups[-2::-1], scales.index[:0:-1]):
            plans.insert(0, masking.children(plans[0], index, below.centres.shape[1], bug_compat=self.bug_compat))
        return tuple(plans)

    def compute(self, view: View) -> Output:
        (scales, up), plan = view.parts, view.plan[1]
        states = self.decoder(self.encoder(scales, view.plan), view.plan, scales, up)
        hidden, seen = (ops.gather_tokens(states, plan, which) for which in ("masked", "visible"))
        pred = self.pred_points(hidden), self.pred_features(seen)
        return Output(self._terms(pred, view), pred, view)

    def _terms(self, pred: Sequence[Tensor], view: View) -> dict[str, Tensor]:
        points, features = pred
        scales, plan, width = view.parts[0], view.plan[1], view.target.shape[2]
        rows = flat_members(scales.index[1], view.target.shape[1])[plan.visible.long()].flatten()
        return {
            "chamfer": self.distance(points, scales.groups[1], plan),
            "features": ops.feature_loss(features.reshape(-1, width), view.target.flatten(0, 1), index=rows),
        }

    def baseline(self, view: View) -> Output:
        groups, plan = view.parts[0].groups[1], view.plan[1]
        mean = view.target.mean((0, 1)).repeat(self.group_size)
        pred = self.mean_group(groups, plan), mean.expand(plan.total_visible, -1)
        return Output(self._terms(pred, view), pred, view)

    def encode(self, batch: PointBatch) -> Tensor:
        """[B, G, D] of the coarsest scale."""
        scales = point_scales(self.cloud(batch), *self.scales)
        coarsest = scales.groups[-1].centres
        every = TokenMask.all_visible(*coarsest.shape[:2], coarsest.device)
        return self.encoder(scales, self.plans(every, scales) if self.bug_compat else None)[-1]

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        """Of the second scale's groups."""
        pred, groups = self.compute(view).pred[0], view.parts[0].groups[1]
        caption = f"{self.mask_ratio:.0%} of the coarsest groups masked"
        return self.scatter_in_place(pred, groups, view.plan[1], names, caption)
