"""Weights of recipes from and to files, under the public parameter names."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from maefast.data.runs import STATE, latest, weights_of
from maefast.models.checkpoint import read_content
from maefast.recipe import Recipe


def load_weights(recipe: Recipe, path: str | os.PathLike, *, ema: bool = False) -> None:
    """Copy the weights of a file into a recipe: one of ours, or of the authors, whose names `Recipe.names` knows.

    Args:
        path: a run, a checkpoint, .safetensors, .pth, .ckpt, or a folder of Hugging Face. ema: the running average in
            it.

    Raises:
        FileNotFoundError, ValueError: no such file, or names or shapes that are not those of the recipe.
    """
    path, own = Path(path).expanduser(), recipe.network.state_dict()
    if path.is_dir() and not (path / STATE).is_file():
        path = latest(path / "checkpoints")[0] or path
    if (path / STATE).is_file():
        path = weights_of(path)
    public = recipe.names.to_public(own)
    tensors = read_content(path, ema, names=own.keys()).tensors
    if tensors.keys() != own.keys():
        tensors = read_content(path, ema, public.keys(), recipe.names.unused).tensors
        tensors = recipe.names.to_ours(tensors)
    left = [name for name in own if name not in tensors and recipe.names.optional]
    left = [name for name in left if name.startswith(recipe.names.optional)]
    tensors = {**tensors, **{name: own[name] for name in left}}
    wrong = [f"{name} is missing" for name in sorted(own.keys() - tensors.keys())]
    wrong += [f"{name} is unknown" for name in sorted(tensors.keys() - own.keys())]
    wrong += [
        f"{name} is {tuple(tensor.shape)} in the file and {tuple(own[name].shape)} in the recipe"
        for name, tensor in sorted(tensors.items())
        if name in own and tensor.shape != own[name].shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise ValueError("; ".join(wrong[:6]) + more)
    recipe.network.load_state_dict(tensors)
    if left:
        recipe.after_loading(left)


def public_weights(recipe: Recipe) -> dict[str, Tensor]:
    """The state_dict of a recipe's network under the names of the authors' public checkpoints (`Recipe.names`)."""
    return recipe.names.to_public(recipe.network.state_dict())
