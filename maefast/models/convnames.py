"""Names of convnets' weights in other files. maefast's own are those of the authors' dense code.

    SparK     "sparse_encoder.sp_cnn." + ResNet's (also timm's and torchvision's) or ConvNeXt's names, and the decoder
    FCMAE     "encoder." + ConvNeXt V2's names, and the decoder
    sparse    the public pre-training code of FCMAE: its encoder's layers are MinkowskiEngine's
    timm      ConvNeXt and ConvNeXt V2 in timm: "stem.0", "stages.0.blocks.1.conv_dw", "mlp.fc1", ...

Every function takes and returns a plain state dict.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

SPARK, FCMAE = "sparse_encoder.sp_cnn.", "encoder."
# Buffers of SparK's public files that nothing reads; one of them has the size of the image.
UNUSED = ("imn_m", "imn_s", "norm_black")
HEADS = ("norm.", "head.", "fc.")  # of convnets for classification: no part of a masked autoencoder

# A sparse layer's name in the encoder, and what Minkowski's modules put behind it.
_LEVELS = (
    (re.compile(r"downsample_layers\.[1-9]\d*\.0|stages\.\d+\.\d+\.norm"), "ln"),
    (re.compile(r"stages\.\d+\.\d+\.pwconv[12]"), "linear"),
)
_SPARSE_CONV = re.compile(r"downsample_layers\.[1-9]\d*\.1|stages\.\d+\.\d+\.dwconv")
_GRN = re.compile(r"stages\.\d+\.\d+\.grn\.(?:gamma|beta)")


def is_sparse(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of FCMAE's public pre-training code."""
    return any(key.endswith(".dwconv.kernel") for key in state)


def sparse_to_fcmae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of FCMAE's public pre-training code under maefast's names, which are the dense code's.

    Kernels are [k * k, Cin, Cout], or [k * k, C] if depthwise, and number their taps column by column; biases of
    convolutions are [1, C], GRN's parameters [1, 4 C]. Names may start with "encoder." or not; they keep it.

    Raises:
        ValueError: a kernel that is not square.
    """
    out: dict[str, Tensor] = {}
    for full, value in state.items():
        prefix, key = (FCMAE, full.removeprefix(FCMAE)) if full.startswith(FCMAE) else ("", full)
        stem, _, kind = key.rpartition(".")
        if kind == "kernel":
            key, value = f"{stem}.weight", dense_kernel(value, full)
        elif stem.endswith((".ln", ".linear")):
            key = f"{stem.rpartition('.')[0]}.{kind}"
        elif kind == "bias" and value.ndim == 2:
            value = value.flatten()
        elif _GRN.fullmatch(key):
            value = value.reshape(1, 1, 1, -1)
        out[prefix + key] = value
    return out


def fcmae_to_sparse(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `sparse_to_fcmae`: the names and shapes that FCMAE's public code loads. The decoder stays."""
    out: dict[str, Tensor] = {}
    for full, value in state.items():
        prefix, key = (FCMAE, full.removeprefix(FCMAE)) if full.startswith(FCMAE) else ("", full)
        stem, _, kind = key.rpartition(".")
        level = next((level for pattern, level in _LEVELS if pattern.fullmatch(stem)), None)
        if level:
            key = f"{stem}.{level}.{kind}"
        elif _SPARSE_CONV.fullmatch(stem) and kind == "weight":
            taps = value.permute(3, 2, 1, 0).flatten(0, 1)  # [k * k, Cin / groups, Cout]
            key, value = f"{stem}.kernel", taps[:, 0] if stem.endswith("dwconv") else taps
        elif _SPARSE_CONV.fullmatch(stem):
            value = value[None]
        elif _GRN.fullmatch(key):
            value = value.reshape(1, -1)
        out[prefix + key] = value
    return out


def dense_kernel(kernel: Tensor, name: str = "kernel") -> Tensor:
    """MinkowskiEngine's [k * k, Cin, Cout] -> [Cout, Cin, k, k], [k * k, C] -> [C, 1, k, k]; a view.

    Raises:
        ValueError: `name` is not square.
    """
    side = math.isqrt(kernel.shape[0])
    if kernel.ndim not in (2, 3) or side * side != kernel.shape[0]:
        raise ValueError(f"{name!r} is no square kernel: its shape is {tuple(kernel.shape)}")
    if kernel.ndim == 2:
        kernel = kernel[:, None]
    return kernel.unflatten(0, (side, side)).permute(3, 2, 1, 0)


# timm's ConvNeXt: patterns and what they become here, and the way back.
_FROM_TIMM = (
    (r"stem\.", "downsample_layers.0."),
    (r"stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"(stages.*)\.conv_dw\.", r"\1.dwconv."),
    (r"(stages.*)\.mlp\.fc(\d)\.", r"\1.pwconv\2."),
    (r"(stages.*)\.mlp\.grn\.weight", r"\1.grn.gamma"),
    (r"(stages.*)\.mlp\.grn\.bias", r"\1.grn.beta"),
    (r"head\.norm\.", "norm."),
    (r"head\.fc\.", "head."),
)
_TO_TIMM = (
    (r"downsample_layers\.0\.", "stem."),
    (r"downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"(stages.*)\.dwconv\.", r"\1.conv_dw."),
    (r"(stages.*)\.pwconv(\d)\.", r"\1.mlp.fc\2."),
    (r"(stages.*)\.grn\.gamma", r"\1.mlp.grn.weight"),
    (r"(stages.*)\.grn\.beta", r"\1.mlp.grn.bias"),
    (r"head\.", "head.fc."),
    (r"norm\.", "head.norm."),
)


def is_timm_convnext(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of timm's ConvNeXt."""
    return "stages.0.blocks.0.conv_dw.weight" in state


def timm_to_convnext(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's ConvNeXt or ConvNeXt V2 under the names of the authors' code (and of maefast's ConvNeXt)."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".mlp.grn." in key:
            value = value.reshape(1, 1, 1, -1)
        elif ".mlp.fc" in key and value.ndim == 4:  # some of timm's models have 1x1 convolutions there
            value = value.flatten(1)
        out[_rename(key, _FROM_TIMM)] = value
    return out


def convnext_to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `timm_to_convnext`; linear layers stay linear."""
    return {
        _rename(key, _TO_TIMM): value.flatten() if ".grn." in key else value for key, value in state.items()
    }  # fmt: skip


def _rename(key: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in table:
        # A name is anchored at its start, and the rules follow one another: stages.0.blocks.0, then .conv_dw.
        key = re.sub(rf"^{pattern}", new, key)
    return key


def family(state: Mapping[str, Tensor]) -> str | None:
    """ "mae", "spark" or "fcmae", whose weights (or encoder's, bare or not) these are; None for anything else."""
    if {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"} <= state.keys():
        return "mae"
    if any(key.startswith(SPARK) for key in state):
        return "spark"
    bare = {key.removeprefix(FCMAE) for key in state}
    if {"downsample_layers.0.0.weight", "stages.0.0.dwconv.weight"} <= bare:
        return "fcmae" if "stages.0.0.grn.gamma" in bare else "spark"
    return "spark" if {"conv1.weight", "layer1.0.conv1.weight"} <= state.keys() else None
