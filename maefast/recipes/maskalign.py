"""MaskAlign: features of visible patches, aligned with those of a teacher that sees the whole image (Xue et al., CVPR
2023, arXiv:2211.08887).

Patches stay visible with a probability in proportion to how much the teacher's class token looks at them. There are no
mask tokens and no decoder. With h_j the outputs of the student's blocks, m_i = sum_j mix_ij h_j, and t_i those of the
teacher's, for the five last layers i, class token and visible patches,

    loss = mean over i of 2 * smooth_l1(head_i(m_i), LayerNorm(t_i))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import masking, ops
from maefast.data.images.batch import ImageBatch
from maefast.names import Names
from maefast.nn import Encoder, Linear, PatchEmbed, position_table
from maefast.nn.patch_embed import pair, patch_grid
from maefast.nn.teachers import Frozen
from maefast.ops import TokenMask
from maefast.ops._checks import one_of
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._images import IMAGE_TEACHERS, ImageRecipe, feature_sheet, image_teacher

EPS = 1e-5  # of the targets' LayerNorm
MASKS = ("attention", "random")


class MaskAlign(ImageRecipe):
    """Args:
        teacher: what `maefast.nn.teachers.ImageTeacher` takes; or the name or folder of a CLIPVisionModel or, with
            "dino" in it, a ViTModel, for transformers; or "random": a mae_* model of the student's size with fresh
            weights, for demos. As many blocks as the student.
        mask: "attention" or "random". mask_ratio: int(N * (1 - ratio)) patches stay visible.
        layers: how many of the last layers are aligned.
        img_size, patch_size, embed_dim, depth, num_heads, drop_path: of the student. teacher_dim: width of the teacher,
            where none is given.

    Shapes: images [B, 3, H, W]; target: `layers` of [B, 1 + N, D of the teacher]; pred: as many of [B, 1 + visible, D].
    """

    spec = Spec(
        name="maskalign",
        title="MaskAlign",
        paper="Xue et al., CVPR 2023, arXiv:2211.08887",
        modality="images, a teacher",
        sizes={
            "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
            "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "teacher_dim": 1024},
        },
        training={"blr": 1.5e-4, "epochs": 200, "warmup": 0.1},
        demo={
            "model_args": {"teacher": "random", "embed_dim": 96, "depth": 6, "num_heads": 3, "drop_path": 0.0},
            "img_size": 64, "patch_size": 8, "steps": 200, "batch_size": 32, "lr": 1e-3, "warmup": 0.1,
        },
        baseline="the mean of each layer's features",
    )  # fmt: skip
    names = Names(("", "encoder."), ("distill_heads.", "heads."), ("distill_weights", "mix"))

    def __init__(
        self,
        teacher: nn.Module | str | None = None,
        mask: str = "attention",
        mask_ratio: float = 0.7,
        layers: int = 5,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        drop_path: float = 0.1,
        teacher_dim: int = 768,
    ) -> None:
        size, patch = pair("img_size", img_size), pair("patch_size", patch_size)
        super().__init__(3, size)
        one_of("mask", mask, MASKS)
        if not 1 <= layers <= depth:
            raise ValueError(f"layers must lie in 1 to {depth}, the depth, got {layers}")
        self.mask, self.mask_ratio, self.layers, self.grid = mask, mask_ratio, layers, patch_grid(size, patch)
        arguments = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        made = image_teacher(teacher, img_size=img_size, patch_size=patch_size, **arguments)
        self.teacher = None if made is None else Frozen(made)
        if self.teacher:
            teacher_dim = self.teacher.module.width
            if self.teacher.module.depth != depth:
                raise ValueError(f"a teacher of {self.teacher.module.depth} blocks for a student of {depth}")
        self.encoder = Encoder(
            PatchEmbed(patch, 3, embed_dim),
            position_table("sincos", embed_dim, self.grid),
            embed_dim,
            depth,
            num_heads,
            drop_path=drop_path,
        )
        self.heads = nn.ModuleList(Linear(embed_dim, teacher_dim) for _ in range(depth))
        for head in self.heads:
            nn.init.xavier_uniform_(head.weight)
            nn.init.zeros_(head.bias)
        self.mix = nn.Parameter(torch.eye(depth) + 0.01)
        # Part of the published files, and of no gradient.
        for unused in (self.encoder.norm, *self.heads[: depth - layers]):
            unused.requires_grad_(False)

    def missing(self) -> str | None:
        return None if self.teacher else IMAGE_TEACHERS

    def prepare(self, batch: ImageBatch, draw: Draw, progress: Progress) -> View:
        self.require()
        images = self.images(batch)
        depth = len(self.heads)
        states, attention = self.teacher(images, range(depth - self.layers, depth))
        if attention.shape[1] != self.grid[0] * self.grid[1]:
            grid = "x".join(map(str, self.grid))
            raise ValueError(f"teacher has {attention.shape[1]} patches, the student {grid}")
        if self.mask == "random":
            return View(images, self.plan(images, draw, attention.shape[1], self.mask_ratio), tuple(states))
        noise = draw.uniform("mask", attention.shape[1], images.device)
        return View(images, masking.weighted(attention, self.mask_ratio, noise=noise), tuple(states))

    def compute(self, view: View) -> Output:
        heads = self.heads[-self.layers :]
        pred = [head(mixed) for head, mixed in zip(heads, self._mixed(view.parts, view.plan))]
        return Output(self._terms(pred, view), pred, view)

    def _mixed(self, images: Tensor, plan: TokenMask | None) -> Tensor:
        """[layers, B, 1 + visible, D]: only the rows of the mix that are used."""
        states = torch.stack(self.encoder.states(images, plan, at=range(len(self.heads))))
        return torch.tensordot(self.mix[-self.layers :].to(states.dtype), states, 1)

    def _terms(self, pred: Sequence[Tensor], view: View) -> dict[str, Tensor]:
        rows = seen_rows(view.plan)
        how = {"index": rows, "norm": "layernorm", "eps": EPS, "loss": "smooth_l1"}
        each = [2 * ops.feature_loss(mine, theirs, **how) for mine, theirs in zip(pred, view.target)]
        return {"features": torch.stack(each).mean()}

    def baseline(self, view: View) -> Output:
        rows = seen_rows(view.plan)
        normal = [F.layer_norm(t.flatten(0, 1), t.shape[-1:], eps=EPS).mean(0) for t in view.target]
        pred = [mean.expand(*rows.shape, -1) for mean in normal]
        return Output(self._terms(pred, view), pred, view)

    def encode(self, batch: ImageBatch) -> Tensor:
        """[B, 1 + N, D], the output of the last block."""
        return self.encoder.states(self.images(batch), None, at=(-1,))[0]

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images import pictures

        mine = self.heads[-1](self._mixed(view.parts, None)[-1])[:, 1:]
        theirs = F.layer_norm(view.target[-1], view.target[-1].shape[-1:], eps=EPS)[:, 1:]
        columns = feature_sheet(view.parts * self.std + self.mean, ~view.plan.mask, (theirs, mine), self.grid)
        labels = ("original", "visible", "teacher", "student")
        caption = f"{self.mask_ratio:.0%} masked\nlast layer's features as colours, the student's of the whole image"
        return pictures.Sheet(columns, names, caption, labels)


def seen_rows(plan: TokenMask) -> Tensor:
    """int64 [B, 1 + visible]: where class token and visible tokens stand among all samples' 1 + N rows."""
    first = torch.zeros(plan.batch, 1, dtype=torch.long, device=plan.device)
    start = torch.arange(plan.batch, device=plan.device)[:, None] * (1 + plan.num_tokens)
    return torch.cat([first, 1 + plan.ids_keep], 1) + start
