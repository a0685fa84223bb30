from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import below, parameters
from maefast.data.graphs import Graph, GraphBatch
from maefast.recipe import View

ARGUMENTS = {"feat_drop": 0.0, "attn_drop": 0.0}


def batch(size: int) -> GraphBatch:
    """Graphs of as many nodes, features and edges as Cora has."""
    rng = np.random.default_rng(0)
    graphs = []
    for _ in range(size):
        x = (rng.random((2708, 1433)) < 0.013).astype(np.float32)
        one, other = rng.integers(0, 2708, 5278), rng.integers(1, 2708, 5278)
        pairs = np.stack([one, (one + other) % 2708])
        graphs.append(Graph(x, np.concatenate([pairs, pairs[::-1]], 1)))
    return GraphBatch.of(graphs)


def attention(x: Tensor, edges: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Graph attention, summed over edges (from, to)."""
    _, heads, width = p["att_src"].shape
    h, (source, target) = F.linear(x, p["lin.weight"]).view(-1, heads, width), edges
    score = F.leaky_relu((h * p["att_src"]).sum(2)[source] + (h * p["att_dst"]).sum(2)[target], 0.2)
    h = h.to(score.dtype)  # under autocast sums stay wide
    top = torch.full_like(h[:, :, 0], float("-inf"))
    top = top.scatter_reduce(0, target[:, None].expand_as(score), score.detach(), "amax")
    weight = (score - top[target]).exp()
    total = torch.zeros_like(top).index_add(0, target, weight)
    share = weight / total[target]
    return torch.zeros_like(h).index_add(0, target, share[:, :, None] * h[source]).flatten(1) + p["bias"]


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """GraphMAE (Hou et al., 2022), all edges seen by the encoder, without dropout."""
    p, plan, target, edges = parameters(recipe), view.plan, view.target, view.parts.edges
    x = target[plan.source] * ~plan.token[:, None] + plan.token[:, None] * p["mask_token"]
    for index in range(len(recipe.encoder.layers)):
        layer = below(p, f"encoder.layers.{index}.")
        x = F.prelu(attention(x, edges, below(layer, "conv.")), layer["act.weight"])
    x = F.linear(x, p["decoder.embed.weight"])
    hidden = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
    hidden[plan.masked] = True
    x = attention(x.masked_fill(hidden, 0), edges, below(p, "decoder.pred."))[plan.masked]
    return {"features": (1 - F.cosine_similarity(x, target[plan.masked])).pow(recipe.power).mean()}
