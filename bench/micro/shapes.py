"""The shapes that are measured, those of published models."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import prod

import torch


@dataclass(frozen=True)
class Shape:
    """One masked step: B samples of N patches, of which `keep` stay visible.

    size: (H, W) or (T, H, W); patch likewise. width: of the encoder, in heads of 64. decoder_width, decoder_heads: of
    the decoder. prefix: class tokens. norm: of the loss target. only: the ops that take this shape; empty means all.
    cells: for the ops of masked convnets, and for no others; `patch` is a mask cell, `width` that of the first stage.
    """

    name: str
    batch: int
    size: tuple[int, ...]
    patch: tuple[int, ...]
    keep: int
    width: int
    decoder_width: int
    channels: int = 3
    prefix: int = 1
    norm: str = "mae"
    decoder_heads: int = 16
    only: tuple[str, ...] = ()
    cells: bool = False

    @property
    def tokens(self) -> int:
        return prod(size // patch for size, patch in zip(self.size, self.patch, strict=True))

    @property
    def masked(self) -> int:
        return self.tokens - self.keep

    @property
    def values(self) -> int:
        """K: the values of a patch."""
        return self.channels * prod(self.patch)

    def json(self) -> dict:
        return {**asdict(self), "tokens": self.tokens, "values": self.values}

    def __str__(self) -> str:
        return f"{self.name}-b{self.batch}"


VIT_B = Shape("vit_b", 16, (224, 224), (16, 16), keep=49, width=768, decoder_width=512)
VIDEOMAE_B = Shape(
    "videomae_b",
    8,
    (16, 224, 224),
    (2, 16, 16),
    160,
    width=768,
    decoder_width=384,
    prefix=0,
    norm="videomae",
    decoder_heads=6,
)
RESNET50 = Shape("resnet50", 16, (224, 224), (32, 32), 20, width=64, decoder_width=768, prefix=0, cells=True)
VOLUME_OPS = tuple(
    f"conv_cells (3x3x3 {name})" for name in ("stage 1", "s2 stage 2", "stage 2", "stage 3", "stage 4", "s2 stage 5")
)
RESENC = Shape("resenc", 2, (96, 96, 96), (16, 16, 16), 54, 32, 32, 1, prefix=0, only=VOLUME_OPS, cells=True)
# No map of a toy is shorter than its kernel: the peers are torch's convolutions, whose weight gradients are wrong there
# on some processors (`ops.sparse_conv.reaches_over`).
TOY_VOLUME = replace(RESENC, name="toy_volume", batch=1, size=(32, 48, 32), keep=2, width=4)
TOY_CELLS = Shape("toy_cells", 2, (96, 128), (32, 32), keep=4, width=8, decoder_width=8, prefix=0, cells=True)
TOY = Shape("toy", 2, (32, 32), (8, 8), keep=4, width=32, decoder_width=16, decoder_heads=1)
# Sequences shorter than those of images: 26 of 64 groups of points (Point-MAE), a twentieth of the patches (DMAE).
POINTS = ("farthest_points", "knn", "chamfer")
POINT_MAE = Shape("point_mae", 128, (8, 8), (1, 1), 26, 384, 384, prefix=0, only=("attention (encoder)", *POINTS))
TOY_POINTS = Shape("toy_points", 2, (2, 4), (1, 1), 3, 16, 16, prefix=0, only=POINTS)
# Rows of a student against a teacher's of all 197 tokens: 50 of a DMAE, all of a G2SD decoder, 59 of a MaskAlign.
LAYERNORM, COSINE = "feature_loss (layernorm, smooth l1)", "feature_loss (cosine)"
FEATURES = [
    Shape("dmae", 64, (224, 224), (16, 16), 49, 1024, 1024, only=("feature_loss (l2, l1)",)),
    Shape("g2sd", 64, (224, 224), (16, 16), 196, 512, 512, only=(LAYERNORM,)),
    Shape("maskalign", 64, (224, 224), (16, 16), 58, 768, 768, only=(LAYERNORM, COSINE)),
]
TOY_FEATURES = [replace(shape, batch=2, size=(32, 32), keep=keep, width=32) for shape, keep in zip(FEATURES, (1, 4, 3))]
PHOTOGRAPHS = Shape("photographs", 16, (224, 224), (16, 16), 49, 768, 512, only=("resize",))
TOY_PHOTOGRAPHS = replace(PHOTOGRAPHS, batch=2, size=(32, 32), keep=1)
DMAE = Shape("dmae_b", 256, (224, 224), (16, 16), 9, 768, 512, only=("attention (encoder)",))

# Sequences with positions inside attention: the windows of a Swin-T's first stage (Liu et al., 2021), a BEiT-B's
# relative biases (Bao et al., 2022) and a DINOv3-B's rotation, at the length of an image of 224.
POSITIONS = ("attention (relative)", "attention (rotary)")
SWIN = Shape("swin_t", 512, (7, 7), (1, 1), 49, 96, 96, prefix=0, only=("attention (windows)",))
BEIT = Shape("beit_b", 16, (224, 224), (16, 16), 196, 768, 768, only=POSITIONS)
TOY_POSITIONS = [
    Shape("toy_windows", 4, (2, 4), (1, 1), 8, 64, 64, prefix=0, only=("attention (windows)",)),
    Shape("toy_positions", 2, (2, 4), (1, 1), 8, 64, 64, only=POSITIONS),
]

# preset -> device -> shapes. A GPU needs a larger batch to be filled.
PRESETS: dict[str, dict[str, list[Shape]]] = {
    "toy": {
        device: [TOY, TOY_CELLS, TOY_VOLUME, TOY_POINTS, TOY_PHOTOGRAPHS, *TOY_FEATURES, *TOY_POSITIONS]
        for device in ("cpu", "cuda")
    },
    "quick": {
        "cpu": [VIT_B, RESNET50],
        "cuda": [replace(VIT_B, batch=64), replace(VIT_B, batch=256), replace(RESNET50, batch=128)],
    },
    "full": {
        "cpu": [
            VIT_B,
            replace(VIT_B, batch=64),
            VIDEOMAE_B,
            POINT_MAE,
            PHOTOGRAPHS,
            *FEATURES,
            DMAE,
            SWIN,
            BEIT,
            RESNET50,
            RESENC,
        ],
        "cuda": [
            *(replace(VIT_B, batch=b) for b in (16, 64, 256)),
            replace(VIDEOMAE_B, batch=32),
            POINT_MAE,
            *FEATURES,
            DMAE,
            replace(SWIN, batch=4096),
            replace(BEIT, batch=64),
            replace(RESNET50, batch=128),
        ],
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
