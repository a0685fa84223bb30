"""All tokens of frozen features, on the disk, for what learns to pool them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maefast.data.written import write_whole
from maefast.errors import ConfigError
from maefast.recipe import Batch, Recipe

from .features import key_of, lead_tokens, undisturbed


def tokens_of(found: Tensor, lead: int) -> Tensor:
    """float32 [B, T, D], without the `lead` first ones, of what a recipe encoded: tokens, or maps [B, C, H, W].

    Raises:
        ConfigError: samples have different numbers of them.
    """
    if found.ndim == 4:
        return found.flatten(2).transpose(1, 2).float()
    if found.ndim != 3:
        raise ConfigError("--pool attentive wants as many tokens of each sample; use --pool mean")
    return found[:, lead:].float()


@torch.no_grad()
def kept_tokens(
    folder: Path,
    identity: Sequence[str],
    recipe: Recipe,
    loaded: Iterable[tuple[Batch | None, list[int], list]],
    count: int,
    device: torch.device | str,
    began: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """float32 [n, T, D], mapped from a file in `folder`, where the next call finds them: of the n = `count` samples
    that can be read, see `features.extract` and `features.kept`. `began` is called where they are not found."""
    path, lead = folder / f"tokens-{key_of(identity)}.npy", lead_tokens(recipe)

    def write(place: Path) -> None:
        rows, done = None, 0
        for batch, _, _ in loaded:
            if batch is None:
                continue
            found = tokens_of(recipe.encode(batch.to(device)), lead).cpu().numpy()
            if rows is None:
                shape = (count, *found.shape[1:])
                rows = np.lib.format.open_memmap(place, "w+", np.float32, shape)
            rows[done : done + len(found)] = found
            done += len(found)
        rows.flush()

    if not path.is_file():
        began()
        with undisturbed(recipe):
            write_whole(path, write)
    return np.load(path, mmap_mode="r")
