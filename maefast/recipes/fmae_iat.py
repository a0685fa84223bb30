"""FMAE-IAT: a classifier of facial units that unlearns who is seen (Ning et al., 2024, arXiv:2407.11243).

It starts from a masked autoencoder of faces, the recipe `fmae`. With f the norm of the mean of the patches after the
last block, R the identity whose gradient is multiplied by -lambda, and two linear heads,

    loss = mean over units of BCE(head(f), there or not) + mean over subjects of BCE(ID_head(R(f)), one-hot)

so the second head learns the subject, and the encoder learns what it cannot be told from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.data.annotated import Annotated, AnnotatedBatch
from maefast.names import Names
from maefast.nn import Encoder, LayerNorm, Linear, PatchEmbed, position_table
from maefast.nn.layer_decay import decayed_groups, layers_by_start
from maefast.nn.patch_embed import pair, patch_grid
from maefast.nn.reversal import reverse_gradient
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._images import ImageRecipe
from maefast.recipes._sizes import ENCODERS

HEAD_STD = 2e-5  # as MAE is fine-tuned: all units start as likely as not
BP4D = {"units": 12, "subjects": 41, "reversal": 2.0}


class FMAEIAT(ImageRecipe):
    """Args:
        units, subjects: how many there are, U and S.
        reversal: lambda; 0: without the second head, as FMAE is fine-tuned.
        layer_decay: the learning rate of each layer is that of the next one times this.
        img_size, patch_size: int or (height, width). embed_dim, depth, num_heads, drop_path: of the encoder.

    Shapes: images [B, 3, H, W]; target: units [B, U] and subjects, one-hot [B, S]; pred: logits of both.
    """

    spec = Spec(
        name="fmae_iat",
        title="FMAE-IAT, identity adversarial training",
        paper="Ning et al., 2024, arXiv:2407.11243",
        modality="images with units and a subject",
        sizes={
            "large": {**ENCODERS["large"], **BP4D},
            "base": {**ENCODERS["base"], **BP4D},
            "small": {**ENCODERS["small"], **BP4D},
            "large_bp4d_plus": {**ENCODERS["large"], "units": 12, "subjects": 140, "reversal": 1.0},
            "large_disfa": {**ENCODERS["large"], "units": 8, "subjects": 27, "reversal": 0.5},
        },
        training={"blr": 5e-4, "epochs": 30, "warmup": 0.1, "betas": (0.9, 0.999), "min_lr": 1e-6,
                  "crop_scale": (0.08, 1.0)},
        demo={
            # A head that is faster than the encoder keeps up with it.
            "model_args": {"units": 3, "subjects": 8, "reversal": 0.2, "layer_decay": 0.3, "embed_dim": 48, "depth": 2,
                           "num_heads": 2, "drop_path": 0.0},
            "img_size": 48, "patch_size": 8, "steps": 280, "batch_size": 32, "lr": 5e-3, "warmup": 0.1,
            "betas": (0.5, 0.999), "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "picture_rows": 5,
        },
        baseline="how often each unit is there",
    )  # fmt: skip
    names = Names(
        ("", "encoder."),
        ("fc_norm.", "norm."),
        ("head.", "heads.units."),
        ("ID_head.", "heads.subjects."),
        unused=("decoder_", "mask_token", "norm."),
        optional=("norm.", "heads."),
    )

    def __init__(
        self,
        units: int = 12,
        subjects: int = 41,
        reversal: float = 2.0,
        layer_decay: float = 0.65,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        drop_path: float = 0.1,
    ) -> None:
        size, patch = pair("img_size", img_size), pair("patch_size", patch_size)
        super().__init__(3, size)
        if units < 1 or subjects < 1:
            raise ValueError(f"units and subjects must be at least 1, got {units} and {subjects}")
        if not 0 <= reversal < float("inf") or not 0 < layer_decay <= 1:
            raise ValueError(f"reversal must be at least 0 and layer_decay in (0, 1], got {reversal} and {layer_decay}")
        self.wants, self.reversal, self.layer_decay = Annotated(size, units, subjects), reversal, layer_decay
        positions = position_table("sincos", embed_dim, patch_grid(size, patch))
        self.encoder = Encoder(
            PatchEmbed(patch, 3, embed_dim),
            positions.requires_grad_(True),  # as timm's are
            embed_dim,
            depth,
            num_heads,
            drop_path=drop_path,
        )
        self.encoder.norm = nn.Identity()
        self.norm = LayerNorm(embed_dim, eps=1e-6)
        counts = {"units": units, **({"subjects": subjects} if reversal else {})}
        self.heads = nn.ModuleDict({name: Linear(embed_dim, count) for name, count in counts.items()})
        nn.init.trunc_normal_(self.heads["units"].weight, std=HEAD_STD, a=-2 * HEAD_STD, b=2 * HEAD_STD)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        last = len(self.encoder.blocks) + 1
        starts = {f"encoder.blocks.{i}.": i + 1 for i in range(last - 1)}
        layers = layers_by_start(self, {**starts, "encoder.": 0, "norm.": last, "heads.": last})
        return decayed_groups(self, layers, last, weight_decay, self.layer_decay)

    def prepare(self, batch: AnnotatedBatch, draw: Draw, progress: Progress) -> View:
        """Nothing is random here."""
        images = self.images(batch)
        one_hot = batch.subjects[:, None] == torch.arange(self.wants.subjects, device=images.device)
        return View(images, None, {"units": batch.units.to(images), "subjects": one_hot.to(images.dtype)})

    def compute(self, view: View) -> Output:
        found = self.norm(self.encoder.states(view.parts)[0][:, 1:].mean(1))
        pred = {"units": self.heads["units"](found)}
        if self.reversal:
            pred["subjects"] = self.heads["subjects"](reverse_gradient(found, self.reversal))
        return Output(self._terms(pred, view), pred, view)

    def _terms(self, pred: Mapping[str, Tensor], view: View) -> dict[str, Tensor]:
        wide = {name: logits.to(torch.promote_types(logits.dtype, torch.float32)) for name, logits in pred.items()}
        return {
            name: F.binary_cross_entropy_with_logits(logits, view.target[name].to(logits))
            for name, logits in wide.items()
        }

    def baseline(self, view: View) -> Output:
        target = view.target["units"]
        pred = {"units": target.mean(0).logit(1e-4).expand_as(target)}
        return Output(self._terms(pred, view), pred, view)

    def encode(self, batch: AnnotatedBatch) -> Tensor:
        """[B, 1 + N, D] after the last block, class token first."""
        return self.encoder.states(self.images(batch))[0]

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.annotation_sheet import AnnotationSheet

        pred = self.compute(view).pred
        heads = [(name, logits.sigmoid(), view.target[name] > 0) for name, logits in pred.items()]
        caption = f"probabilities that the heads give, true ones dark; lambda {self.reversal:g}"
        return AnnotationSheet(view.parts * self.std + self.mean, heads, names, caption)
