"""Reading weights of masked autoencoders: the authors' files, maefast's, timm's, and Hugging Face's."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from maefast.models.convert import encoder_prefix, encoder_state, hf_to_mae, is_hf
from maefast.models.convnames import FCMAE, UNUSED, is_sparse, is_timm_convnext, sparse_to_fcmae, timm_to_convnext
from maefast.ops._checks import one_of

_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_INSIDE = ("model", "state_dict", "module")  # where files keep the weights: MAE and FCMAE, many others, SparK
_FCMAE_DECODER = ("mask_token", "proj.", "pred.", "decoder.")


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights in a file, on the CPU, under maefast's names, which are those of the authors' (dense) code.

    Args:
        path: .safetensors, or a PyTorch file with a state dict or {"model": …}, {"state_dict": …} or {"module": …}
            around one (the published files of MAE, FCMAE and SparK and their training checkpoints). PyTorch files are
            read with weights_only=True. Names of HF's ViTMAE and ViT, of timm's ConvNeXt, and FCMAE's sparse kernels
            are translated. An encoder alone keeps its names without a prefix; see `load_checkpoint`.

    Raises:
        FileNotFoundError: no such file. ValueError: not a file of weights. KeyError: HF names that do not fit.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        # Training checkpoints of the original also hold their options as an argparse.Namespace: a plain record.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
        for key in _INSIDE:
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
        if isinstance(state, dict) and not isinstance(state.get("config"), Tensor):
            state = {key: value for key, value in state.items() if key != "config"}  # a record in some of SparK's
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f'{path} holds no state dict, nor one under "model", "state_dict" or "module"')
    for wrapper in _WRAPPERS:
        if all(key.startswith(wrapper) for key in state):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
    if is_hf(state):
        return hf_to_mae(state)
    if is_timm_convnext(state):
        return timm_to_convnext(state)
    if is_sparse(state):
        state = sparse_to_fcmae(state)
    if "pred.weight" in state and "downsample_layers.0.0.weight" in state:  # a whole FCMAE without its prefix
        state = {key if key.startswith(_FCMAE_DECODER) else FCMAE + key: value for key, value in state.items()}
    return state


def fit_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor], part: str = "all") -> dict[str, Tensor]:
    """`state` (see `read_state_dict`) completed by what it does not bring to a model with the state dict `own`.

    Args:
        part: "all": only the buffers of SparK that nothing reads come from `own`. "encoder": the encoder from `state`,
            bare or inside a whole model, everything else from `own`.
    """
    out = dict(state)
    if part == "encoder":
        prefix = encoder_prefix(own)
        out = {prefix + key: value for key, value in encoder_state(state).items()}
        encoder = {prefix + key for key in encoder_state(own)}
        out.update({key: value for key, value in own.items() if key not in encoder})
    out.update({key: own[key] for key in UNUSED if key in own})
    return out


def load_checkpoint(model: nn.Module, path: str | os.PathLike, part: str = "all") -> nn.Module:
    """Load the weights in `path` into `model`, in place; every name and shape must fit.

    Args:
        model: a MaskedAutoencoderViT, SparK or FCMAE, or an encoder alone (`maefast.nn.Encoder`,
            `maefast.models.resnet.ResNet`, `maefast.models.convnext.ConvNeXt`).
        path: see `read_state_dict`.
        part: "all"; or "encoder" to load the encoder alone, from a file with or without a decoder (the authors publish
            both); the decoder, or the classifier of a bare encoder, then keeps the weights it has.

    Returns:
        model.

    Raises:
        RuntimeError: missing, unknown or misshapen parameters. And what `read_state_dict` raises.
    """
    one_of("part", part, ("all", "encoder"))
    model.load_state_dict(fit_state(read_state_dict(path), model.state_dict(), part), strict=True)
    return model
