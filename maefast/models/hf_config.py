"""Hugging Face's config.json of a ViT or ViTMAE, as arguments of `maefast.models.create`, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_NAMES = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "in_chans": "num_channels",
    "decoder_embed_dim": "decoder_hidden_size",
    "decoder_depth": "decoder_num_hidden_layers",
    "decoder_num_heads": "decoder_num_attention_heads",
    "norm_pix_loss": "norm_pix_loss",
}
# What a config.json leaves out has these values in transformers.
_DEFAULTS = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
}
_MAE_DEFAULTS = {
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048,
    "norm_pix_loss": False,
}
# What our ViT computes; a model with anything else is another model.
_FIXED = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "qkv_bias": True,
}
_MUST = ("hidden_act", "qkv_bias")  # dropout has no effect on what is loaded


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `maefast.models.create("mae", …)`; those of a decoder only for a "vit_mae".

    Raises:
        ValueError: a model that maefast's ViT does not compute.
    """
    kind = config.get("model_type")
    if kind not in ("vit", "vit_mae"):
        raise ValueError(f"model_type is {kind!r}; maefast reads 'vit' and 'vit_mae'")
    mae = kind == "vit_mae"
    full = {**_DEFAULTS, **(_MAE_DEFAULTS if mae else {}), **_FIXED, **config}
    for name in _MUST:
        if full[name] != _FIXED[name]:
            raise ValueError(f"{name} is {full[name]!r}; maefast's ViT has {_FIXED[name]!r} only")
    out = {ours: full[theirs] for ours, theirs in _NAMES.items() if theirs in full}
    out["img_size"], out["patch_size"] = _pair(full["image_size"]), _pair(full["patch_size"])
    out["mlp_ratio"] = full["intermediate_size"] / full["hidden_size"]
    if mae and full["decoder_intermediate_size"] != int(out["mlp_ratio"] * full["decoder_hidden_size"]):
        raise ValueError(
            f"the MLPs of its decoder are {full['decoder_intermediate_size']} wide and those of its "
            f"encoder {full['intermediate_size']}: maefast's ViT has one ratio to the width for both"
        )
    out["norm_eps"] = full["layer_norm_eps"]
    return out


def config_of(arguments: Mapping[str, Any], whole: bool = False) -> dict[str, Any]:
    """config.json of a ViTModel with this encoder, or of a ViTMAEForPreTraining with the `whole` model.

    Note the epsilon: HF's default, 1e-12, is not MAE's 1e-6.
    """
    width, ratio = arguments["embed_dim"], arguments.get("mlp_ratio", 4.0)
    out: dict[str, Any] = {
        "architectures": ["ViTMAEForPreTraining" if whole else "ViTModel"],
        "model_type": "vit_mae" if whole else "vit",
    }
    parts = [ours for ours in _NAMES if whole or not ours.startswith(("decoder", "norm_pix"))]
    out.update({_NAMES[ours]: arguments[ours] for ours in parts if ours in arguments})
    out["intermediate_size"] = int(width * ratio)
    if whole:
        out["decoder_intermediate_size"] = int(arguments["decoder_embed_dim"] * ratio)
    out.update(_FIXED, layer_norm_eps=arguments.get("norm_eps", 1e-6))
    out.update(image_size=_scalar(arguments["img_size"]), patch_size=_scalar(arguments["patch_size"]))
    return out


def _pair(size: int | Sequence[int]) -> list[int]:
    sizes = [size] if isinstance(size, int) else size
    if not isinstance(sizes, (list, tuple)) or len(sizes) not in (1, 2) or not all(isinstance(s, int) for s in sizes):
        raise ValueError(f"a size is {size!r}, neither a number nor two")
    return [sizes[0], sizes[-1]]


def _scalar(size: int | Sequence[int]) -> int | list[int]:
    sizes = _pair(size)
    return sizes[0] if sizes[0] == sizes[1] else sizes
