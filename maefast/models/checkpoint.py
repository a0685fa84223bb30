"""Reading weights of masked autoencoders: the original's files, maefast's, and Hugging Face's."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from maefast.models.convert import encoder_state, hf_to_mae, is_hf
from maefast.ops._checks import one_of

_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights in a file, on the CPU, under the original MAE's names.

    Args:
        path: .safetensors, or a PyTorch file with a state dict or {"model": …} / {"state_dict": …} around one (the
            original's published files and its training checkpoints). PyTorch files are read with weights_only=True.
            Names of HF's ViTMAE and ViT are translated.

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
        for key in ("model", "state_dict"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f'{path} holds no state dict, nor one under "model" or "state_dict"')
    for wrapper in _WRAPPERS:
        if all(key.startswith(wrapper) for key in state):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return hf_to_mae(state) if is_hf(state) else state


def load_checkpoint(model: nn.Module, path: str | os.PathLike, part: str = "all") -> nn.Module:
    """Load the weights in `path` into `model`, in place; every name and shape must fit.

    Args:
        model: a MaskedAutoencoderViT, or a `maefast.nn.Encoder`.
        path: see `read_state_dict`.
        part: "all"; or "encoder" to load the encoder alone, from a file with or without a decoder (the original
            publishes both); the decoder then keeps the weights it has.

    Returns:
        model.

    Raises:
        RuntimeError: missing, unknown or misshapen parameters. And what `read_state_dict` raises.
    """
    one_of("part", part, ("all", "encoder"))
    state = read_state_dict(path)
    if part == "encoder":
        state = encoder_state(state)
        own = model.state_dict()
        state.update({key: own[key] for key in own.keys() - encoder_state(own).keys()})
    model.load_state_dict(state, strict=True)
    return model
