"""Building models, and reading weights from our own checkpoints and from published ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from maefast.models.checkpoint import read_state_dict

from . import checkpoint
from .config import PretrainConfig
from .errors import CheckpointError, ConfigError


def build_model(config: PretrainConfig, create: Callable[..., nn.Module] | None = None) -> nn.Module:
    """The model a configuration asks for, freshly initialised from torch's global generator."""
    arguments = {"norm_pix_loss": config.norm_pix, **config.model_args}
    if config.img_size is not None:
        arguments["img_size"] = config.img_size
    if config.patch_size is not None:
        arguments["patch_size"] = config.patch_size
    model = create_model(config.model, arguments, create)
    check_mask(model, config.mask_ratio)
    if config.recompute:
        if not hasattr(model, "recompute"):
            raise ConfigError(f"the model {config.model!r} has no --recompute")
        model.recompute = True
    return model


def check_mask(model: nn.Module, mask_ratio: float) -> None:
    """Raise ConfigError unless `mask_ratio` masks some patches of the model and leaves some visible."""
    patches = model.num_patches
    visible = int(patches * (1 - mask_ratio)) if 0 <= mask_ratio <= 1 else -1
    if not 0 < visible < patches:
        raise ConfigError(f"--mask-ratio {mask_ratio} leaves {max(visible, 0)} of {patches} patches visible")


def create_model(name: str, arguments: dict[str, Any], create: Callable[..., nn.Module] | None = None) -> nn.Module:
    """`maefast.models.create`, with its complaints turned into ConfigError."""
    if create is None:
        from maefast.models import create
    try:
        return create(name, **arguments)
    except (TypeError, ValueError, KeyError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ConfigError(f"the model {name!r} with {arguments} cannot be built: {text}") from error


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images a model takes."""
    size = model.config["img_size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(model.config["in_chans"]), int(height), int(width)


@dataclass
class Weights:
    """Tensors under MAE's parameter names; `config` rebuilds the model when the file says how."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any] | None
    source: Path

    @property
    def has_decoder(self) -> bool:
        return any(name.startswith("decoder_blocks.") for name in self.tensors)


def open_weights(path: str | Path) -> Weights:
    """Read weights from a run's folder (its newest checkpoint), a checkpoint folder, or any file that
    `maefast.models.checkpoint.read_state_dict` reads: .safetensors, facebookresearch/mae's .pth, HF's ViT and ViTMAE.

    Raises:
        CheckpointError: no such file, or not weights of a masked autoencoder.
    """
    path = Path(path)
    if path.is_dir():
        from .resume import resolve

        foreign = (path / checkpoint.MODEL).is_file() and not (path / checkpoint.STATE).is_file()  # an HF folder
        path = (path if foreign else resolve(path)[0]) / checkpoint.MODEL
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    config = None
    try:
        tensors = read_state_dict(path)
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                config = json.loads((file.metadata() or {}).get("maefast", "null"))
    except Exception as error:  # UnpicklingError, RuntimeError (zip), SafetensorError, EOFError, KeyError, ...
        raise CheckpointError(f"{path} cannot be read as weights: {error}") from error
    missing = {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"} - set(tensors)
    if missing:
        raise CheckpointError(f"{path} does not hold a masked autoencoder: {', '.join(sorted(missing))} missing in it")
    return Weights(tensors, config, path)


# Attention heads by width: they leave no trace in the shapes. The encoders are the published sizes.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_DECODER_HEAD_DIM = 32


def infer_arguments(weights: Weights, name: str | None = None) -> dict[str, Any]:
    """Arguments for `maefast.models.create("mae", …)`: those in the file, else read from the shapes of the tensors.

    `name` (mae_base, …) gives the numbers of heads of a model whose widths are not the published ones.
    """
    if weights.config:
        return {key: value for key, value in weights.config.items() if key != "name"}
    tensors = weights.tensors
    width = tensors["cls_token"].shape[-1]
    _, channels, ph, pw = tensors["patch_embed.proj.weight"].shape
    patches = tensors["pos_embed"].shape[1] - 1
    side = math.isqrt(patches)
    if side * side != patches:
        raise ConfigError(f"{weights.source}: {patches} patches are not a square; the file does not tell their layout")
    arguments: dict[str, Any] = {
        "img_size": [side * ph, side * pw],
        "patch_size": [ph, pw],
        "in_chans": channels,
        "embed_dim": width,
        "depth": _count(tensors, "blocks"),
        "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
    }
    heads, decoder_heads = _HEADS.get(width), None
    if weights.has_decoder:
        arguments["decoder_embed_dim"] = tensors["decoder_embed.weight"].shape[0]
        arguments["decoder_depth"] = _count(tensors, "decoder_blocks")
        decoder_heads = max(1, arguments["decoder_embed_dim"] // _DECODER_HEAD_DIM)
    if name is not None:
        from maefast.models import create

        with torch.device("meta"):
            config = create_model(name, {}, create).config
        heads, decoder_heads = config["num_heads"], config["decoder_num_heads"]
    if heads is None:
        raise ConfigError(f"{weights.source}: the number of heads of a {width}-wide encoder is unknown; give --model")
    arguments["num_heads"] = heads
    if weights.has_decoder:
        arguments["decoder_num_heads"] = decoder_heads
    return arguments


def make_model(weights: Weights, name: str | None = None, norm_pix: bool | None = None) -> nn.Module:
    """The whole model of a checkpoint, for reconstruction. `norm_pix` overrides what the file says (default False)."""
    if not weights.has_decoder:
        raise CheckpointError(f"{weights.source} holds an encoder only; a reconstruction needs the decoder too")
    arguments = infer_arguments(weights, name)
    if norm_pix is not None:
        arguments["norm_pix_loss"] = norm_pix
    preset = weights.config["name"] if weights.config else "mae"
    model = create_model(preset, arguments)
    try:
        model.load_state_dict(weights.tensors, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{weights.source} does not fit the model: {error}") from error
    return model


def _count(tensors: dict[str, torch.Tensor], prefix: str) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith(f"{prefix}.")})


def load_pretrained(model: nn.Module, path: str | Path, say: Callable[[str], None] = print) -> None:
    """Copy weights into `model`: all of them, or the encoder's when the file has no decoder.

    Fixed (sin-cos) position tables stay the model's own, so another image size is possible. Any other difference in
    names or shapes is an error.
    """
    weights = open_weights(path)
    own = model.state_dict()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    tensors = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if not (name in frozen and name.endswith("pos_embed") and tensor.shape != own[name].shape)
    }
    missing = set(own) - set(tensors) - frozen
    if not weights.has_decoder:
        missing = {name for name in missing if name != "mask_token" and not name.startswith("decoder_")}
    wrong = [f"{name} is missing" for name in sorted(missing)]
    wrong += [f"{name} is unknown" for name in sorted(set(tensors) - set(own))]
    wrong += [
        f"{name} is {tuple(tensor.shape)} in the file and {tuple(own[name].shape)} in the model"
        for name, tensor in tensors.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{weights.source} does not fit the model: {'; '.join(wrong[:6])}")
    model.load_state_dict(tensors, strict=False)
    say(f"weights from {weights.source}" + ("" if weights.has_decoder else " (encoder only; the decoder starts fresh)"))
