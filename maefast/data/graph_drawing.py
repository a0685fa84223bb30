"""Drawings of graphs whose nodes are coloured by their features: what was there, what was shown, what was predicted."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maefast.data.figure import FigurePicture, new_figure
from maefast.recipe import View

MOST = 250  # nodes that are drawn of a graph
_GREY = (0.82, 0.82, 0.82)


@dataclass
class Drawn:
    """A graph as it is drawn. places: [n, 2]. edges: int [2, e]. original, shown, predicted: colours [n, 3]; masked,
    token: bool [n]."""

    places: np.ndarray
    edges: np.ndarray
    original: np.ndarray
    shown: np.ndarray
    predicted: np.ndarray
    masked: np.ndarray
    token: np.ndarray


@dataclass
class Drawing(FigurePicture):
    """Graphs in rows, as a `maefast.recipe.Picture`."""

    graphs: Sequence[Drawn]
    names: Sequence[str]
    caption: str

    def _figure(self, title: str) -> Any:
        rows, title = len(self.graphs), "\n".join(textwrap.wrap(title, 120))
        figure = new_figure(title, figsize=(9, 3 * rows + 0.6), dpi=80, layout="constrained")
        from matplotlib.collections import LineCollection

        for row, (graph, name) in enumerate(zip(self.graphs, self.names)):
            colours = {
                "original": graph.original,
                "shown to the encoder": np.where(graph.token[:, None], _GREY, graph.shown),
                "predicted, of masked nodes": np.where(graph.masked[:, None], graph.predicted, 1.0),
            }
            for place, (what, colour) in enumerate(colours.items()):
                axes = figure.add_subplot(rows, len(colours), row * len(colours) + place + 1)
                lines = graph.places[graph.edges.T]
                axes.add_collection(LineCollection(lines, colors="0.75", linewidths=0.3, zorder=0))
                replaced = graph.masked & ~graph.token & (place == 1)
                edge = np.where(replaced[:, None], (0.0, 0.0, 0.0), (0.6, 0.6, 0.6))
                axes.scatter(
                    *graph.places.T,
                    c=colour,
                    s=np.where(graph.masked | (place < 2), 26, 8),
                    edgecolors=edge,
                    linewidths=0.4 + replaced,
                )
                axes.set_axis_off()
                axes.set_title(what if row == 0 else "", fontsize=9)
                if place == 0:
                    axes.text(0, 0, name, fontsize=8, transform=axes.transAxes)
        return figure


def drawing(view: View, pred: Tensor, names: Sequence[str], caption: str) -> Drawing:
    """What a view of `maefast.recipes.graphmae` and predictions [M, F] look like. Of a larger graph, the nodes around
    the first masked one. Colours are the three main directions of the true features, of unit length as the loss sees
    them, over the nodes of a graph that are drawn."""
    true, shown, plan = (view.target, view.parts.x, view.plan)
    full = torch.zeros_like(true)
    full[plan.masked] = pred.detach().to(full.dtype)
    true, shown, full = (_unit(x.detach().double().cpu().numpy()) for x in (true, shown, full))
    masked = np.zeros(len(true), dtype=bool)
    masked[plan.masked.cpu().numpy()] = True
    token, edges = plan.token.cpu().numpy(), view.parts.edges.cpu().numpy()
    edges = edges[:, edges[0] < edges[1]]
    of = view.parts.graph.cpu().numpy()
    graphs = []
    for index in range(view.parts.graphs):
        inside = np.flatnonzero(of == index)
        here = edges[:, of[edges[0]] == index] - inside[0]
        hidden = np.flatnonzero(masked[inside])
        some = _near(here, len(inside), hidden[0] if len(hidden) else 0)
        place = np.full(len(inside), -1)
        place[some] = np.arange(len(some))
        here = place[here]
        here = here[:, (here >= 0).all(0)]
        rows = inside[some]
        paint = _palette(true[rows])
        colours = (paint(x[rows]) for x in (true, shown, full))
        graphs.append(Drawn(layout(here, len(some)), here, *colours, masked[rows], token[rows]))
    return Drawing(graphs, names, caption + "; colours: three main directions of the features, without their length")


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _palette(x: np.ndarray) -> Any:
    """A map of features to colours in which the rows of `x` [n, F] differ most."""
    mean = x.mean(0)
    axes = np.linalg.svd(x - mean, full_matrices=False)[2][:3]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]  # a sign is chance otherwise
    low, high = np.percentile((x - mean) @ axes.T, (5, 95), axis=0)

    def paint(rows: np.ndarray) -> np.ndarray:
        found = ((rows - mean) @ axes.T - low) / np.maximum(high - low, 1e-12)
        return np.pad(found.clip(0, 1), ((0, 0), (0, 3 - found.shape[1])), constant_values=0.5)

    return paint


def _near(edges: np.ndarray, nodes: int, start: int) -> np.ndarray:
    """Up to `MOST` nodes, breadth first from `start`."""
    if nodes <= MOST:
        return np.arange(nodes)
    seen = np.zeros(nodes, dtype=bool)
    seen[start], found, border = True, [start], np.array([start])
    while len(found) < MOST and len(border):
        ends = np.concatenate([edges[1][np.isin(edges[0], border)], edges[0][np.isin(edges[1], border)]])
        border = np.unique(ends[~seen[ends]])[: MOST - len(found)]
        seen[border] = True
        found.extend(border.tolist())
    return np.array(found)


def layout(edges: np.ndarray, nodes: int, steps: int = 80) -> np.ndarray:
    """Places [nodes, 2] by springs along edges and a push between all (Fruchterman and Reingold, 1991)."""
    places = np.random.default_rng(0).uniform(-1, 1, (nodes, 2))
    pull = np.zeros((nodes, nodes))
    pull[edges[0], edges[1]] = pull[edges[1], edges[0]] = 1
    ideal = 2 / np.sqrt(max(nodes, 1))
    for step in range(steps):
        apart = places[:, None] - places
        distance = np.maximum(np.linalg.norm(apart, axis=2), 1e-3)
        force = ideal**2 / distance**2 - pull * distance / ideal
        move = (apart * force[..., None]).sum(1) - 0.5 * places  # the last holds unconnected nodes together
        length = np.maximum(np.linalg.norm(move, axis=1, keepdims=True), 1e-9)
        places += move / length * np.minimum(length, 0.3 * (1 - step / steps))
    return places
