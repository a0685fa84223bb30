"""`maefast export`: the weights in the layouts of other libraries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from maefast.data.images.batch import MEAN, STD
from maefast.data.written import write_whole
from maefast.errors import ConfigError
from maefast.models.convert import encoder_state, mae_to_hf
from maefast.models.convnames import FCMAE, convnext_to_timm, fcmae_to_sparse
from maefast.models.hf_config import config_of

from . import checkpoint
from .infer import check_vit, infer_arguments, sides_of, unusual_heads
from .weights import Weights, open_weights, run_of

_SUFFIXES = (".safetensors", ".pth", ".pt")
_OTHER_SUFFIXES = (*_SUFFIXES, ".bin", ".ckpt", ".h5", ".onnx", ".pkl")  # a folder with such a name is a mistake
# What may lie in a folder that Hugging Face's files are written to, beside what is hidden: theirs.
_OF_HF = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*",
          "README*", "LICENSE*")  # fmt: skip
_HF_LAYOUTS = {"hf": "5", "hf4": "4", "hf-mae": "4"}  # major versions of transformers; 5 reads the names of 4 too


def export_file(
    path: str | Path,
    output: str | Path,
    format: str,
    name: str | None = None,
    *,
    img_size: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    ema: bool = False,
) -> list[str]:
    """Convert the weights at `path` (see weights.open_weights) and write `output`. Returns lines to show.

    `output` is a .safetensors or .pth file; for Hugging Face's formats it may be a folder, which then gets
    model.safetensors, config.json and preprocessor_config.json for `from_pretrained`, and may hold no files of other
    kinds. `name`, `img_size` and `heads` tell what the file may not, see infer.infer_arguments.
    """
    weights, output, lines = open_weights(path, ema), Path(output), []
    hf, whole = format in _HF_LAYOUTS, format == "hf-mae"
    if hf and weights.family != "mae":
        raise ConfigError(
            f"--format {format} is for a ViT, and {weights.source} holds a convnet: transformers has no such encoder "
            "under names of its own that maefast knows; use timm, official or mae"
        )
    if whole and not weights.has_decoder:
        raise ConfigError(f"--format hf-mae is for a whole model, and {weights.source} holds an encoder only: use hf")
    folder = hf and output.suffix not in _SUFFIXES
    if folder:
        _must_take_a_model(output)
    elif output.suffix not in _SUFFIXES:
        raise ConfigError(f"{output}: give a file name that ends in .safetensors or .pth")
    target = output / checkpoint.MODEL if folder else output
    if (target.parent / checkpoint.STATE).is_file():
        raise ConfigError(f"{output} would lie in the checkpoint {target.parent} of a run; give another place")
    arguments = dict(weights.config or {})
    if hf:
        arguments = infer_arguments(weights, name, img_size, heads, lines.append)
        check_vit(weights, arguments, whole)
        if whole and len(set(sides_of(arguments["img_size"]))) > 1:
            raise ConfigError(
                "--format hf-mae: transformers' ViTMAE takes square images only; use hf (the encoder) or mae"
            )
    run = run_of(weights)
    measured = run is not None and run.config.get("channels") is not None
    if measured:
        numbers = ", ".join(f"{name} {run.config[name]}" for name in ("mean", "std", "value_range"))
        lines.append(f"it was trained on numbers normalised by the run's own scale: {numbers}")
    tensors, inside = _converted(weights, format)
    _write_weights(target, tensors, inside, weights.config if format in ("mae", "official", "timm") else None)
    below = f", {weights.place}," if weights.place else ""
    lines.insert(0, f"wrote {len(tensors)} tensors from {weights.source}{below} to {target} ({format} names)")
    eps = arguments.get("norm_eps", 1e-6)
    if folder:
        _write_json(output / "config.json", config_of(arguments, whole))
        if arguments["in_chans"] == 3 and not measured:
            _write_json(output / "preprocessor_config.json", _hf_preprocessor(arguments))
        if whole:
            lines.append(f'load it with ViTMAEForPreTraining.from_pretrained("{output}")')
        else:
            lines.append(f'load it with ViTModel.from_pretrained("{output}", add_pooling_layer=False)')
    elif hf:
        lines.append(
            f"its config must have layer_norm_eps={eps} and num_attention_heads={arguments['num_heads']}; name a "
            "folder instead of a file to get a config.json"
        )
    elif weights.family == "mae" and (eps != 1e-6 or unusual_heads(arguments)):
        lines.append(f"build its model with {arguments['num_heads']} heads and norms with an epsilon of {eps}")
    if format == "timm" and "stem.0.weight" in tensors:
        lines.append("there is no norm behind the last stage in it: load it with strict=False, which reports head.norm")
    if format != "mae" and not weights.has_decoder:
        lines.append("the source has no decoder, which this format does not need")
    return lines


def _must_take_a_model(folder: Path) -> None:
    """ConfigError: its name is that of a file, or it holds what a model's folder does not."""
    if folder.suffix.lower() in _OTHER_SUFFIXES:
        raise ConfigError(f"{folder}: give a folder, or a file name that ends in .safetensors or .pth")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [n for n in names if n[0] != "." and not any(fnmatch(n, pattern) for pattern in _OF_HF)]
    if others:
        raise ConfigError(f"{folder} holds other things than a model ({others[0]}): give a new folder")


def _converted(weights: Weights, format: str) -> tuple[dict[str, torch.Tensor], str | None]:
    """The tensors under the names of `format`, and the key of a .pth below which they stand."""
    if format == "timm":
        tensors = encoder_state(weights.tensors)  # timm's ViT and ResNet have our names
        return (convnext_to_timm(tensors) if "downsample_layers.0.0.weight" in tensors else tensors), None
    if format == "hf-mae":
        return mae_to_hf(weights.tensors, _HF_LAYOUTS[format]), None
    if format in _HF_LAYOUTS:
        return mae_to_hf(encoder_state(weights.tensors), _HF_LAYOUTS[format], prefix=""), None
    if format == "official" and weights.family == "spark":
        return encoder_state(weights.tensors), None
    if format == "official" and weights.family == "fcmae":
        encoder = {FCMAE + key: value for key, value in encoder_state(weights.tensors).items()}
        return fcmae_to_sparse(encoder), "model"
    if format in ("mae", "official"):
        return weights.tensors, "module" if weights.family == "spark" else "model"
    raise ConfigError(f"--format must be timm, hf, hf4, hf-mae, mae or official, not {format!r}")


def _write_weights(
    target: Path, tensors: dict[str, torch.Tensor], inside: str | None, config: dict[str, Any] | None
) -> None:
    """With a description of the model, where the format has a place for one."""
    tensors = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}  # chunks share memory
    described = {"maefast": json.dumps(config)} if config else {}
    if target.suffix == ".safetensors":
        write_whole(target, lambda temporary: save_file(tensors, temporary, {"format": "pt", **described}))
    else:
        document = {inside: tensors, **described} if inside else tensors
        write_whole(target, lambda temporary: _pickle(document, temporary))


def _pickle(document: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:  # of a path torch would write the name into the file
        try:
            torch.save(document, file)
        except RuntimeError as error:  # of torch, behind what went wrong
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def _hf_preprocessor(arguments: dict[str, Any]) -> dict[str, Any]:
    height, width = sides_of(arguments["img_size"])
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(document, indent=2) + "\n"))
