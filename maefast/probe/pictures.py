"""Pictures of features: the samples in two dimensions by class, and features of patches as colours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maefast.data.figure import FigurePicture, new_figure
from maefast.recipe import Batch, Recipe

from .features import lead_tokens, undisturbed

_SHOWN = 20  # classes with a colour of their own: ten strong ones, or, of more classes, these and pale ones
_POINTS, _NEIGHBOURS = 4000, 2000  # at most, evenly spread


@dataclass
class Scatter(FigurePicture):
    """The first two principal components of features [n, D], a dot for each sample in the colour of its class.

    labels: int [n]. classes: their names.
    """

    features: Tensor
    labels: np.ndarray
    classes: Sequence[str]
    caption: str = "the first two principal components of the features"

    def _figure(self, title: str) -> Any:
        figure = new_figure(title, figsize=(8, 6), dpi=110, layout="constrained")
        axes = figure.subplots()
        chosen, flat, names = self._flat()
        labels = self.labels[chosen]
        common = np.argsort(-np.bincount(self.labels, minlength=len(self.classes)), kind="stable")[:_SHOWN]
        rest = ~np.isin(labels, common)
        if rest.any():
            axes.scatter(*flat[rest].T, s=6, color="#cccccc", label=f"{len(self.classes) - len(common)} other classes")
        from matplotlib import colormaps

        colours = colormaps["tab10" if len(common) <= 10 else "tab20"]
        for place, label in enumerate(sorted(common)):
            axes.scatter(*flat[labels == label].T, s=9, color=colours(place), label=self.classes[label])
        for axis, name in zip((axes.xaxis, axes.yaxis), names):
            axis.set_label_text(name)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2, frameon=False)
        return figure

    def save(self, path: Path, title: str) -> None:
        with _any_script():
            super().save(path, title)

    def pixels(self) -> Tensor:
        with _any_script():
            return super().pixels()

    def _flat(self) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
        """(the samples that are drawn, int [m]; their places, [m, 2]; names of the axes)."""
        flat, share = _components(self.features.double())
        chosen = _spread(len(flat), _POINTS)
        names = [f"{name} component, {part:.0%} of the variance" for part, name in zip(share, ("first", "second"))]
        return chosen, flat[chosen], names


@dataclass
class Neighbours(Scatter):
    """The same by t-SNE (van der Maaten and Hinton, 2008) of scikit-learn: near ones stay near, distances between
    groups mean nothing. Of at most 2000 samples, of up to 50 principal components; a function of these and `seed`."""

    caption: str = "the features by t-SNE: near ones are near, and distances between groups mean nothing"
    seed: int = 0

    def _flat(self) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE

        chosen = _spread(len(self.features), _NEIGHBOURS)
        rows = self.features[chosen].double().numpy()
        if min(rows.shape) > 50:
            rows = PCA(50, svd_solver="full").fit_transform(rows)
        perplexity = min(30.0, max(1.0, (len(rows) - 1) / 3))
        start = "pca" if rows.shape[1] > 1 else "random"
        made = TSNE(perplexity=perplexity, init=start, random_state=self.seed % 2**32).fit_transform(rows)
        return chosen, made, ("", "")


@contextmanager
def _any_script() -> Iterator[None]:
    """Names of classes may be in a script that matplotlib's font lacks: it draws boxes, and no user can mend that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _spread(count: int, most: int) -> np.ndarray:
    return np.linspace(0, count, min(count, most), endpoint=False).astype(int)


def _components(features: Tensor) -> tuple[np.ndarray, list[float]]:
    """[n, 2] and the shares of the variance."""
    centred = features - features.mean(0)
    values, axes = torch.linalg.eigh(centred.T @ centred)
    axes = axes[:, -2:].flip(1)
    axes = axes * torch.where(axes.gather(0, axes.abs().argmax(0, keepdim=True)) < 0, -1, 1)  # one sign everywhere
    flat, whole = centred @ axes, max(float(values.sum()), 1e-300)
    if flat.shape[1] < 2:
        flat = torch.cat([flat, torch.zeros_like(flat)], 1)
    parts = [float(value) / whole for value in values.flip(0)[:2]]
    return flat.numpy(), [*parts, 0.0][:2]


@torch.no_grad()
def patch_sheet(recipe: Recipe, batch: Batch, names: Sequence[str], device: torch.device | str) -> Any | None:
    """A `maefast.recipe.Picture` of images beside their features of patches, whose first three principal components
    over all of these images are red, green and blue. None: the recipe gives no map of images, or too coarse a one."""
    images = getattr(batch, "images", None)
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
        return None
    with undisturbed(recipe):
        found = recipe.encode(batch.to(device)).float().cpu()
    if found.ndim == 4:
        grid, found = tuple(found.shape[2:]), found.flatten(2).transpose(1, 2)
    else:
        found = found[:, lead_tokens(recipe) :]
        grid = grid_of(found.shape[1], tuple(images.shape[2:]))
    if grid is None or min(grid) < 4 or found.shape[2] < 3:
        return None
    from maefast.data.images.pictures import Sheet
    from maefast.recipes._images import feature_sheet

    if images.is_floating_point():  # of any range
        shades = (images.float() - images.min()) / (images.max() - images.min()).clamp_min(1e-12)
    else:
        shades = images.float() / torch.iinfo(images.dtype).max
    shown = torch.ones(found.shape[:2], dtype=torch.bool)
    original, _, colours = feature_sheet(shades, shown, [found], grid)
    caption = f"features of {grid[0]} x {grid[1]} patches, their first three principal components as colours"
    return Sheet([original, colours], names, caption, ("image", "features"))


def grid_of(count: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """(rows, columns) of `count` square patches of an image of `size` = (height, width); None: they are not."""
    for rows in range(1, count + 1):
        if count % rows == 0 and rows * size[1] == count // rows * size[0]:
            return rows, count // rows
    return None
