"""G2SD, generic stage: a small masked autoencoder that learns the decoder's features of a large one (Huang et al., CVPR
2023, arXiv:2302.14431).

Both see the same visible patches. With d the output of the student's last decoder block and t that of the teacher's
fourth, for every token, class token and visible ones too,

    loss = mean of smooth_l1(head(d), LayerNorm(t)), beta 2

The teacher is stopped there. The second stage, which is supervised, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from maefast import models, ops
from maefast.data.images.batch import ImageBatch
from maefast.names import Names
from maefast.nn import Mlp
from maefast.nn.init import init_weights_
from maefast.nn.teachers import Frozen, teaching
from maefast.ops._checks import one_of
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._images import ImageRecipe, feature_sheet, mae_teacher, mean_feature, must_have, same_grid
from maefast.recipes._sizes import both

_SMALL, _TINY, _TOY = both(384, 12, 6, 256, 4, 8), both(192, 12, 3, 128, 4, 4), both(96, 3, 3, 64, 2, 2)
ROWS = ("all", "masked")


class G2SD(ImageRecipe):
    """Args:
        teacher: a `maefast.models.MaskedAutoencoderViT`, or a file of the weights of a whole one, with its decoder;
            "random" for fresh ones, which teach nothing and serve demos.
        teacher_model: the teacher's name in `maefast.models`. teacher_at: the block of its decoder, from 0.
        student_args, teacher_args: arguments of both models. img_size, patch_size: of both.
        rows: "all" tokens are compared, as published, or the "masked" ones. beta: of the smooth L1.
        mask_ratio: int(N * (1 - ratio)) patches stay visible.

    Shapes: images [B, 3, H, W]; target [B, 1 + N, D of the teacher's decoder], or [B, masked, D]; pred likewise.
    """

    spec = Spec(
        name="g2sd",
        title="G2SD, generic stage",
        paper="Huang et al., CVPR 2023, arXiv:2302.14431",
        modality="images, a teacher",
        sizes={"small": {"student_args": _SMALL}, "tiny": {"student_args": _TINY}},
        training={"blr": 1.5e-4, "epochs": 300, "warmup": 1 / 30, "batch_size": 256},
        demo={
            "model_args": {"teacher": "random", "teacher_at": 1, "student_args": _TOY, "teacher_args": _TOY},
            "img_size": 64, "patch_size": 8, "steps": 200, "batch_size": 32, "lr": 1e-3, "warmup": 0.1,
        },
        baseline="the mean of the teacher's features",
    )  # fmt: skip
    names = Names(("", "student."), ("decoderfeature_pred.", "head."), unused=("encoderfeature_pred.",))

    def __init__(
        self,
        teacher: nn.Module | str | None = None,
        teacher_model: str = "mae_base",
        teacher_at: int = 3,
        student_args: dict[str, Any] | None = None,
        teacher_args: dict[str, Any] | None = None,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        mask_ratio: float = 0.75,
        rows: str = "all",
        beta: float = 2.0,
    ) -> None:
        one_of("rows", rows, ROWS)
        images = {"img_size": img_size, "patch_size": patch_size}
        student = models.create("mae", **images, **(_SMALL if student_args is None else student_args))
        super().__init__(3, student.img_size)
        self.student, self.mask_ratio, self.rows, self.beta = student, mask_ratio, rows, beta
        reader = mae_teacher(teacher, teacher_model, {**images, **(teacher_args or {})}, part="all")
        same_grid(reader, student)
        must_have(reader, teacher_at, "teacher_at", "decoder_depth")
        self.teacher, self.teacher_at = None if teacher is None else Frozen(reader), teacher_at
        width = reader.config["decoder_embed_dim"]
        self.head = Mlp(student.config["decoder_embed_dim"], width, width)
        init_weights_(self.head)
        # Of the published files, and of no gradient: the student predicts no pixels.
        for unused in (student.decoder_norm, student.decoder_pred):
            unused.requires_grad_(False)

    def missing(self) -> str | None:
        how = "teacher=FILE (--model-arg), weights of a whole mae_* model, a module in Python, or teacher=random"
        return None if self.teacher else f"a teacher: {how}"

    def prepare(self, batch: ImageBatch, draw: Draw, progress: Progress) -> View:
        self.require()
        images, model = self.images(batch), self.teacher.module
        plan = self.plan(images, draw, self.student.num_patches, self.mask_ratio)
        with teaching():
            states = model.decoder_states(model.encode_visible(images, plan), plan, (self.teacher_at,))[0]
        return View(images, plan, self._rows(states, plan))

    def compute(self, view: View) -> Output:
        state = self.student.decoder_states(self.student.encode_visible(view.parts, view.plan), view.plan)[0]
        pred = self.head(self._rows(state, view.plan))
        return Output(self._terms(pred, view), pred, view)

    def _rows(self, state: Tensor, plan: ops.TokenMask) -> Tensor:
        if self.rows == "all":
            return state
        return ops.gather_tokens(state, plan, "masked", prefix=1, keep_prefix=False)

    def _terms(self, pred: Tensor, view: View) -> dict[str, Tensor]:
        how = {"norm": "layernorm", "loss": "smooth_l1", "beta": self.beta}
        return {"features": ops.feature_loss(pred, view.target, **how)}

    def baseline(self, view: View) -> Output:
        normal = F.layer_norm(view.target, view.target.shape[-1:], eps=1e-6)
        pred = mean_feature(normal)
        return Output(self._terms(pred, view), pred, view)

    def encode(self, batch: ImageBatch) -> Tensor:
        """[B, 1 + N, D], class token first."""
        return self.student.encode(self.images(batch))

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images import pictures

        model, plan = self.teacher.module, view.plan
        theirs = model.decoder_states(model.encode_visible(view.parts, plan), plan, (self.teacher_at,))[0]
        mine = self.head(self.student.decoder_states(self.student.encode_visible(view.parts, plan), plan)[0])
        theirs = F.layer_norm(theirs, theirs.shape[-1:], eps=1e-6)
        images = view.parts * self.std + self.mean
        columns = feature_sheet(images, ~plan.mask, (theirs[:, 1:], mine[:, 1:]), self.student.grid_size)
        caption = f"{self.mask_ratio:.0%} masked\nfeatures of both decoders as colours"
        return pictures.Sheet(columns, names, caption, ("original", "visible", "teacher", "student"))
