"""Graphs whose nodes have features: files of them, and stochastic block models as a demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maefast.data.blob import Where, opened
from maefast.data.collection import DEMO, Collection, Files, Made
from maefast.ops import _checks
from maefast.recipe import Batch

_GRAPHS = 48  # of the demo


class Graph(NamedTuple):
    """x: float32 [N, F]. edge_index: int64 [2, E], (from, to), no loops."""

    x: np.ndarray
    edge_index: np.ndarray


@dataclass
class GraphBatch(Batch):
    """Graphs one after another; a large one alone is a batch of one. `GraphBatch.of` makes it.

    Attributes:
        x: float32 [N, F], the nodes' features. edge_index: int64 [2, E], (from, to) as rows of x, graph by graph,
            without loops; on the host, where recipes choose among edges.
        nodes, edges: how many each graph has, G numbers each.
    """

    x: Tensor
    edge_index: np.ndarray
    nodes: tuple[int, ...]
    edges: tuple[int, ...]

    def __len__(self) -> int:
        """G."""
        return len(self.nodes)

    @staticmethod
    def of(graphs: Sequence[tuple[Any, Any]], key: np.ndarray | None = None) -> GraphBatch:
        """A batch of pairs (x [N, F], edge_index [2, E]), tensors or arrays; an undirected edge stands in edge_index in
        both directions. Loops are left out: a recipe that wants one for each node adds it.

        Raises:
            TypeError, ValueError: no graph; shapes or dtypes do not fit; an edge leads out of its graph.
        """
        if not len(graphs):
            raise ValueError("graphs must hold at least one graph")
        features, edges, start = [], [], 0
        for x, edge_index in graphs:
            x = torch.as_tensor(x)
            _checks.tensor("x", x, ndim=2)
            edge_index = _edges(edge_index, len(x))
            features.append(x)
            edges.append(edge_index + start)
            start += len(x)
        if len({x.shape[1] for x in features}) > 1:
            raise ValueError(f"x must be [N, F] with one F for all graphs, got {[tuple(x.shape) for x in features]}")
        counts = tuple(map(len, features)), tuple(found.shape[1] for found in edges)
        return GraphBatch(torch.cat(features), np.concatenate(edges, 1), *counts, key=key)

    @property
    def graph(self) -> np.ndarray:
        """int64 [N]: which graph a node belongs to."""
        return np.repeat(np.arange(len(self.nodes)), self.nodes)


def _edges(edge_index: Any, nodes: int) -> np.ndarray:
    """int64 [2, E] without loops. ValueError: it is none, or an edge leads out of the graph."""
    found = np.asarray(edge_index.cpu() if isinstance(edge_index, Tensor) else edge_index)
    if found.ndim != 2 or len(found) != 2 or found.dtype.kind not in "iu":
        raise ValueError(f"edge_index must be integers [2, E], got {found.dtype} {list(found.shape)}")
    if found.size and not (found.min() >= 0 and found.max() < nodes):
        raise ValueError(f"edge_index must lie in 0 … {nodes - 1}, one less than there are nodes")
    return found[:, found[0] != found[1]].astype(np.int64)


@dataclass(frozen=True)
class Graphs:
    """A recipe wants `GraphBatch`es whose nodes have `features` F features.

    `--data` names a folder of .npz files, each a graph: an array `x` [nodes, F] and an array `edge_index` [2, edges],
    an undirected edge in both directions; others in it are left alone. Features are taken as they are.
    """

    features: int
    unit = "graph"

    def open(self, options: Any) -> Collection:
        if options.data == DEMO:
            seed = options.seed
            made = Made("stochastic block models", _GRAPHS, lambda index: self.made(index, seed), "graph {}".format)
            return Collection(self, made, options)
        return Collection(self, Files(options.data, (".npz",), read_graph, "graphs", options), options)

    def made(self, index: int, seed: int = 0) -> Graph:
        return block_model(index, self.features, seed)[0]

    def check(self, batch: Any) -> None:
        """Raise unless it is a batch of such graphs."""
        if not isinstance(batch, GraphBatch):
            raise TypeError(f"a GraphBatch is wanted, got {type(batch).__name__}")
        _checks.tensor("x", batch.x, ndim=2)
        if batch.x.shape[1] != self.features:
            raise ValueError(f"x must be [N, {self.features}], got {tuple(batch.x.shape)}")
        edges = batch.edge_index
        if not isinstance(edges, np.ndarray) or edges.dtype != np.int64 or edges.ndim != 2 or len(edges) != 2:
            raise TypeError("edge_index must be a NumPy array, int64 [2, E]; GraphBatch.of makes it")
        if not batch.nodes or len(batch.nodes) != len(batch.edges):
            raise ValueError(f"nodes and edges must count both of each graph, got {batch.nodes} and {batch.edges}")
        if sum(batch.nodes) != len(batch.x) or sum(batch.edges) != edges.shape[1]:
            raise ValueError(
                f"nodes and edges must count the {len(batch.x)} rows of x and the {edges.shape[1]} columns of "
                f"edge_index, and come to {sum(batch.nodes)} and {sum(batch.edges)}"
            )
        first = np.repeat(np.cumsum([0, *batch.nodes[:-1]]), batch.edges)
        last = np.repeat(np.cumsum(batch.nodes), batch.edges)
        if ((edges < first) | (edges >= last)).any():
            raise ValueError("edge_index must join nodes of the same graph, in the order of the graphs")
        if (edges[0] == edges[1]).any():
            raise ValueError("edge_index must not hold loops, edges of a node to itself; GraphBatch.of leaves them out")

    def sample(self, raw: Graph, rng: np.random.Generator) -> Graph:
        return self.example(raw)

    def example(self, raw: Graph) -> Graph:
        if raw.x.shape[1] != self.features:
            raise ValueError(f"its nodes have {raw.x.shape[1]} features, and {self.features} are wanted")
        return raw

    def collate(self, samples: Sequence[Graph], key: np.ndarray) -> GraphBatch:
        return GraphBatch.of(samples, key)


@lru_cache(maxsize=4)  # a large graph alone is every step's sample
def read_graph(where: Where) -> Graph:
    """ValueError: it is something else."""
    with opened(where) as stream, np.load(stream) as file:
        if missing := {"x", "edge_index"} - set(file.files):
            raise ValueError(
                f"the arrays x and edge_index are wanted, and it has no {' and no '.join(sorted(missing))}"
            )
        x, edge_index = file["x"], file["edge_index"]
    if x.ndim != 2 or not len(x) or x.dtype.kind not in "fiub":
        raise ValueError(f"x must be numbers [nodes, features], not {x.dtype} {list(x.shape)}")
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError("some of its features are not finite")
    return Graph(x, _edges(edge_index, len(x)))


def block_model(
    index: int,
    features: int,
    seed: int = 0,
    *,
    nodes: tuple[int, int] = (80, 160),
    blocks: int = 5,
    inside: float = 8.0,
    across: float = 2.0,
    noise: float = 1.0,
) -> tuple[Graph, np.ndarray]:
    """A graph of communities, and which of them each node belongs to, int64 [N].

    A node has on average `inside` edges to its own community and `across` to others. Its features are those of its
    community, unit vectors that all graphs of a seed share, and normal noise of length `noise` or so.
    """
    centres = np.random.default_rng([seed, 0, 5]).standard_normal((blocks, features))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    rng = np.random.default_rng([seed, index + 1, 5])
    count = int(rng.integers(*nodes))
    labels = rng.integers(0, blocks, count)
    same = labels[:, None] == labels
    share = np.where(same, inside * blocks / count, across * blocks / (count * (blocks - 1)))
    pairs = np.stack(np.nonzero(np.triu(rng.random((count, count)) < share, 1)))
    x = centres[labels] + rng.standard_normal((count, features)) * noise / np.sqrt(features)
    return Graph(x.astype(np.float32), np.concatenate([pairs, pairs[::-1]], 1)), labels
