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

from maefast.masking import keep_count
from maefast.models import convnext, resnet
from maefast.models.checkpoint import fit_state, read_state_dict
from maefast.models.convert import encoder_state
from maefast.models.convnames import family
from maefast.models.spark import ENCODERS

from . import checkpoint
from .config import PretrainConfig
from .errors import CheckpointError, ConfigError


def build_model(config: PretrainConfig, create: Callable[..., nn.Module] | None = None) -> nn.Module:
    """The model a configuration asks for, freshly initialised from torch's global generator."""
    arguments = dict(config.model_args)
    if config.img_size is not None:
        arguments["img_size"] = config.img_size
    known = _argument_names(config.model) if create is None else None
    if known is None:  # a model of the user's own: its default, unless asked
        if config.norm_pix is not None:
            arguments.setdefault("norm_pix_loss", config.norm_pix)
    elif "norm_pix_loss" in known:
        arguments.setdefault("norm_pix_loss", config.norm_pix is not False)
    elif config.norm_pix is False:
        raise ConfigError(f"the model {config.model!r} has no --no-norm-pix: {_ALWAYS_NORMAL}")
    if config.patch_size is not None:
        if known is not None and "patch_size" not in known:
            raise ConfigError(
                f"the model {config.model!r} has no --patch-size: it masks cells as large as the downsampling of its "
                "encoder, 32 x 32 pixels; leave the option out"
            )
        arguments["patch_size"] = config.patch_size
    model = create_model(config.model, arguments, create)
    check_mask(model, mask_ratio_of(model, config.mask_ratio))
    if config.recompute:
        if not hasattr(model, "recompute"):
            raise ConfigError(f"the model {config.model!r} has no --recompute: only the mae_* models have it")
        model.recompute = True
    return model


_ALWAYS_NORMAL = "SparK's targets are always normalised cell by cell"


def _argument_names(name: str) -> list[str]:
    from maefast.models import argument_names

    try:
        return argument_names(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def mask_ratio_of(model: nn.Module, mask_ratio: float | None) -> float:
    """`mask_ratio`, or for None the usual one of the model: 0.75 for MAE, 0.6 for SparK and FCMAE."""
    return getattr(model, "usual_mask_ratio", 0.75) if mask_ratio is None else mask_ratio


def check_mask(model: nn.Module, mask_ratio: float) -> None:
    """Raise ConfigError unless `mask_ratio` masks some patches of the model and leaves some visible."""
    patches, visible = model.num_patches, -1
    if 0 <= mask_ratio <= 1:
        visible = keep_count(patches, mask_ratio, getattr(model, "keep_rule", "floor"))
    if not 0 < visible < patches:
        few = "; a larger --img-size has more of them" if patches < 16 else ""
        raise ConfigError(f"--mask-ratio {mask_ratio} leaves {max(visible, 0)} of {patches} patches visible{few}")


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
    size, channels = model.img_size, model.in_chans
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(channels), int(height), int(width)


@dataclass
class Weights:
    """Tensors under maefast's parameter names, see `maefast.models.read_state_dict`; an encoder alone has no prefix.

    `config` rebuilds the model when the file says how. `family`: "mae", "spark" or "fcmae".
    """

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any] | None
    source: Path

    @property
    def family(self) -> str | None:
        return family(self.tensors)

    @property
    def has_decoder(self) -> bool:
        return any(name.startswith(("decoder_blocks.", "dense_decoder.", "pred.")) for name in self.tensors)


