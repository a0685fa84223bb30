"""Reading weights, from our own checkpoints and from published ones; `infer` tells of which model they are."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maefast.data.runs import weights_of
from maefast.errors import CheckpointError
from maefast.models import shards
from maefast.models.checkpoint import TRIED, read_content
from maefast.models.convnames import family
from maefast.models.files import IN_FOLDER, describe
from maefast.models.fit import fit_to_model

from . import checkpoint


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
    path = Path(path).expanduser()
    ours = (path / checkpoint.STATE).is_file() or checkpoint.listing(path / "checkpoints")
    known = any((path / name).is_file() for name in IN_FOLDER) or shards.is_sharded(path)
    if path.is_dir() and (ours or not known):
        from .resume import resolve

        path = weights_of(resolve(path)[0])
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
        found = f"{path} holds no masked autoencoder. In it: {describe(content.tensors)}{vit}"
        if any(re.search(r"(^|\.)(head|fc)\.(fc\.)?weight$", name) for name in content.tensors):
            raise CheckpointError(
                f"{found}\nIt looks like a classifier, as `maefast finetune` writes one for timm. Give the pre-trained "
                "weights that it began from"
            )
        raise CheckpointError(f"{found}\n{TRIED}")
    place = f"{content.place} (averaged)".strip() if content.averaged else content.place
    return Weights(content.tensors, content.config, path, place)


_FAMILIES = {"mae": "a ViT (MAE)", "spark": "a ResNet or ConvNeXt (SparK)", "fcmae": "a ConvNeXt V2 (FCMAE)"}


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


def run_of(weights: Weights) -> checkpoint.State | None:
    """The state of the run whose checkpoint the weights are of."""
    folder = weights.source.parent
    return checkpoint.read_state(folder) if (folder / checkpoint.STATE).is_file() else None
