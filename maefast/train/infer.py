"""The model that a file of weights is of: what the file says, what its shapes show, and what must be told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maefast.errors import CheckpointError, ConfigError
from maefast.models import argument_names, convnext, resnet
from maefast.models.convert import encoder_state
from maefast.models.fit import file_grid, fit_state
from maefast.models.spark import ENCODERS

from .image_models import ALWAYS_NORMAL, create_model
from .weights import Weights

# Attention heads by width: they leave no trace in the shapes. The encoders are the published sizes.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_DECODER_HEAD_DIM = 32


def infer_arguments(
    weights: Weights,
    name: str | None = None,
    img_size: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Arguments for `maefast.models.create`: those in the file, else read from the shapes of the tensors.

    Args:
        name: (mae_base, …) gives the numbers of heads of a ViT whose widths are not the published ones.
        img_size: of the images the file's model was made for, where the file does not tell: its configuration does,
            and so does a sin-cos position table.
        heads: (of the encoder, of the decoder), where the file does not tell.
        say: told what was guessed.

    Raises:
        ConfigError: what the file does not tell and the arguments do not either, or they contradict it.
        CheckpointError: tensors that are missing.
    """
    if weights.config:
        arguments = {key: value for key, value in weights.config.items() if key != "name"}
        _must_agree(weights, arguments.get("img_size"), img_size)
        for key, given in zip(("num_heads", "decoder_num_heads"), heads or ()):
            if arguments.get(key, given) != given:
                raise ConfigError(f"--heads {given}: {weights.source} says {arguments[key]}")
        _must_be(weights, arguments, name)
        return arguments
    if weights.family != "mae":
        arguments = _convnet_arguments(weights)
        _must_be(weights, arguments, name)
        if img_size is not None:
            _must_agree(weights, arguments.setdefault("img_size", sides_of(img_size)), img_size)
        return arguments
    width = _tensor(weights, "cls_token", 3).shape[-1]
    _, channels, ph, pw = _tensor(weights, "patch_embed.proj.weight", 4).shape
    rows, columns = _grid(weights, (ph, pw), img_size, say)
    arguments = {
        "img_size": [rows * ph, columns * pw],
        "patch_size": [ph, pw],
        "in_chans": channels,
        "embed_dim": width,
        "depth": _count(weights.tensors, "blocks"),
        "mlp_ratio": _tensor(weights, "blocks.0.mlp.fc1.weight", 2).shape[0] / width,
    }
    if weights.has_decoder:
        arguments["decoder_embed_dim"] = _tensor(weights, "decoder_embed.weight", 2).shape[0]
        arguments["decoder_depth"] = _count(weights.tensors, "decoder_blocks")
    arguments["num_heads"], decoder_heads = _heads(weights, arguments, name, heads, say)
    if weights.has_decoder:
        arguments["decoder_num_heads"] = decoder_heads
    return arguments


def _must_be(weights: Weights, arguments: dict[str, Any], name: str | None) -> None:
    """ConfigError where the file is of another network than the model `name`, by what tells them apart beside sizes.
    The name of a family, as "mae", says nothing else."""
    if name in (None, weights.family, (weights.config or {}).get("name")):
        return
    with torch.device("meta"):
        config = create_model(name, {}).config
    if weights.family != name.partition("_")[0]:
        raise ConfigError(f"--model {name}: {weights.source} is of the kind {weights.family}")
    for key in ("num_heads", "decoder_num_heads", "encoder", "depths", "widths"):
        found, wanted = arguments.get(key), config.get(key)
        if found != wanted:
            raise ConfigError(f"--model {name}: {weights.source} is of a model with {key} {found}, not {wanted}")


def _tensor(weights: Weights, name: str, ndim: int) -> Tensor:
    tensor = weights.tensors.get(name)
    if tensor is None or tensor.ndim != ndim:
        what = "is missing" if tensor is None else f"has the shape {tuple(tensor.shape)}"
        raise CheckpointError(f"{weights.source} does not hold a plain ViT: {name} {what}")
    return tensor


