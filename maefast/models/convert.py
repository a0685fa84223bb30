"""Weights under other libraries' names.

    MAE          facebookresearch/mae and maefast; the encoder's names are also timm's ViT's
    convnets     see `maefast.models.convnames`
    HF "5"       transformers 5: `vit.layers.0.attention.q_proj`, ...
    HF "4"       transformers 4: `vit.encoder.layer.0.attention.attention.query`, ...

Both layouts serve `ViTMAEForPreTraining` (everything) and `ViTModel` (the encoder, names without "vit."). Every
function takes and returns a plain state dict; tensors are shared, not copied, where their layout allows it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from maefast.models.convnames import FCMAE, HEADS, SPARK, family
from maefast.ops._checks import one_of

LAYOUTS = ("4", "5")

_ENCODER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_DECODER = ("mask_token", "decoder_pos_embed", "decoder_embed", "decoder_norm", "decoder_pred")
# MAE's names inside a block -> HF's. "attn.qkv" is joined there from three.
_LAYER = {
    "4": {
        "norm1": "layernorm_before",
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    "5": {
        "norm1": "layernorm_before",
        "attn.proj": "attention.o_proj",
        "norm2": "layernorm_after",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
}
_QKV = {
    "4": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    "5": tuple(f"attention.{part}_proj" for part in "qkv"),
}
_LAYERS = {"4": "encoder.layer", "5": "layers"}
_MAE_BLOCK = re.compile(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)")
# transformers 5 writes the decoder's blocks of a ViTMAE as "decoder_encoder.layer", a slip that it reads back itself.
_HF_BLOCK = re.compile(
    r"(?:(decoder\.(?:decoder_layers|decoder_encoder\.layer))|(?:encoder\.layer|layers))\.(\d+)\.(.+)\.(weight|bias)"
)
_HEADS = ("pooler.", "classifier.", "decoder.0.", "embeddings.mask_token")  # of HF's ViTs; no part of an MAE


def encoder_prefix(state: Mapping[str, Tensor]) -> str:
    """What the encoder's names start with in the state dict of a whole model; "" for MAE and for bare encoders."""
    return next((prefix for prefix in (SPARK, FCMAE) if any(key.startswith(prefix) for key in state)), "")


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a state dict, under the names that the encoder has alone.

    For MAE these are the names of `maefast.nn.Encoder` and of timm's headless ViT, for SparK and FCMAE those of
    `maefast.models.resnet.ResNet` (and timm's) or `maefast.models.convnext.ConvNeXt` (and the authors'), without the
    parts of a classifier, which timm's files have.
    """
    prefix = encoder_prefix(state)
    if prefix:
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if family(state) in ("spark", "fcmae"):
        return {key: value for key, value in state.items() if not key.startswith(HEADS)}
    return {
        key: value for key, value in state.items() if key != "mask_token" and not key.startswith(("decoder_", "head."))
    }


def mae_to_hf(state: Mapping[str, Tensor], layout: str = "5", prefix: str = "vit.") -> dict[str, Tensor]:
    """An MAE state dict (or `encoder_state` of one) under HF's names.

    Args:
        layout: "4" or "5", the major version of transformers.
        prefix: "vit." for ViTMAEForPreTraining and ViTForImageClassification, "" for ViTModel.

    Raises:
        KeyError: a name that MAE does not have.
    """
    one_of("layout", layout, LAYOUTS)
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, kind = key.rpartition(".")
        if match := _MAE_BLOCK.fullmatch(key):
            in_decoder, index, part, kind = match.groups()
            base = f"decoder.decoder_layers.{index}" if in_decoder else f"{prefix}{_LAYERS[layout]}.{index}"
            if part == "attn.qkv":
                for name, third in zip(_QKV[layout], value.chunk(3)):
                    out[f"{base}.{name}.{kind}"] = third
                continue
            if part not in _LAYER[layout]:
                raise KeyError(f"{key!r} is not a parameter of a masked autoencoder")
            out[f"{base}.{_LAYER[layout][part]}.{kind}"] = value
        elif key in _ENCODER:
            out[prefix + _ENCODER[key]] = value
        elif stem in _ENCODER:
            out[f"{prefix}{_ENCODER[stem]}.{kind}"] = value
        elif key in _DECODER or stem in _DECODER:
            out[f"decoder.{key}"] = value
        else:
            raise KeyError(f"{key!r} is not a parameter of a masked autoencoder")
    return out


def is_hf(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of HF's ViT or ViTMAE."""
    return any(key.removeprefix("vit.") == "embeddings.patch_embeddings.projection.weight" for key in state)


def hf_to_mae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of HF's ViTMAEForPreTraining, ViTMAEModel or ViTModel, of either layout, under MAE's names.

    Heads of HF's ViTs (pooler, classifier, SimMIM's) are left out.

    Raises:
        KeyError: a name that is none of theirs, or a query, key or value that lacks its two fellows.
    """
    layers = {hf: mae for names in _LAYER.values() for mae, hf in names.items()}
    thirds = {name: i for names in _QKV.values() for i, name in enumerate(names)}
    tops = {hf: mae for mae, hf in _ENCODER.items()}
    out: dict[str, Tensor] = {}
    split: dict[str, dict[int, Tensor]] = {}
    for full, value in state.items():
        key = full.removeprefix("vit.")
        stem, _, kind = key.rpartition(".")
        if match := _HF_BLOCK.fullmatch(key):
            in_decoder, index, part, kind = match.groups()
            base = f"decoder_blocks.{index}" if in_decoder else f"blocks.{index}"
            if part in thirds:
                split.setdefault(f"{base}.attn.qkv.{kind}", {})[thirds[part]] = value
                continue
            if part in layers:
                out[f"{base}.{layers[part]}.{kind}"] = value
                continue
        elif key in tops:
            out[tops[key]] = value
            continue
        elif stem in tops:
            out[f"{tops[stem]}.{kind}"] = value
            continue
        elif key.startswith("decoder.") and {key[8:], stem[8:]} & set(_DECODER):
            out[key[8:]] = value
            continue
        if not key.startswith(_HEADS):
            raise KeyError(f"{full!r} is not a parameter of HF's ViT or ViTMAE")
    for key, parts in split.items():
        if len(parts) != 3:
            raise KeyError(f"{key!r} needs query, key and value; the state dict has {len(parts)} of them")
        out[key] = torch.cat([parts[i] for i in range(3)])
    return out
