"""`maefast export` and `maefast reconstruct`: what a trained model is good for afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from maefast.models.convert import encoder_state, mae_to_hf
from maefast.models.convnames import FCMAE, convnext_to_timm, fcmae_to_sparse
from maefast.models.hf_config import config_of

from .build import check_mask, image_shape, mask_ratio_of
from .data import MEAN, STD
from .errors import ConfigError
from .weights import infer_arguments, make_model, open_weights

_HF_LAYOUTS = {"hf": "5", "hf4": "4", "hf-mae": "4"}  # major versions of transformers; 5 reads the names of 4 too


def export_file(
    path: str | Path,
    output: str | Path,
    format: str,
    name: str | None = None,
    *,
    img_size: int | Sequence[int] | None = None,
    ema: bool = False,
) -> list[str]:
    """Convert the weights at `path` (see weights.open_weights) and write `output`. Returns lines to show.

    `output` is a .safetensors or .pth file; for Hugging Face's formats it may be a folder, which then gets
    model.safetensors, config.json and preprocessor_config.json for `from_pretrained`. `name` and `img_size` tell what
    the file may not, see weights.infer_arguments.
    """
    weights, output = open_weights(path, ema), Path(output)
    if format in _HF_LAYOUTS and weights.family != "mae":
        raise ConfigError(
            f"--format {format} is for a ViT, and {weights.source} holds a convnet: transformers has no such encoder "
            "under names of its own that maefast knows; use timm, official or mae"
        )
    whole = format == "hf-mae"
    if whole and not weights.has_decoder:
        raise ConfigError(f"--format hf-mae is for a whole model, and {weights.source} holds an encoder only: use hf")
    folder = format in _HF_LAYOUTS and output.suffix not in (".safetensors", ".pth", ".pt")
    if not folder and output.suffix not in (".safetensors", ".pth", ".pt"):
        raise ConfigError(f"{output}: give a file name that ends in .safetensors or .pth")
    lines: list[str] = []
    metadata = {"format": "pt"}
    inside = None  # the key of a .pth under which the weights stand
    if format == "timm":
        tensors = encoder_state(weights.tensors)  # timm's ViT and ResNet have our names
        if "downsample_layers.0.0.weight" in tensors:
            tensors = convnext_to_timm(tensors)
    elif format in _HF_LAYOUTS:
        tensors = weights.tensors if whole else encoder_state(weights.tensors)
        tensors = mae_to_hf(tensors, _HF_LAYOUTS[format], prefix="vit." if whole else "")
    elif format == "official" and weights.family == "spark":
        tensors = encoder_state(weights.tensors)
    elif format == "official" and weights.family == "fcmae":
        inside = "model"
        tensors = fcmae_to_sparse({FCMAE + key: value for key, value in encoder_state(weights.tensors).items()})
    elif format in ("mae", "official"):
        inside = "module" if weights.family == "spark" else "model"
        tensors = weights.tensors
        if weights.config:
            metadata["maefast"] = json.dumps(weights.config)
    else:
        raise ConfigError(f"--format must be timm, hf, hf4, hf-mae, mae or official, not {format!r}")
    arguments = infer_arguments(weights, name, img_size, lines.append) if folder else {}
    if whole and folder and len(set(_pair(arguments["img_size"]))) > 1:
        raise ConfigError("--format hf-mae: transformers' ViTMAE takes square images only; use hf (the encoder) or mae")
    target = output / "model.safetensors" if folder else output
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}  # chunks share memory
    if target.suffix == ".safetensors":
        _replace(target, lambda temporary: save_file(tensors, temporary, metadata))
    else:
        document = {inside: tensors} if inside else tensors
        _replace(target, lambda temporary: torch.save(document, temporary))
    below = f", {weights.place}," if weights.place else ""
    lines.insert(0, f"wrote {len(tensors)} tensors from {weights.source}{below} to {target} ({format} names)")
    if folder:
        _write_json(output / "config.json", config_of(arguments, whole))
        if arguments["in_chans"] == 3:
            _write_json(output / "preprocessor_config.json", _hf_preprocessor(arguments))
        if whole:
            lines.append(f'load it with ViTMAEForPreTraining.from_pretrained("{output}")')
        else:
            lines.append(f'load it with ViTModel.from_pretrained("{output}", add_pooling_layer=False)')
    elif format in _HF_LAYOUTS:
        lines.append("ViTConfig must have layer_norm_eps=1e-6; name a folder instead of a file to get a config.json")
    if format == "timm" and "stem.0.weight" in tensors:
        lines.append("there is no norm behind the last stage in it: load it with strict=False, which reports head.norm")
    if format != "mae" and not weights.has_decoder:
        lines.append("the source has no decoder, which this format does not need")
    return lines


def reconstruct_files(
    path: str | Path,
    images: Sequence[Path],
    output: Path,
    *,
    mask_ratio: float | None = None,
    seed: int = 0,
    raw: bool = False,
    norm_pix: bool | None = None,
    name: str | None = None,
    img_size: int | Sequence[int] | None = None,
    ema: bool = False,
) -> None:
    """Draw the reconstructions of image files (centre crops in the model's size; image i gets mask i of `seed`)."""
    from . import pictures

    pictures.picture_format(output)  # before anything is computed
    model = make_model(open_weights(path, ema), name, norm_pix, img_size)
    mask_ratio = mask_ratio_of(model, mask_ratio)
    check_mask(model, mask_ratio)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model.to(device).eval()
    channels, *size = image_shape(model)
    names = [Path(image).name for image in images]
    examples = pictures.load_examples(images, names, size, channels, model.num_patches, seed)
    batches = []
    for start in range(0, len(names), 16):  # bounds memory for long lists
        part = slice(start, start + 16)
        chunk = pictures.Examples(examples.images[part], examples.noise[part], names[part])
        batches.append(pictures.reconstruct(model, chunk, mask_ratio, device, raw))
    columns = [torch.cat(column) for column in zip(*batches, strict=True)]
    pictures.save_picture(columns, names, output, pictures.note(model, raw))


def _pair(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size


def _hf_preprocessor(arguments: dict[str, Any]) -> dict[str, Any]:
    height, width = _pair(arguments["img_size"])
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


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    _replace(path, lambda temporary: temporary.write_text(json.dumps(document, indent=2) + "\n") and None)