def _heads(
    weights: Weights,
    arguments: dict[str, Any],
    name: str | None,
    given: Sequence[int] | None,
    say: Callable[[str], object],
) -> tuple[int, int | None]:
    """(heads of the encoder, of the decoder): as given, those of the model `name`, or the usual ones of the widths."""
    width, decoder_width = arguments["embed_dim"], arguments.get("decoder_embed_dim")
    if given is not None:
        if decoder_width is not None and len(given) < 2:
            raise ConfigError(f"--heads {given[0]}: {weights.source} has a decoder too; give ENCODER,DECODER")
        return given[0], given[1] if len(given) > 1 else None
    if name is not None:
        if "num_heads" not in argument_names(name):
            raise ConfigError(f"--model {name}: {weights.source} holds a ViT")
        with torch.device("meta"):
            config = create_model(name, {}).config
        if (config["embed_dim"], decoder_width or config["decoder_embed_dim"]) != (width, config["decoder_embed_dim"]):
            say(f"{weights.source}: its widths are not those of {name}; the numbers of heads are taken from there")
        return config["num_heads"], config["decoder_num_heads"]
    if width not in _HEADS:
        raise ConfigError(
            f"{weights.source}: the number of heads of a {width}-wide encoder is unknown; give --heads or --model"
        )
    decoder = None if decoder_width is None else max(1, decoder_width // _DECODER_HEAD_DIM)
    also = "" if decoder is None else f", {decoder} in the decoder"
    say(f"{weights.source}: the file does not tell the heads; taken are {_HEADS[width]}{also}, the usual (see --heads)")
    return _HEADS[width], decoder


def unusual_heads(arguments: dict[str, Any]) -> bool:
    """Whether a reader of the shapes alone would take another number of heads."""
    width = arguments.get("embed_dim")
    return width is not None and arguments.get("num_heads") != _HEADS.get(width)


def sides_of(img_size: int | Sequence[int]) -> list[int]:
    return [img_size, img_size] if isinstance(img_size, int) else list(img_size)


def _must_agree(weights: Weights, found: int | Sequence[int] | None, given: int | Sequence[int] | None) -> None:
    if given is not None and found is not None and sides_of(found) != sides_of(given):
        height, width = sides_of(found)
        raise ConfigError(f"--img-size {given}: {weights.source} is of a model for {height} x {width} pixels")


def _grid(weights: Weights, patch: Sequence[int], img_size: int | Sequence[int] | None, say: Callable) -> list[int]:
    """(rows, columns) of a ViT's patches: what its sin-cos table shows, else what `img_size` says, else a square."""
    patches = _tensor(weights, "pos_embed", 3).shape[1] - 1
    grid, certain = file_grid(weights.tensors, None)
    if grid and certain:
        _must_agree(weights, [side * p for side, p in zip(grid, patch)], img_size)
    elif img_size is not None:
        grid = tuple(side // p for side, p in zip(sides_of(img_size), patch))
        if grid[0] * grid[1] != patches or any(side % p for side, p in zip(sides_of(img_size), patch)):
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


def _count(tensors: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[1] for name in tensors if name.startswith(f"{prefix}.")})


def check_vit(weights: Weights, arguments: dict[str, Any], whole: bool = False) -> None:
    """Raise CheckpointError unless the tensors are those of the ViT with these arguments, or of its encoder: a network
    that only shares some names must not be written as one that it is not."""
    with torch.device("meta"):
        own = create_model("mae", arguments).state_dict()
    own, found = (own, weights.tensors) if whole else (encoder_state(own), encoder_state(weights.tensors))
    wrong = [f"{name} is missing" for name in sorted(set(own) - set(found))]
    wrong += [f"{name} is unknown" for name in sorted(set(found) - set(own))]
    wrong += [
        f"{name} is {tuple(found[name].shape)} and should be {tuple(own[name].shape)}"
        for name in sorted(set(own) & set(found))
        if found[name].shape != own[name].shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise CheckpointError(f"{weights.source} does not hold a plain ViT: {'; '.join(wrong[:6])}{more}")


def make_model(
    weights: Weights,
    name: str | None = None,
    norm_pix: bool | None = None,
    img_size: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    say: Callable[[str], object] = print,
) -> nn.Module:
    """The whole model of a checkpoint, for reconstruction. `norm_pix` overrides what the file says (or else the model's
    default: False for MAE, True for FCMAE); SparK knows no other than True. The rest as in `infer_arguments`."""
    if not weights.has_decoder:
        raise CheckpointError(f"{weights.source} holds an encoder only; a reconstruction needs the decoder too")
    arguments = infer_arguments(weights, name, img_size, heads, say)
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
