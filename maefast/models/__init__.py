"""Models by name: ``create("mae_base", img_size=224)``.

    mae_tiny   192 x 12, 3 heads     decoder 128 x 4, 4 heads
    mae_small  384 x 12, 6 heads     decoder 256 x 4, 8 heads
    mae_base   768 x 12, 12 heads    decoder 512 x 8, 16 heads
    mae_large  1024 x 24, 16 heads   decoder 512 x 8, 16 heads
    mae_huge   1280 x 32, 16 heads   decoder 512 x 8, 16 heads, patch 14

Base, large and huge are the sizes of He et al. (2021). The paper has no smaller ones; tiny and small are the usual ViT
sizes with a decoder about a third narrower than their encoder and half as deep as the original's, since a decoder of
512 x 8 would cost more than they do. Head width in the decoders is 32, as in the original. All have patch 16 but huge.

    spark_resnet50, spark_resnet101, spark_convnext_{tiny,small,base,large}     SparK (Tian et al., 2023)
    fcmae_convnextv2_{atto,femto,pico,nano,tiny,base,large,huge}                ConvNeXt V2 (Woo et al., 2023)

Masked convnets: cells of 32 x 32 pixels are masked, and the encoder computes the visible ones only.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from maefast.models.base import MaskedAutoencoder, Reconstruction
from maefast.models.checkpoint import load_checkpoint, read_state_dict
from maefast.models.convnext import SIZES
from maefast.models.fcmae import FCMAE
from maefast.models.mae import MaskedAutoencoderViT
from maefast.models.spark import ENCODERS, SparK

__all__ = [
    "FCMAE",
    "MaskedAutoencoder",
    "MaskedAutoencoderViT",
    "Reconstruction",
    "SparK",
    "argument_names",
    "create",
    "list_models",
    "load_checkpoint",
    "read_state_dict",
]

_FAMILY = ("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "patch_size")
_PRESETS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    name: (MaskedAutoencoderViT, dict(zip(_FAMILY, sizes)))
    for name, sizes in {
        "mae": (),
        "mae_tiny": (192, 12, 3, 128, 4, 4, 16),
        "mae_small": (384, 12, 6, 256, 4, 8, 16),
        "mae_base": (768, 12, 12, 512, 8, 16, 16),
        "mae_large": (1024, 24, 16, 512, 8, 16, 16),
        "mae_huge": (1280, 32, 16, 512, 8, 16, 14),
    }.items()
}
_PRESETS.update({f"spark_{name}": (SparK, {"encoder": name}) for name in ENCODERS})
_PRESETS.update(spark=(SparK, {}), fcmae=(FCMAE, {}))
_PRESETS.update(
    {
        f"fcmae_convnextv2_{size}": (FCMAE, {"depths": depths, "widths": widths})
        for size, (depths, widths) in SIZES.items()
        if size != "small"
    }
)


def list_models() -> list[str]:
    """Names that `create` knows."""
    return sorted(_PRESETS)


def create(name: str, **overrides: Any) -> nn.Module:
    """Build a model with fresh weights.

    Args:
        name: see `list_models`.
        overrides: any argument of the model's class: img_size, patch_size, in_chans, embed_dim, depth, num_heads,
            decoder_embed_dim, decoder_depth, decoder_num_heads, mlp_ratio, norm_pix_loss, positions, norm_eps for a
            ViT; see `SparK` and `FCMAE` for theirs.

    Raises:
        ValueError: unknown name or sizes that do not fit. TypeError: unknown override.
    """
    cls, preset = _preset(name)
    return cls(**{**preset, **overrides}, name=name)


def argument_names(name: str) -> list[str]:
    """The overrides that ``create(name, ...)`` takes. ValueError: unknown name."""
    return [argument for argument in inspect.signature(_preset(name)[0]).parameters if argument != "name"]


def _preset(name: str) -> tuple[type[nn.Module], dict[str, Any]]:
    if name not in _PRESETS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(list_models())}")
    return _PRESETS[name]
