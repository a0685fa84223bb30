"""Frozen features: what `Recipe.encode` gives for whole inputs, one vector a sample."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maefast.data.written import write_whole
from maefast.errors import ConfigError
from maefast.recipe import Batch, Recipe
from maefast.recipes.masked_images import MaskedImages

POOLS = ("mean", "cls", "both")
_PIXELS = 32  # sides of the small images that stand for raw pixels


@dataclass
class Features:
    """Of n samples: `mean` of their tokens, float32 [n, D]; `first`, the class token, of the same shape, or None.

    index: which samples these are. bad: (name, reason) of those that could not be read.
    """

    mean: Tensor
    first: Tensor | None
    index: list[int]
    bad: list[tuple[str, str]] = field(default_factory=list)

    def pooled(self, how: str) -> Tensor:
        """float32 [n, D], or [n, 2 D] for "both". ConfigError: there is no class token."""
        if how != "mean" and self.first is None:
            raise ConfigError(f"--pool {how}: this encoder has no class token; use --pool mean")
        return {"mean": self.mean, "cls": self.first}[how] if how != "both" else torch.cat([self.first, self.mean], 1)


def no_features(recipe: Recipe) -> str | None:
    """Why a recipe gives none, in words; None where it does."""
    if type(recipe).encode is Recipe.encode:
        return f"{type(recipe).__name__} gives no features of whole inputs"
    if isinstance(recipe, MaskedImages) and not hasattr(recipe.model, "encode"):
        return f"{type(recipe.model).__name__} gives no features of whole inputs: it has no `encode`"
    return None


def lead_tokens(recipe: Recipe) -> int:
    """How many tokens stand before those of the input in what `encode` gives."""
    if recipe.lead is not None:
        return recipe.lead
    parts = (getattr(recipe, name, None) for name in ("encoder", "student", "model"))
    for part in (recipe, *parts):
        token = getattr(part, "cls_token", None)
        if isinstance(token, Tensor):
            return token.shape[-2]
    return 0


def pool(found: Tensor, batch: Batch, lead: int) -> tuple[Tensor, Tensor | None]:
    """(mean, first) of what a recipe encoded: maps [B, C, H, W], tokens [B, T, D] of which `lead` come first, or tokens
    of samples of any length one after another [sum, D], which the batch tells apart."""
    found = found.float()
    if found.ndim == 4:
        return found.mean((2, 3)), None
    if found.ndim == 3:
        return found[:, lead:].mean(1), found[:, 0] if lead else None
    nodes, lengths = getattr(batch, "nodes", None), getattr(batch, "lengths", None)
    if nodes is None and lengths is None:
        return found, None
    sizes = list(nodes) if nodes is not None else [lead + int(length) for length in lengths]
    each = found.split(sizes)
    lead = 0 if nodes is not None else lead
    return torch.stack([part[lead:].mean(0) for part in each]), torch.stack(
        [part[0] for part in each]
    ) if lead else None


@torch.no_grad()
def extract(
    recipe: Recipe, loaded: Iterable[tuple[Batch | None, list[int], list]], device: torch.device | str
) -> Features:
    """Features of batches as `maefast.probe.samples.batches` gives them, in the precision of the weights. The recipe
    and all random numbers are afterwards what they were.

    Raises:
        ConfigError: none of the samples can be read. NotImplementedError: the recipe has no features.
    """
    means, firsts, index, bad, lead = [], [], [], [], lead_tokens(recipe)
    with undisturbed(recipe):
        for batch, which, unread in loaded:
            bad += unread
            if batch is None:
                continue
            mean, first = pool(recipe.encode(batch.to(device)), batch, lead)
            means.append(mean.cpu())
            firsts.append(None if first is None else first.cpu())
            index += which
    if not index:
        raise ConfigError(f"no sample can be read{f': {bad[0][0]}: {bad[0][1]}' if bad else ''}")
    whole = torch.cat(means)
    if not bool(whole.isfinite().all()):
        raise ConfigError("the features are not finite: the weights, or the inputs, are broken")
    return Features(whole, None if firsts[0] is None else torch.cat(firsts), index, bad)


@contextmanager
def undisturbed(recipe: nn.Module) -> Iterator[None]:
    """Within, a module is in eval mode; afterwards its mode (of each part), its buffers and all generators of random
    numbers are what they were, to the bit."""
    modes = [(module, module.training) for module in recipe.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in recipe.buffers()]
    state, others = random.getstate(), np.random.get_state()  # noqa: NPY002 (whoever uses it finds it untouched)
    devices = {buffer.device.index for buffer in (*recipe.parameters(), *recipe.buffers()) if buffer.is_cuda}
    try:
        with torch.random.fork_rng(sorted(devices)):
            recipe.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        random.setstate(state)
        np.random.set_state(others)  # noqa: NPY002


def raw_pixels(batch: Batch) -> Tensor | None:
    """What a probe of raw pixels looks at: the images of a batch, averaged down to 32 x 32 at most, as rows
    [B, C * h * w]; None for other inputs."""
    images = getattr(batch, "images", None)
    if not isinstance(images, Tensor) or images.ndim != 4:
        return None
    images = images.float()
    size = [min(side, _PIXELS) for side in images.shape[2:]]
    return F.adaptive_avg_pool2d(images, size).flatten(1)


def key_of(identity: Sequence[str]) -> str:
    """A name for what is a function of `identity`."""
    return hashlib.sha256("\n".join(["1", *identity]).encode(errors="surrogateescape")).hexdigest()[:20]


def kept(folder: Path, identity: Sequence[str], compute: Callable[[], Features]) -> tuple[Features, bool]:
    """(features, whether they were found in `folder`); what is computed is written there, under a name made of
    `identity`, all that the features are a function of."""
    path = folder / f"features-{key_of(identity)}.safetensors"
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                bad = [tuple(entry) for entry in json.loads(file.metadata()["bad"])]
            return Features(tensors["mean"], tensors.get("first"), tensors["index"].tolist(), bad), True
        except (SafetensorError, OSError, KeyError, ValueError):  # cut off: computed anew
            pass
    made = compute()
    tensors = {"mean": made.mean, "index": torch.tensor(made.index)}
    if made.first is not None:
        tensors["first"] = made.first.contiguous()
    write_whole(path, lambda place: save_file(tensors, place, {"bad": json.dumps(made.bad)}))
    return made, False
