"""Graph attention, and an autoencoder of it that recomputes no node whose loss nobody asks for.

The layers are PyTorch Geometric's (the extra "graph"), which is imported when the first of them is built. Edges are
int64 [2, E], (from, to). On a CPU the sums over edges are the same in every run; on a GPU they are atomic, unless
``torch.use_deterministic_algorithms(True)`` is set.
"""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor, nn

from maefast.errors import need
from maefast.masking import NodeMask
from maefast.ops import _checks

NORMS = {"none": lambda width: nn.Identity(), "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
DECODERS = ("gat", "mlp", "linear")


def geometric() -> ModuleType:
    """torch_geometric.nn. TrainError: it is not installed."""
    try:
        import torch_geometric.nn
    except ImportError as error:
        raise need("torch_geometric", "A layer of a graph network", extra="graph") from error
    return torch_geometric.nn


def attention_layer(width: int, out: int, heads: int, attn_drop: float, slope: float = 0.2) -> nn.Module:
    """PyTorch Geometric's GATConv (Veličković et al., 2018), [N, width] -> [N, out], without loops of its own, started
    as GraphMAE starts it."""
    if out % heads:
        raise ValueError(f"num_heads {heads} does not divide a width of {out}")
    made = geometric().GATConv(
        width, out // heads, heads, negative_slope=slope, dropout=attn_drop, add_self_loops=False
    )
    for weight in (made.lin.weight, made.att_src, made.att_dst):
        nn.init.xavier_normal_(weight, gain=1.414)
    return made


class GraphLayer(nn.Module):
    """norm(attention(x) + shortcut(x)), then PReLU.

    Args:
        width, out, heads: of the attention. attn_drop: of its weights. residual: with the shortcut, which is linear
            where the widths differ. norm: "none", "layer" or "batch".
    """

    def __init__(
        self, width: int, out: int, heads: int, attn_drop: float = 0.0, residual: bool = False, norm: str = "none"
    ) -> None:
        super().__init__()
        _checks.one_of("norm", norm, tuple(NORMS))
        self.conv = attention_layer(width, out, heads, attn_drop)
        self.shortcut = None
        if residual:
            self.shortcut = nn.Identity() if width == out else nn.Linear(width, out, bias=False)
        self.norm = NORMS[norm](out)
        self.act = nn.PReLU()

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        y = self.conv(x, edges)
        return self.act(self.norm(y if self.shortcut is None else y + self.shortcut(x)))


class GraphEncoder(nn.Module):
    """Layers of attention, dropout in front of each: x [N, F], edges -> [N, D].

    Args:
        features, width, depth, heads: F, D, how many layers, and heads of each. feat_drop: of the inputs of layers.
        attn_drop, residual, norm: of the layers; the first has no shortcut but where `residual` is set.
    """

    def __init__(
        self,
        features: int,
        width: int,
        depth: int,
        heads: int,
        feat_drop: float = 0.0,
        attn_drop: float = 0.0,
        residual: bool = False,
        norm: str = "none",
    ) -> None:
        super().__init__()
        _checks.integer("depth", depth, 1)
        self.drop = nn.Dropout(feat_drop)
        widths = [features] + [width] * depth
        self.layers = nn.ModuleList(
            GraphLayer(before, after, heads, attn_drop, residual, norm) for before, after in pairwise(widths)
        )

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(self.drop(x), edges)
        return x


class GraphDecoder(nn.Module):
    """Latents -> the features of masked nodes, [N, D] -> [M, F].

    "gat": a linear map of the latents, masked rows of which are then set to zero ("re-mask"), and one layer of
    attention. Only what reaches a masked node is computed: no other node is a target, and all masked nodes, as sources,
    are one row of zeros. "mlp" and "linear" look at each masked node alone, and are not re-masked.

    Args:
        width, features: D, F. kind: as above. feat_drop, attn_drop: as of the encoder.
    """

    def __init__(self, width: int, features: int, kind: str = "gat", feat_drop: float = 0.0, attn_drop: float = 0.0):
        super().__init__()
        _checks.one_of("decoder", kind, DECODERS)
        self.kind = kind
        self.embed = nn.Linear(width, width, bias=False)
        self.drop = nn.Dropout(feat_drop)
        if kind == "gat":
            self.pred = attention_layer(width, features, 1, attn_drop)
            self.pred.att_dst.requires_grad_(False)  # multiplies targets, which are all zero
        elif kind == "mlp":
            hidden = [nn.Linear(width, width), nn.PReLU(), nn.Dropout(0.2)]
            self.pred = nn.Sequential(*hidden, nn.Linear(width, features))
        else:
            self.pred = nn.Linear(width, features)

    def forward(self, latents: Tensor, plan: NodeMask, edges: Tensor | None) -> Tensor:
        """`edges`: see `decoder_edges`; None where the kind is not "gat"."""
        if self.kind != "gat":
            return self.pred(self.embed(latents[plan.masked]))
        rows = self.embed(latents[plan.visible])
        rows = torch.cat([self.drop(rows), rows.new_zeros(1, rows.shape[1])])
        return self.pred((rows, None), edges, size=(len(rows), len(plan.masked)))


def decoder_edges(edges: Tensor, plan: NodeMask) -> Tensor:
    """The edges into masked nodes, [2, E'], in the order of `edges`: from a place in ``plan.visible``, or from V, which
    stands for any masked node, to a place in ``plan.masked``. On a device it waits for the count; do it on the host."""
    nodes = len(plan.token)
    place = torch.full((2, nodes), -1, dtype=torch.int64, device=edges.device)
    place[0] = len(plan.visible)
    place[0, plan.visible] = torch.arange(len(plan.visible), device=edges.device)
    place[1, plan.masked] = torch.arange(len(plan.masked), device=edges.device)
    source, target = place[0][edges[0]], place[1][edges[1]]
    return torch.stack([source, target])[:, target >= 0]
