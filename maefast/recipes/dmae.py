"""DMAE: a small masked autoencoder beside a large one that is done learning (Bai et al., CVPR 2023, arXiv:2208.12256).

Both see the same visible patches. The teacher stops at the layer that is read, three quarters deep, where the authors'
code runs it to its end, decoder and all. With s and t the outputs of the student's and the teacher's block,

    loss = MAE's loss on the pixels of hidden patches + weight * mean |head(s) / |head(s)| - t / |t||

the mean over class token, visible tokens and all D values of the unit vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from maefast import models, ops
from maefast.data.images.batch import ImageBatch
from maefast.names import Names
from maefast.nn import Linear
from maefast.nn.teachers import Frozen
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._images import ImageRecipe, mae_teacher, mean_colour, mean_feature, must_have, same_grid
from maefast.recipes._sizes import both

_TOY = both(96, 4, 3, 64, 2, 2)


class DMAE(ImageRecipe):
    """Args:
        teacher: a `maefast.models.MaskedAutoencoderViT` (or a module with its `states` and `embed_dim` in `config`), or
            a file of its weights, as `maefast.models.load_checkpoint` reads it; "random" for fresh ones, which teach
            nothing and serve demos. Only its encoder is used.
        teacher_model: the teacher's name in `maefast.models`, where it is read from a file.
        student: the student's name there. img_size, patch_size: of both.
        mask_ratio: 0.75; the paper goes up to 0.98, three visible patches.
        at, teacher_at: the block, from 0, whose output is compared.
        weight: of the features. norm_pix: normalised pixels.
        student_args, teacher_args: further arguments of both models.

    Shapes: images [B, 3, H, W]; target [B, 1 + visible, D of the teacher]; pred [B, hidden, 3 * p * p].
    """

    spec = Spec(
        name="dmae",
        title="DMAE",
        paper="Bai et al., CVPR 2023, arXiv:2208.12256",
        modality="images, a teacher",
        sizes={
            "base": {"student": "mae_base", "teacher_model": "mae_large", "at": 8, "teacher_at": 17},
            "small": {"student": "mae_small", "teacher_model": "mae_base", "at": 8, "teacher_at": 8},
        },
        training={"blr": 1.5e-4, "epochs": 100, "warmup": 0.2, "batch_size": 128},
        demo={
            "model_args": {"teacher": "random", "teacher_args": {**_TOY, "embed_dim": 192}, "at": 2, "teacher_at": 2,
                           "student_args": _TOY},
            "img_size": 64, "patch_size": 8, "steps": 200, "batch_size": 32, "lr": 1e-3, "warmup": 0.1,
        },
        baseline="the mean colour and the mean feature",
    )  # fmt: skip
    names = Names(("", "student."), ("aligned_feature_projection_heads.0.", "head."))

    def __init__(
        self,
        teacher: nn.Module | str | None = None,
        teacher_model: str = "mae_large",
        student: str = "mae_base",
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        mask_ratio: float = 0.75,
        at: int = 8,
        teacher_at: int = 17,
        weight: float = 1.0,
        norm_pix: bool = False,
        student_args: dict[str, Any] | None = None,
        teacher_args: dict[str, Any] | None = None,
    ) -> None:
        images = {"img_size": img_size, "patch_size": patch_size}
        made = models.create(student, **images, norm_pix_loss=norm_pix, **(student_args or {}))
        super().__init__(3, made.img_size)
        self.student, self.mask_ratio, self.weight = made, mask_ratio, weight
        self.at, self.teacher_at = at, teacher_at
        reader = mae_teacher(teacher, teacher_model, {**images, **(teacher_args or {})})
        self.teacher = None if teacher is None else Frozen(reader)
        same_grid(reader, made)
        must_have(reader, teacher_at, "teacher_at")
        must_have(made, at, "at")
        self.head = Linear(made.config["embed_dim"], reader.config["embed_dim"])

    def missing(self) -> str | None:
        how = "teacher=FILE (--model-arg), weights of a mae_* model, a module in Python, or teacher=random"
        return None if self.teacher else f"a teacher: {how}"

    def prepare(self, batch: ImageBatch, draw: Draw, progress: Progress) -> View:
        self.require()
        images = self.images(batch)
        plan = self.plan(images, draw, self.student.num_patches, self.mask_ratio)
        return View(images, plan, self.teacher.states(images, plan, at=(self.teacher_at,))[0])

    def compute(self, view: View) -> Output:
        taps = {self.at: None}
        latent = self.student.encode_visible(view.parts, view.plan, taps=taps)
        pred = self.student.decode(latent, view.plan)
        return Output(self._terms(pred, self.head(taps[self.at]), view), pred, view)

    def _terms(self, pred: Tensor, features: Tensor, view: View) -> dict[str, Tensor]:
        norm = "mae" if self.student.norm_pix_loss else "none"
        pixels = ops.patch_loss(pred, view.parts, view.plan, self.student.patch_size, norm=norm)
        return {
            "pixels": pixels,
            "features": self.weight * ops.feature_loss(features, view.target, norm="l2", loss="l1"),
        }

    def baseline(self, view: View) -> Output:
        pred = mean_colour(view.parts, self.student.patch_size, view.plan.total_masked)
        pred = pred * 0 if self.student.norm_pix_loss else pred
        return Output(self._terms(pred, mean_feature(view.target), view), pred, view)

    def encode(self, batch: ImageBatch) -> Tensor:
        """[B, 1 + N, D], class token first."""
        return self.student.encode(self.images(batch))

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images import pictures

        columns = pictures.columns_of(self.student, view.parts, self.mean, self.std, mask=view.plan)
        return pictures.Sheet(columns, names, f"{self.mask_ratio:.0%} masked\n{pictures.note(self.student, False)}")
