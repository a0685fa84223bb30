"""Reading weights: the authors' files, maefast's, timm's and Hugging Face's, and what training loops make of them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from maefast.models import hf_config
from maefast.models.convert import hf_to_mae, is_hf
from maefast.models.convnames import FCMAE, is_sparse, is_timm_convnext, sparse_to_fcmae, timm_to_convnext
from maefast.models.files import CONFIG, config_beside, describe, open_file, refusal
from maefast.models.fit import fit_to_model
from maefast.models.unwrap import Ambiguous, find_state, only_state
from maefast.ops._checks import one_of

_FCMAE_DECODER = ("mask_token", "proj.", "pred.", "decoder.")
TRIED = (
    "Tried: the names of MAE and timm's ViT, HF's ViTMAE and ViT, ResNet and ConvNeXt (SparK, FCMAE, timm), at any "
    "depth, without module., _orig_mod., model. or any other prefix"
)


@dataclass
class Content:
    """Weights under maefast's names, and what their file says of its model.

    `config`: arguments of `maefast.models.create` ("name" among them), or None. `place`: where in the file the weights
    were, "" for names at the top. `averaged`: they are a running average.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None
    place: str = ""
    averaged: bool = False


def read_content(
    path: str | os.PathLike, ema: bool = False, names: Collection[str] = (), unused: tuple[str, ...] = ()
) -> Content:
    """The weights in a file or folder, with what is told about their model; see `read_state_dict`.

    Args:
        names: of the model that they are for: weights with just these names are taken as they are.
        unused: beginnings of names that may stand beside them.
    """
    path = Path(path)
    try:
        content, metadata, file = open_file(path)
    except Exception as error:
        if (words := refusal(path, error)) is None:
            raise
        raise type(error)(words) from None
    try:
        found = find_state(content, ema, names, unused) or only_state(content, ema)
    except Ambiguous as error:
        raise Ambiguous(f"{path}: {error}") from None
    if found is None:
        raise ValueError(f"{path} holds no weights of a known model. In it: {describe(content)}\n{TRIED}")
    config = _own_config(path, metadata, content)
    state = found.state
    if is_hf(state):
        if config is None and (beside := config_beside(file)) is not None:
            try:
                config = {"name": "mae", **hf_config.arguments_of(beside)}
            except ValueError as error:
                raise ValueError(f"{file.parent / CONFIG}: {error}") from None
        state = hf_to_mae(state)
    elif is_timm_convnext(state):
        state = timm_to_convnext(state)
    elif is_sparse(state):
        state = sparse_to_fcmae(state)
    if "pred.weight" in state and "downsample_layers.0.0.weight" in state:  # a whole FCMAE without its prefix
        state = {key if key.startswith(_FCMAE_DECODER) else FCMAE + key: value for key, value in state.items()}
    return Content(state, config, found.place, found.averaged)


def _own_config(path: Path, metadata: dict[str, str], content: Any) -> dict[str, Any] | None:
    """The model's arguments that maefast writes into its files: safetensors' metadata, or beside the tensors."""
    text = metadata.get("maefast") or (content.get("maefast") if isinstance(content, dict) else None)
    if not isinstance(text, str) or not text:
        return None
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: the description of its model, {text[:40]!r}, cannot be read") from error
    if config is not None and not (isinstance(config, dict) and isinstance(config.get("name", ""), str)):
        raise ValueError(f"{path}: {text[:40]!r} describes no model")
    return {"name": "mae", **config} if config else None


def read_state_dict(path: str | os.PathLike, ema: bool = False) -> dict[str, Tensor]:
    """The weights in a file, on the CPU, under maefast's names, which are those of the authors' (dense) code.

    Args:
        path: .safetensors, a PyTorch file (.pth, .pt, .bin, Lightning's .ckpt), or a folder of Hugging Face
            (model.safetensors or pytorch_model.bin, in one piece or several, and config.json). The weights may lie
            below any keys and behind any prefixes that training loops and wrappers put there. PyTorch files are read
            with weights_only=True. Names of HF's ViTMAE and ViT, of timm's ConvNeXt, and FCMAE's sparse kernels are
            translated. An encoder alone keeps its names without a prefix; see `load_checkpoint`.
        ema: the running average (EMA, teacher) that the file holds beside the trained weights.

    Raises:
        FileNotFoundError: no such file. ValueError: no weights of a known model, or of several; the message says what
        was found. KeyError: HF names that do not fit. pickle.UnpicklingError: see `maefast.models.files.open_file`.
    """
    return read_content(path, ema).tensors


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike,
    part: str = "all",
    *,
    ema: bool = False,
    exact: bool = False,
    say: Callable[[str], object] = warnings.warn,
) -> nn.Module:
    """Load the weights in `path` into `model`, in place; every name must fit.

    A file of another image size, patch size or number of channels is made to fit, see `maefast.models.fit`.

    Args:
        model: a MaskedAutoencoderViT, SparK or FCMAE, or an encoder alone (`maefast.nn.Encoder`,
            `maefast.models.resnet.ResNet`, `maefast.models.convnext.ConvNeXt`).
        path, ema: see `read_state_dict`.
        part: "all"; or "encoder" to load the encoder alone, from a file with or without a decoder (the authors publish
            both); the decoder, or the classifier of a bare encoder, then keeps the weights it has.
        exact: change nothing to make it fit.
        say: called with one line for each change (the default makes them warnings).

    Returns:
        model.

    Raises:
        RuntimeError: missing, unknown or misshapen parameters. ValueError: see `maefast.models.fit.fit_to_model`. And
        what `read_state_dict` raises.
    """
    one_of("part", part, ("all", "encoder"))
    content = read_content(path, ema, model.state_dict())
    try:
        state, lines = fit_to_model(content.tensors, model, part, config=content.config, exact=exact)
        model.load_state_dict(state, strict=True)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"{path} does not fit the model: {error}") from error
    for line in lines:
        say(f"{path}: {line}")
    return model
