"""MR-MAE: visible patches mimic a teacher, hidden ones are restored (Gao et al., 2023, arXiv:2303.05475).

An MAE, plain or with the convolution stages of MCMAE (ConvMAE), whose encoder is held against features that a frozen
CLIP or DINO has of the whole image. With z_n the latent of patch n, t_n the teacher's feature there and x_n its pixels,
normalised patch by patch,

    loss = mean over hidden n of |pred_n - x_n|^2 + weight * mean over visible n of |head(z_n) - t_n|^2
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from maefast import masking, ops
from maefast.data.images.batch import ImageBatch
from maefast.names import MAE_DECODER, Names
from maefast.nn import Decoder, Encoder, Linear, PatchEmbed, position_table
from maefast.nn.conv_vit import PATCH, ConvViT
from maefast.nn.fusion import LayerFusion
from maefast.nn.init import init_weights_
from maefast.nn.patch_embed import pair, patch_grid
from maefast.nn.patches import reconstruct
from maefast.nn.teachers import Frozen
from maefast.ops import TokenMask
from maefast.ops._checks import one_of
from maefast.ops.feature_loss import KINDS, NORMS
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._images import IMAGE_TEACHERS, ImageRecipe, feature_sheet, image_teacher, mean_colour, mean_feature
from maefast.recipes._sizes import check_visible

BACKBONES, MASKS = ("mcmae", "vit"), ("random", "attention", "salient")


class MRMAE(ImageRecipe):
    """Args:
        teacher: as `maefast.recipes._images.image_teacher` takes it: a module, a name or folder for transformers, or
            "random" for demos. Of as many patches as the student. teacher_at: its block that is mimicked, from 0;
            negative numbers count from the last. teacher_dim: its width, where none is given.
        backbone: "mcmae", without class token and with patches of 16 x 16 pixels, or "vit".
        mask: "random"; focused mimicking: "salient", the patches that the teacher's class token looks at most stay
            visible, or "attention", patches are drawn in proportion to that. mask_ratio: int(N * (1 - ratio)) stay.
        fused: transformer blocks, from 0, whose outputs are added to the latents, see `LayerFusion`.
        weight, mimic_norm, mimic_loss: of the mimic term, see `ops.feature_loss`. norm_pix: normalised pixels.
        conv_dims, conv_depths, conv_mlp_ratio: of MCMAE's stages, see `ConvViT`. embed_dim, depth, num_heads: of the
            transformer; decoder_*: of the decoder.

    Shapes: images [B, 3, H, W]; target [B, visible, D of the teacher]; pred: pixels [B, hidden, 3 * p * p] and features
    like target.
    """

    spec = Spec(
        name="mr_mae",
        title="MR-MAE",
        paper="Gao et al., 2023, arXiv:2303.05475",
        modality="images, a teacher",
        sizes={"base": {}, "vit_base": {"backbone": "vit", "depth": 12}},
        training={"blr": 1.5e-4, "epochs": 400, "warmup": 0.1},
        demo={
            "model_args": {"teacher": "random", "backbone": "vit", "norm_pix": False, "embed_dim": 96, "depth": 4,
                           "num_heads": 3, "decoder_embed_dim": 64, "decoder_depth": 2, "decoder_num_heads": 2},
            "img_size": 64, "patch_size": 8, "steps": 200, "batch_size": 16, "lr": 2e-3, "warmup": 0.1,
        },
        baseline="the mean colour and the mean feature",
    )  # fmt: skip
    names = Names(
        ("", "encoder."), *MAE_DECODER, ("head.", "head."), ("fusion.", "fusion."), optional=("head.", "fusion.")
    )

    def __init__(
        self,
        teacher: nn.Module | str | None = None,
        teacher_at: int = -1,
        teacher_dim: int = 768,
        backbone: str = "mcmae",
        mask: str = "random",
        mask_ratio: float = 0.75,
        fused: Sequence[int] = (),
        weight: float = 1.0,
        mimic_norm: str = "none",
        mimic_loss: str = "mse",
        norm_pix: bool = True,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = PATCH,
        conv_dims: Sequence[int] = (256, 384),
        conv_depths: Sequence[int] = (2, 2),
        conv_mlp_ratio: float = 4.0,
        embed_dim: int = 768,
        depth: int = 11,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
    ) -> None:
        size, patch = pair("img_size", img_size), pair("patch_size", patch_size)
        super().__init__(3, size)
        for name, value, known in (
            *(("backbone", backbone, BACKBONES), ("mask", mask, MASKS)),
            *(("mimic_norm", mimic_norm, tuple(NORMS)), ("mimic_loss", mimic_loss, tuple(KINDS))),
        ):
            one_of(name, value, known)
        if backbone == "mcmae" and patch != (PATCH, PATCH):
            raise ValueError(f"patch_size must be {PATCH} with the backbone mcmae, got {patch_size}")
        if len(set(fused)) != len(fused) or not all(0 <= index < depth for index in fused):
            raise ValueError(f"fused must name some of {depth} blocks, from 0, each once, got {list(fused)}")
        made = image_teacher(
            teacher, img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads
        )
        self.teacher, self.teacher_at = None if made is None else Frozen(made), teacher_at
        if made:
            teacher_dim = made.width
            if not -made.depth <= teacher_at < made.depth:
                raise ValueError(f"teacher_at must name one of {made.depth} blocks, got {teacher_at}")
        self.patch, self.grid, self.lead = patch, patch_grid(size, patch), int(backbone == "vit")
        check_visible("mask_ratio", mask_ratio, self.grid[0] * self.grid[1])
        self.mask, self.mask_ratio, self.fused = mask, mask_ratio, tuple(fused)
        self.weight, self.mimic = weight, {"norm": mimic_norm, "loss": mimic_loss}
        self.norm = "mae" if norm_pix else "none"
        if backbone == "mcmae":
            self.encoder = ConvViT(
                self.grid, 3, conv_dims, conv_depths, embed_dim, depth, num_heads, conv_mlp_ratio=conv_mlp_ratio
            )
        else:
            table = position_table("sincos", embed_dim, self.grid)
            self.encoder = Encoder(PatchEmbed(patch, 3, embed_dim), table, embed_dim, depth, num_heads)
        self.fusion = LayerFusion(embed_dim, len(fused))
        self.head = Linear(embed_dim, teacher_dim)
        init_weights_(self.head)
        self.decoder = Decoder(
            embed_dim,
            3 * patch[0] * patch[1],
            position_table("sincos", decoder_embed_dim, self.grid, prefix=self.lead),
            decoder_embed_dim,
            decoder_depth,
            decoder_num_heads,
            prefix=self.lead,
        )

    def missing(self) -> str | None:
        return None if self.teacher else IMAGE_TEACHERS

    def prepare(self, batch: ImageBatch, draw: Draw, progress: Progress) -> View:
        self.require()
        images = self.images(batch)
        features, attention = self.taught(images)
        if features.shape[1] != 1 + self.grid[0] * self.grid[1]:
            grid = "x".join(map(str, self.grid))
            raise ValueError(f"teacher has {features.shape[1] - 1} patches, the student {grid}")
        plan = self.visible(attention, draw)
        return View(images, plan, ops.gather_tokens(features, plan, prefix=1, keep_prefix=False))

    def taught(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's features [B, 1 + N, D], class token first, and where that token looks [B, N]."""
        (features,), attention = self.teacher(images, (self.teacher_at % self.teacher.module.depth,))
        return features, attention

    def visible(self, attention: Tensor, draw: Draw) -> TokenMask:
        if self.mask == "salient":
            return masking.from_scores(-attention, masking.keep_count(attention.shape[1], self.mask_ratio))
        noise = draw.uniform("mask", attention.shape[1], attention.device)
        if self.mask == "attention":
            return masking.weighted(attention, self.mask_ratio, noise=noise)
        return masking.random(*attention.shape, self.mask_ratio, noise=noise)

    def latents(self, images: Tensor, plan: TokenMask | None, features: bool = False) -> Tensor:
        """[B, P + visible, D], P the class token, if there is one."""
        taps = dict.fromkeys(self.fused)
        latents = self.encoder(images, plan, taps=taps, features=features)
        return self.fusion(latents, taps.values())

    def compute(self, view: View) -> Output:
        latents = self.latents(view.parts, view.plan)
        pred = self.decoder(latents, view.plan), self.head(latents[:, self.lead :])
        return Output(self._terms(pred, view), pred, view)

    def _terms(self, pred: Sequence[Tensor], view: View) -> dict[str, Tensor]:
        pixels = ops.patch_loss(pred[0], view.parts, view.plan, self.patch, norm=self.norm)
        return {"pixels": pixels, "mimic": self.weight * ops.feature_loss(pred[1], view.target, **self.mimic)}

    def baseline(self, view: View) -> Output:
        pixels = mean_colour(view.parts, self.patch, view.plan.total_masked)
        pred = pixels if self.norm == "none" else pixels * 0, mean_feature(view.target)
        return Output(self._terms(pred, view), pred, view)

    def encode(self, batch: ImageBatch) -> Tensor:
        """[B, P + N, D], the class token first, if there is one."""
        return self.latents(self.images(batch), None, features=True)

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images import pictures

        images, plan = view.parts, view.plan
        shown = reconstruct(self.compute(view).pred[0], images, plan, self.patch, self.norm)
        mine = self.head(self.latents(images, None)[:, self.lead :])
        theirs = self.taught(images)[0][:, 1:]
        columns = feature_sheet(images * self.std + self.mean, ~plan.mask, (theirs, mine), self.grid)
        columns.insert(2, pictures.to_pixels(shown.pasted, self.mean, self.std))
        caption = f"{self.mask_ratio:.0%} masked\nfeatures as colours, the student's of the whole image"
        return pictures.Sheet(columns, names, caption, ("original", "visible", "restored", "teacher", "student"))