def open_weights(path: str | Path) -> Weights:
    """Read weights from a run's folder (its newest checkpoint), a checkpoint folder, or any file that
    `maefast.models.read_state_dict` reads: .safetensors, the published files of MAE, SparK and FCMAE, timm's and HF's.

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
    if family(tensors) is None:
        missing = {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"} - set(tensors)
        raise CheckpointError(
            f"{path} does not hold a masked autoencoder: {', '.join(sorted(missing))} missing in it, "
            "nor are there the convolutions of a ResNet or ConvNeXt"
        )
    return Weights(tensors, config or None, path)


_FAMILIES = {"mae": "a ViT (MAE)", "spark": "a ResNet or ConvNeXt (SparK)", "fcmae": "a ConvNeXt V2 (FCMAE)"}

# Attention heads by width: they leave no trace in the shapes. The encoders are the published sizes.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_DECODER_HEAD_DIM = 32


def infer_arguments(weights: Weights, name: str | None = None) -> dict[str, Any]:
    """Arguments for `maefast.models.create`: those in the file, else read from the shapes of the tensors.

    `name` (mae_base, …) gives the numbers of heads of a ViT whose widths are not the published ones.
    """
    if weights.config:
        return {key: value for key, value in weights.config.items() if key != "name"}
    tensors = weights.tensors
    if weights.family != "mae":
        return _convnet_arguments(weights)
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


def _convnet_arguments(weights: Weights) -> dict[str, Any]:
    """Arguments of a SparK or FCMAE. The size of the images is in SparK's files only; else it is the default, 224."""
    encoder, tensors = encoder_state(weights.tensors), weights.tensors
    if "conv1.weight" in encoder:
        first = encoder["conv1.weight"]
        layout = tuple(_count(encoder, f"layer{i}") for i in range(1, 5)), first.shape[0]
        found = [name for name, depths in resnet.DEPTHS.items() if layout == (depths, 64)]
    else:
        first, stages = encoder["downsample_layers.0.0.weight"], range(_count(encoder, "stages"))
        depths = tuple(_count(encoder, f"stages.{i}") for i in stages)
        layout = depths, tuple(encoder[f"stages.{i}.0.norm.weight"].shape[0] for i in stages)
        found = [f"convnext_{size}" for size, sizes in convnext.SIZES.items() if sizes == layout]
    arguments: dict[str, Any] = {"in_chans": first.shape[1]}
    if weights.family == "fcmae":
        arguments["depths"], arguments["widths"] = (list(part) for part in layout)
        if weights.has_decoder:
            arguments["decoder_embed_dim"] = tensors["proj.weight"].shape[0]
            arguments["decoder_depth"] = _count(tensors, "decoder")
        return arguments
    found = [name for name in found if name in ENCODERS]
    if not found:
        raise ConfigError(
            f"{weights.source}: its encoder (blocks and widths {layout}) is none of {', '.join(ENCODERS)}; build your "
            "SparK in Python and use maefast.models.load_checkpoint"
        )
    arguments["encoder"] = found[0]
    if "norm_black" in tensors:
        arguments["img_size"] = list(tensors["norm_black"].shape[2:])
    if weights.has_decoder:
        arguments["decoder_width"] = tensors["dense_decoder.dec.0.up_sample.weight"].shape[0]
    return arguments


def make_model(weights: Weights, name: str | None = None, norm_pix: bool | None = None) -> nn.Module:
    """The whole model of a checkpoint, for reconstruction. `norm_pix` overrides what the file says (or else the model's
    default: False for MAE, True for FCMAE); SparK knows no other than True."""
    if not weights.has_decoder:
        raise CheckpointError(f"{weights.source} holds an encoder only; a reconstruction needs the decoder too")
    arguments = infer_arguments(weights, name)
    if weights.family == "spark":
        if norm_pix is False:
            raise ConfigError(f"--no-norm-pix does not fit {weights.source}: {_ALWAYS_NORMAL}")
    elif norm_pix is not None:
        arguments["norm_pix_loss"] = norm_pix
    preset = weights.config["name"] if weights.config else weights.family
    model = create_model(preset, arguments)
    try:
        model.load_state_dict(fit_state(weights.tensors, model.state_dict()), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{weights.source} does not fit the model: {error}") from error
    return model


def _count(tensors: dict[str, torch.Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[1] for name in tensors if name.startswith(f"{prefix}.")})


def load_pretrained(model: nn.Module, path: str | Path, say: Callable[[str], None] = print) -> None:
    """Copy weights into `model`: all of them, or the encoder's when the file has no decoder.

    Fixed (sin-cos) position tables stay the model's own, so another image size is possible. Any other difference in
    names or shapes is an error.
    """
    weights = open_weights(path)
    own = model.state_dict()
    if family(own) not in (None, weights.family):
        raise CheckpointError(
            f"{weights.source} does not fit the model: it holds {_FAMILIES[weights.family]}, "
            f"and the model is {_FAMILIES[family(own)]}"
        )
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    tensors = {
        name: tensor
        for name, tensor in fit_state(weights.tensors, own, "all" if weights.has_decoder else "encoder").items()
        if not (name in frozen and name.endswith("pos_embed") and tensor.shape != own[name].shape)
    }
    wrong = [f"{name} is missing" for name in sorted(set(own) - set(tensors) - frozen)]
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
