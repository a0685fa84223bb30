"""GraphMAE: graphs, the features of some of whose nodes are hidden (Hou et al., KDD 2022, arXiv:2205.10803).

A masked node shows a learned token, a few of them the features of another node; no node and no edge is left out. What
the encoder made of masked nodes is set to zero again before the decoder, one layer of graph attention, so that it must
come from their neighbours. With x the features of masked nodes and y the prediction,

    loss = mean over masked nodes of (1 - cos(y, x))^power
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from maefast import masking, ops
from maefast.data.graphs import GraphBatch, Graphs
from maefast.masking.graphs import moved
from maefast.nn.graph import GraphDecoder, GraphEncoder, decoder_edges
from maefast.recipe import Draw, Output, Picture, Progress, Recipe, Spec, View

_SIZE = ("features", "embed_dim", "depth", "num_heads", "mask_ratio", "replace")


@dataclass(frozen=True)
class GraphParts:
    """x: [N, F], masked nodes that are replaced having the features of others. edges: int64 [2, E] with loops.
    decoder_edges: see `maefast.nn.graph.decoder_edges`. graph: int64 [N], of `graphs` many, the one of each node."""

    x: Tensor
    edges: Tensor
    decoder_edges: Tensor | None
    graph: Tensor
    graphs: int


class GraphMAE(Recipe):
    """Args:
        features: F. embed_dim, depth, num_heads: of the encoder. norm: "none", "layer" or "batch". residual: of it.
        mask_ratio: int(ratio * N) of each graph's N nodes are masked.
        replace: share of these that show the features of another node, int(replace * M).
        drop_edge: share of the edges that the encoder does not see, drawn one by one. Loops stay.
        decoder: "gat", "mlp" or "linear", see `maefast.nn.graph.GraphDecoder`.
        power: of the loss, at least 1. feat_drop, attn_drop: of encoder and decoder.

    Shapes: x [N, F] of all graphs -> latents [N, D]; pred [M, F].
    """

    spec = Spec(
        name="graphmae",
        title="GraphMAE",
        paper="Hou et al., KDD 2022, arXiv:2205.10803",
        modality="graphs",
        sizes={
            "cora": dict(zip(_SIZE, (1433, 512, 2, 4, 0.5, 0.05))),
            "citeseer": {**dict(zip(_SIZE, (3703, 512, 2, 2, 0.5, 0.1))), "power": 1.0},
            "pubmed": dict(zip(_SIZE, (500, 1024, 2, 4, 0.75, 0.0))),
            "arxiv": {**dict(zip(_SIZE, (128, 1024, 3, 4, 0.5, 0.0))), "drop_edge": 0.5, "norm": "layer"},
        },
        training={
            "lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 2e-4, "epochs": 1500, "warmup": 0.0, "batch_size": 1,
        },
        demo={
            "model_args": {"features": 32, "embed_dim": 64, "num_heads": 4},
            "mask_ratio": 0.5, "steps": 300, "batch_size": 8, "picture_rows": 3,
        },
        baseline="the mean of the visible nodes of a graph",
    )  # fmt: skip

    def __init__(
        self,
        features: int = 1433,
        embed_dim: int = 512,
        depth: int = 2,
        num_heads: int = 4,
        norm: str = "none",
        residual: bool = False,
        mask_ratio: float = 0.5,
        replace: float = 0.05,
        drop_edge: float = 0.0,
        decoder: str = "gat",
        power: float = 3.0,
        feat_drop: float = 0.2,
        attn_drop: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= drop_edge < 1:
            raise ValueError(f"drop_edge must lie in [0, 1), got {drop_edge}")
        self.wants = Graphs(features)
        self.mask_ratio, self.replace, self.drop_edge, self.power = mask_ratio, replace, drop_edge, power
        self.mask_token = nn.Parameter(torch.zeros(1, features))
        self.encoder = GraphEncoder(features, embed_dim, depth, num_heads, feat_drop, attn_drop, residual, norm)
        self.decoder = GraphDecoder(embed_dim, features, decoder, feat_drop, attn_drop)

    def prepare(self, batch: GraphBatch, draw: Draw, progress: Progress) -> View:
        """parts: `GraphParts`; plan: a `NodeMask`; target: the features [N, F]."""
        self.wants.check(batch)
        device, widest = batch.x.device, max(batch.nodes)
        noise, others = (draw.uniform(what, widest) for what in ("mask", "replace"))
        plan = masking.nodes(batch.nodes, self.mask_ratio, self.replace, noise=noise, donor_noise=others)
        if not len(plan.masked):
            raise ValueError(f"graphs of {batch.nodes} nodes have none to mask at a mask_ratio of {self.mask_ratio}")
        edges = with_loops(batch.edge_index, len(batch.x))
        into = decoder_edges(edges, plan) if self.decoder.kind == "gat" else None
        if self.drop_edge:
            dice = draw.uniform("edges", max(batch.edges)).numpy()
            stays = np.concatenate([row[:count] >= self.drop_edge for row, count in zip(dice, batch.edges)])
            edges = with_loops(batch.edge_index[:, stays], len(batch.x))
        plan, x = plan.to(device), batch.x.to(self.mask_token.dtype)
        shown = x[plan.source] if self.replace else x
        graph = moved(torch.from_numpy(batch.graph), device)
        edges, into = (None if found is None else moved(found, device) for found in (edges, into))
        return View(GraphParts(shown, edges, into, graph, len(batch)), plan, x)

    def compute(self, view: View) -> Output:
        parts, plan = view.parts, view.plan
        x = torch.where(plan.token[:, None], self.mask_token.to(parts.x.dtype), parts.x)
        pred = self.decoder(self.encoder(x, parts.edges), plan, parts.decoder_edges)
        return self._scored(pred, view)

    def _scored(self, pred: Tensor, view: View) -> Output:
        loss = ops.feature_loss(pred, view.target, index=view.plan.masked, loss="cosine", power=self.power)
        return Output({"features": loss}, pred, view)

    def baseline(self, view: View) -> Output:
        """The sum of the visible nodes: a cosine does not see the length."""
        graph, plan, x = view.parts.graph, view.plan, view.target
        sums = x.new_zeros(view.parts.graphs, x.shape[1]).index_add(0, graph[plan.visible], x[plan.visible])
        return self._scored(sums[graph[plan.masked]], view)

    def encode(self, batch: GraphBatch) -> Tensor:
        """[N, D]."""
        self.wants.check(batch)
        edges = moved(with_loops(batch.edge_index, len(batch.x)), batch.x.device)
        return self.encoder(batch.x.to(self.mask_token.dtype), edges)

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.graph_drawing import drawing

        how = f"{self.mask_ratio:.0%} of the nodes masked (grey)"
        if self.replace:
            how += f", {self.replace:.0%} of these shown with the features of another node"
        return drawing(view, self.compute(view).pred, names, how)


def with_loops(edges: np.ndarray, nodes: int) -> Tensor:
    """The edges, then one of each node to itself."""
    return torch.from_numpy(np.concatenate([edges, np.tile(np.arange(nodes), (2, 1))], 1))
