"""Reading weights, from our own checkpoints and from published ones, and the models that they are of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maefast.models import convnext, resnet
from maefast.models.checkpoint import TRIED, read_content
from maefast.models.convert import encoder_state
from maefast.models.convnames import family
from maefast.models.files import IN_FOLDER, describe
from maefast.models.fit import file_grid, fit_state, fit_to_model
from maefast.models.spark import ENCODERS

from . import checkpoint
from .build import ALWAYS_NORMAL, create_model
from .errors import CheckpointError, ConfigError


@dataclass
class Weights:
    """Tensors under maefast's parameter names, see `maefast.models.read_state_dict`; an encoder alone has no prefix.

    `config` rebuilds the model when the file says how. `family`: "mae", "spark" or "fcmae". `place`: where in the file
    the weights were, "" for the usual names at the top.
    """

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any] | None
    source: Path
    place: str = ""

    @property
    def family(self) -> str | None:
        return family(self.tensors)

    @property
    def has_decoder(self) -> bool:
        return any(name.startswith(("decoder_blocks.", "dense_decoder.", "pred.")) for name in self.tensors)


def open_weights(path: str | Path, ema: bool = False) -> Weights:
    """Read weights from a run's folder (its newest checkpoint), a checkpoint folder, or any file or folder that
    `maefast.models.read_state_dict` reads.

    Args:
        ema: the running average that the file holds beside the trained weights.

    Raises:
        CheckpointError: no such file, or not weights of a masked autoencoder.
    """
    path = Path(path)
    foreign = any((path / name).is_file() for name in IN_FOLDER) and not (path / checkpoint.STATE).is_file()
    if path.is_dir() and not foreign:
        from .resume import resolve

        path = resolve(path)[0] / checkpoint.MODEL
    try:
        content = read_content(path, ema)
    except FileNotFoundError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # UnpicklingError, RuntimeError (zip), SafetensorError, EOFError, KeyError, ...
        text = str(error)  # some name the file and say what was found in it
        raise CheckpointError(text if str(path) in text else f"{path} cannot be read as weights: {text}") from error
    if family(content.tensors) is None:
        names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"}
        missing = ", ".join(sorted(names - set(content.tensors)))
        vit = f" (for a ViT, {missing} missing)" if names & set(content.tensors) else ""
        raise CheckpointError(f"{path} holds no masked autoencoder. In it: {describe(content.tensors)}{vit}\n{TRIED}")
    place = f"{content.place} (averaged)".strip() if content.averaged else content.place
    return Weights(content.tensors, content.config, path, place)


_FAMILIES = {"mae": "a ViT (MAE)", "spark": "a ResNet or ConvNeXt (SparK)", "fcmae": "a ConvNeXt V2 (FCMAE)"}

# Attention heads by width: they leave no trace in the shapes. The encoders are the published sizes.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_DECODER_HEAD_DIM = 32


def infer_arguments(
    weights: Weights,
    name: str | None = None,
    img_size: int | Sequence[int] | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Arguments for `maefast.models.create`: those in the file, else read from the shapes of the tensors.

    Args:
        name: (mae_base, …) gives the numbers of heads of a ViT whose widths are not the published ones.
        img_size: of the images the file's model was made for, where the file does not tell: its configuration does,
            and so does a sin-cos position table.
        say: told when a square number of patches is taken for a square.

    Raises:
        ConfigError: what the file does not tell and the arguments do not either, or they contradict it.
    """
    if weights.config:
        arguments = {key: value for key, value in weights.config.items() if key != "name"}
        _must_agree(weights, arguments.get("img_size"), img_size)
        return arguments
    tensors = weights.tensors
    if weights.family != "mae":
        arguments = _convnet_arguments(weights)
        if img_size is not None:
            _must_agree(weights, arguments.setdefault("img_size", _sides(img_size)), img_size)
        return arguments
    width = tensors["cls_token"].shape[-1]
    _, channels, ph, pw = tensors["patch_embed.proj.weight"].shape
    rows, columns = _grid(weights, (ph, pw), img_size, say)
    arguments: dict[str, Any] = {
        "img_size": [rows * ph, columns * pw],
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


def _sides(img_size: int | Sequence[int]) -> list[int]:
    return [img_size, img_size] if isinstance(img_size, int) else list(img_size)


def _must_agree(weights: Weights, found: int | Sequence[int] | None, given: int | Sequence[int] | None) -> None:
    if given is not None and found is not None and _sides(found) != _sides(given):
        height, width = _sides(found)
        raise ConfigError(f"--img-size {given}: {weights.source} is of a model for {height} x {width} pixels")


def _grid(weights: Weights, patch: Sequence[int], img_size: int | Sequence[int] | None, say: Callable) -> list[int]:
    """(rows, columns) of a ViT's patches: what its sin-cos table shows, else what `img_size` says, else a square."""
    patches = weights.tensors["pos_embed"].shape[1] - 1
    grid, certain = file_grid(weights.tensors, None)
    if grid and certain:
        _must_agree(weights, [side * p for side, p in zip(grid, patch)], img_size)
    elif img_size is not None:
        grid = tuple(side // p for side, p in zip(_sides(img_size), patch))
        if grid[0] * grid[1] != patches or any(side % p for side, p in zip(_sides(img_size), patch)):
            raise ConfigError(
                f"--img-size {img_size} has {grid[0]} x {grid[1]} patches of {patch[0]} x {patch[1]}; "
                f"{weights.source} holds positions of {patches}"
            )
    elif grid is None:
        raise ConfigError(
            f"{weights.source}: its {patches} patches are not a square, and its positions are no sin-cos table, which "
            "would tell how they lie: give --img-size"
        )
    else:
        sides = " x ".join(str(side * p) for side, p in zip(grid, patch))
        say(f"{weights.source}: {patches} learned positions are taken for a square, images of {sides} (see --img-size)")
    return list(grid)


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


def make_model(
    weights: Weights,
    name: str | None = None,
    norm_pix: bool | None = None,
    img_size: int | Sequence[int] | None = None,
    say: Callable[[str], object] = print,
) -> nn.Module:
    """The whole model of a checkpoint, for reconstruction. `norm_pix` overrides what the file says (or else the model's
    default: False for MAE, True for FCMAE); SparK knows no other than True. The rest as in `infer_arguments`."""
    if not weights.has_decoder:
        raise CheckpointError(f"{weights.source} holds an encoder only; a reconstruction needs the decoder too")
    arguments = infer_arguments(weights, name, img_size, say)
    if weights.family == "spark":
        if norm_pix is False:
            raise ConfigError(f"--no-norm-pix does not fit {weights.source}: {ALWAYS_NORMAL}")
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


def load_pretrained(
    model: nn.Module,
    path: str | Path,
    say: Callable[[str], object] = print,
    *,
    ema: bool = False,
    exact: bool = False,
) -> None:
    """Copy weights into `model`: all of them, or the encoder's when the file has no decoder.

    Weights of another image size, patch size or number of channels are made to fit, as `maefast.models.fit` says, each
    change in one line to `say`; not with `exact`. Any other difference in names or shapes is an error.
    """
    weights = open_weights(path, ema)
    own = model.state_dict()
    if family(own) not in (None, weights.family):
        raise CheckpointError(
            f"{weights.source} does not fit the model: it holds {_FAMILIES[weights.family]}, "
            f"and the model is {_FAMILIES[family(own)]}"
        )
    part = "all" if weights.has_decoder else "encoder"
    try:
        tensors, lines = fit_to_model(weights.tensors, model, part, config=weights.config, exact=exact)
    except ValueError as error:
        raise CheckpointError(f"{weights.source} does not fit the model: {error}") from error
    wrong = [f"{name} is missing" for name in sorted(set(own) - set(tensors))]
    wrong += [f"{name} is unknown" for name in sorted(set(tensors) - set(own))]
    wrong += [
        f"{name} is {tuple(tensor.shape)} in the file and {tuple(own[name].shape)} in the model"
        for name, tensor in tensors.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise CheckpointError(f"{weights.source} does not fit the model: {'; '.join(wrong[:6])}{more}")
    model.load_state_dict(tensors)
    below = f", {weights.place}" if weights.place else ""
    alone = "" if weights.has_decoder else " (encoder only; the decoder starts fresh)"
    say(f"weights from {weights.source}{below}{alone}")
    for line in lines:
        say(f"  {line}")
