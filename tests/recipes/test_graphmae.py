from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maefast import masking, recipes
from maefast.bench.peers.plain import parameters
from maefast.bench.peers.recipes.graphmae import attention
from maefast.data.graphs import GraphBatch, block_model, read_graph
from maefast.nn.graph import attention_layer, decoder_edges
from tests.recipes.common import RecipeTests, scatter

pytest.importorskip("torch_geometric")


class TestGraphMAE(RecipeTests):
    name = "graphmae"
    toy = {"features": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "replace": 0.2}

    def batch(self, recipe, size=3):
        return GraphBatch.of([block_model(index, 8, 1, nodes=(20, 40))[0] for index in range(size)])

    def test_counts(self):
        recipe = self.make()
        batch = self.batch(recipe)
        view = recipe.view(batch, seed=1)
        plan = view.plan
        masked = np.bincount(batch.graph[plan.masked], minlength=3)
        token = np.bincount(batch.graph[plan.token.nonzero()[:, 0]], minlength=3)
        assert masked.tolist() == [size // 2 for size in batch.nodes]
        assert (masked - token).tolist() == [int(0.2 * (size // 2)) for size in batch.nodes]
        assert sorted(torch.cat([plan.masked, plan.visible]).tolist()) == list(range(len(batch.x)))
        moved = (plan.source != torch.arange(len(batch.x))).nonzero()[:, 0]
        assert set(moved.tolist()) <= set(plan.masked.tolist()) - set(plan.token.nonzero()[:, 0].tolist())
        assert (batch.graph[plan.source] == batch.graph).all()

    def test_a_share_too_small_to_replace_any_replaces_none(self):
        plan = masking.nodes([10], 0.5, 0.05, generator=torch.Generator().manual_seed(0))
        assert plan.token.sum() == 5
        assert torch.equal(plan.source, torch.arange(10))

    def test_hidden_features_reach_no_latent(self):
        recipe = self.make(replace=0.0)
        batch = self.batch(recipe)
        view = recipe.view(batch, seed=1)
        other = batch.x.clone()
        other[view.plan.token] = torch.randn(int(view.plan.token.sum()), 8)
        assert not torch.equal(other, batch.x)
        changed = recipe.view(dataclasses.replace(batch, x=other), seed=1)
        assert torch.equal(recipe(changed).pred, recipe(view).pred)

    def test_the_decoder_computes_the_rows_of_the_whole(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        plan, decoder = view.plan, recipe.decoder
        latents = torch.randn(len(view.target), 16, dtype=torch.float64)
        rows = decoder.embed(latents)
        rows[plan.masked] = 0
        whole = decoder.pred(rows, view.parts.edges)[plan.masked]
        found = decoder(latents, plan, decoder_edges(view.parts.edges, plan))
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)

    def test_graphs_in_a_batch_equal_single_ones(self):
        recipe = self.make(drop_edge=0.3)
        graphs = [block_model(index, 8, 1, nodes=(20, 40))[0] for index in range(3)]
        batch = GraphBatch.of(graphs)
        many = recipe(recipe.view(batch, seed=1))
        singles = []
        for index, graph in enumerate(graphs):
            singles.append(recipe(recipe.view(GraphBatch.of([graph], np.array([index])), seed=1)))
        torch.testing.assert_close(many.pred, torch.cat([one.pred for one in singles]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(recipe.encode(batch)[-len(graphs[2].x) :], recipe.encode(GraphBatch.of(graphs[2:])))

    def test_dropped_edges_are_the_encoders(self):
        recipe, whole = self.make(drop_edge=0.5), self.make()
        batch = self.batch(recipe)
        view, full = recipe.view(batch, seed=1), whole.view(batch, seed=1)
        loops = view.parts.edges[0] == view.parts.edges[1]
        assert loops.sum() == len(batch.x)
        assert 0.3 < (~loops).sum() / sum(batch.edges) < 0.7
        assert torch.equal(view.parts.decoder_edges, full.parts.decoder_edges)

    @pytest.mark.parametrize("decoder", ["mlp", "linear"])
    def test_other_decoders_and_layers(self, decoder):
        recipe = self.make(decoder=decoder, norm="layer", residual=True)
        recipe(self.batch(recipe)).loss.backward()
        assert all(parameter.grad is not None for parameter in recipe.parameters())

    def test_refusals(self, tmp_path):
        recipe = self.make()
        batch = self.batch(recipe)
        with pytest.raises(ValueError, match=r"x must be \[N, 8\]"):
            recipe(dataclasses.replace(batch, x=batch.x[:, :5]))
        with pytest.raises(ValueError, match="come to"):
            recipe(dataclasses.replace(batch, nodes=batch.nodes[:2], edges=batch.edges[:2]))
        with pytest.raises(ValueError, match="loops"):
            recipe(_looped(batch))
        with pytest.raises(ValueError, match="edge_index must lie in"):
            GraphBatch.of([(torch.zeros(3, 8), torch.tensor([[0], [3]]))])
        with pytest.raises(ValueError, match="none to mask"):
            recipe(GraphBatch.of([(torch.zeros(1, 8), torch.zeros(2, 0, dtype=torch.int64))]))
        with pytest.raises(ValueError, match="drop_edge"):
            recipes.create("graphmae", drop_edge=1.0)
        np.savez(tmp_path / "a.npz", x=np.zeros((3, 8)))
        with pytest.raises(ValueError, match="no edge_index"):
            read_graph(tmp_path / "a.npz")
        np.savez(tmp_path / "b.npz", x=np.ones((3, 8)), edge_index=np.array([[0, 1, 2], [1, 0, 2]]))
        assert read_graph(tmp_path / "b.npz").edge_index.tolist() == [[0, 1], [1, 0]]

    def test_attention_equals_a_dense_matrix(self):
        layer = attention_layer(8, 12, 3, 0.0).double()
        scatter(layer)
        graph = block_model(0, 8, nodes=(30, 31))[0]
        edges = torch.from_numpy(np.concatenate([graph.edge_index, np.tile(np.arange(30), (2, 1))], 1))
        x = torch.randn(30, 8, dtype=torch.float64)
        p = parameters(layer)
        torch.testing.assert_close(layer(x, edges), attention(x, edges, p), rtol=1e-10, atol=1e-10)
        h = (x @ p["lin.weight"].T).view(30, 3, 4)
        score = F.leaky_relu((h * p["att_dst"]).sum(2)[:, None] + (h * p["att_src"]).sum(2)[None], 0.2)
        present = torch.zeros(30, 30, dtype=torch.bool)
        present[edges[1], edges[0]] = True
        weight = score.masked_fill(~present[:, :, None], float("-inf")).softmax(1)
        want = torch.einsum("ijh,jhc->ihc", weight, h).flatten(1) + p["bias"]
        torch.testing.assert_close(layer(x, edges), want, rtol=1e-10, atol=1e-10)


def _looped(batch: GraphBatch) -> GraphBatch:
    edges = batch.edge_index.copy()
    edges[1, 0] = edges[0, 0]
    return dataclasses.replace(batch, edge_index=edges)


@pytest.mark.slow
def test_a_linear_probe_of_what_was_learned_beats_raw_features():
    torch.manual_seed(0)
    recipe = recipes.create("graphmae", features=32, embed_dim=64)
    made = [block_model(index, 32, noise=3.0) for index in range(16)]
    optimizer = torch.optim.AdamW(recipe.parameters(), 1e-3)
    for step in range(100):
        batch = GraphBatch.of([made[(4 * step + i) % 16][0] for i in range(4)])
        optimizer.zero_grad()
        recipe(recipe.view(batch, seed=step)).loss.backward()
        optimizer.step()
    recipe.eval()
    batch, labels = GraphBatch.of([graph for graph, _ in made]), torch.from_numpy(np.concatenate([y for _, y in made]))
    with torch.no_grad():
        learned = recipe.encode(batch)
    assert _probe(learned, labels) > _probe(batch.x, labels) + 0.02


def _probe(x: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the second half of the nodes that a ridge regression on the first half labels right."""
    x = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    half = len(x) // 2
    y = torch.nn.functional.one_hot(labels).double()
    weight = torch.linalg.solve(x[:half].T @ x[:half] + torch.eye(x.shape[1]), x[:half].T @ y[:half])
    return ((x[half:] @ weight).argmax(1) == labels[half:]).double().mean().item()
