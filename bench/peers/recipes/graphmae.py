from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.plain import below, parameters
from maefast.data.graphs import GraphBatch, block_model
from maefast.recipe import View


def batch(size: int) -> GraphBatch:
    """Graphs with as many features as Cora's."""
    return GraphBatch.of([block_model(index, 1433)[0] for index in range(size)])


def attention(x: Tensor, present: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Graph attention on a dense matrix: present[i, j] where there is an edge from j to i."""
    _, heads, width = p["att_src"].shape
    h = F.linear(x, p["lin.weight"]).view(-1, heads, width)
    score = F.leaky_relu((h * p["att_dst"]).sum(2)[:, None] + (h * p["att_src"]).sum(2)[None], 0.2)
    weight = score.masked_fill(~present[:, :, None], float("-inf")).softmax(1)
    return torch.einsum("ijh,jhc->ihc", weight, h).flatten(1) + p["bias"]


def dense(edges: Tensor, nodes: int) -> Tensor:
    present = torch.eye(nodes, dtype=torch.bool)
    present[edges[1], edges[0]] = True
    return present


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """GraphMAE (Hou et al., 2022), all edges seen by the encoder, in eval mode."""
    p, plan, target = parameters(recipe), view.plan, view.target
    present = dense(view.parts.edges, len(target))
    x = target[plan.source] * ~plan.token[:, None] + plan.token[:, None] * p["mask_token"]
    for index in range(len(recipe.encoder.layers)):
        layer = below(p, f"encoder.layers.{index}.")
        x = F.prelu(attention(x, present, below(layer, "conv.")), layer["act.weight"])
    x = F.linear(x, p["decoder.embed.weight"])
    hidden = torch.zeros(len(x), 1, dtype=torch.bool)
    hidden[plan.masked] = True
    x = attention(x.masked_fill(hidden, 0), present, below(p, "decoder.pred."))[plan.masked]
    return {"features": (1 - F.cosine_similarity(x, target[plan.masked])).pow(recipe.power).mean()}
