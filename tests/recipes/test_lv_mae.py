from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maefast import recipes
from maefast.data.embeddings import EmbeddingBatch
from maefast.recipe import View
from tests.recipes.common import RecipeTests, equal_to_reference

LENGTHS = [7, 2, 12, 1, 9]


class TestLVMAE(RecipeTests):
    name = "lv_mae"
    demo_share = 0.7
    toy = {
        "length": 12, "dim": 16, "masking": "random", "depth": 2, "num_heads": 2, "decoder_embed_dim": 8,
        "decoder_depth": 2, "decoder_num_heads": 2,
    }  # fmt: skip
    run = {
        "model_args": {**toy, "dim": 192, "depth": 1, "num_heads": 4, "shortest": 3}
    }  # as wide as the demo's embeddings

    def batch(self, recipe, size=5):
        generator = torch.Generator().manual_seed(2)
        values = torch.randn(5, 12, recipe.wants.dim, generator=generator)
        return EmbeddingBatch(values[:size], np.array(LENGTHS[:size]))

    @pytest.mark.parametrize("loss", ["mse", "cosine"])
    @pytest.mark.parametrize("embed_dim", [None, 12])
    @pytest.mark.parametrize(
        ("masking", "order"), [("random", "paper"), ("semantic", "paper"), ("semantic", "release")]
    )
    def test_losses_and_masks(self, loss, embed_dim, masking, order):
        recipe = self.make(loss=loss, embed_dim=embed_dim, masking=masking, order=order)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_sequences_of_one_length_run_dense(self):
        for length in (8, 12):
            recipe = self.make()
            batch = self.batch(recipe)
            batch.lengths = np.full(5, length)
            equal_to_reference(recipe, recipe.view(batch, seed=1), self.reference)

    @pytest.mark.parametrize("masking", ["random", "semantic"])
    def test_counts(self, masking):
        for ratio in (0.5, 0.7, 0.4):
            recipe = self.make(masking=masking, mask_ratio=ratio)
            plan = recipe.view(self.batch(recipe), seed=3).plan
            want = [int(n * (1 - ratio)) for n in LENGTHS]
            assert plan.cu_visible.diff().tolist() == want
            assert plan.mask.sum(1).tolist() == [n - keep for n, keep in zip(LENGTHS, want)]
            assert plan.absent.sum(1).tolist() == [12 - n for n in LENGTHS]
            for row, n in zip(plan.absent, LENGTHS):
                assert not row[:n].any()

    def test_semantic_masks_by_hand(self):
        for order in ("paper", "release"):
            recipe = self.make(masking="semantic", order=order)
            batch = self.batch(recipe)
            plan = recipe.view(batch, seed=0).plan
            for values, n, masked in zip(batch.values, LENGTHS, plan.mask):
                like = [F.cosine_similarity(values[i - 1], values[i], 0).item() for i in range(1, n)]
                kept = sorted(range(1, n), key=lambda i: like[i - 1], reverse=order == "paper")
                kept = [0, *kept][: int(n * 0.5)]  # the first one is the last to go
                assert sorted(set(range(n)) - set(kept)) == masked.nonzero().flatten().tolist()

    @pytest.mark.parametrize("masking", ["random", "semantic"])
    def test_packed_is_each_sequence_alone(self, masking):
        recipe = self.make(masking=masking)
        view = recipe.view(self.batch(recipe), seed=1)
        output = recipe(view)
        pred, latent = output.pred.flatten(0, -2), recipe.encoder(view.parts, view.plan)
        losses, row, at = [], 0, 0
        for b in range(5):
            alone = self.of_one(recipe, view, b)
            one = recipe(alone)
            count, seen = alone.plan.total_masked, 1 + alone.plan.total_visible
            mine = pred[row : row + count]
            torch.testing.assert_close(mine, one.pred.flatten(0, -2), rtol=0, atol=1e-12)
            other = recipe.encoder(alone.parts, alone.plan).flatten(0, -2)
            torch.testing.assert_close(latent[at : at + seen], other, rtol=0, atol=1e-12)
            losses += [one.loss] * count
            row, at = row + count, at + seen
        assert (row, at) == (len(pred), len(latent))
        torch.testing.assert_close(output.loss, torch.stack(losses).mean(), rtol=0, atol=1e-12)

    def of_one(self, recipe, view, b):
        from maefast import masking

        pick = lambda flat: (flat[flat // 12 == b] % 12).long()  # noqa: E731
        plan = masking.from_indices([pick(view.plan.visible)], 12, masked=[pick(view.plan.masked)])
        return View(view.parts[b : b + 1], plan)

    @pytest.mark.parametrize("masking", ["random", "semantic"])
    @pytest.mark.parametrize("loss", ["mse", "cosine"])
    def test_padding_changes_nothing(self, masking, loss):
        recipe = self.make(masking=masking, loss=loss)
        found = []
        for fill in (0.0, 1e4, float("nan")):
            batch = self.batch(recipe)
            for values, n in zip(batch.values, LENGTHS):
                values[n:] = fill
            recipe.zero_grad()
            loss_ = recipe(recipe.view(batch, seed=1)).loss
            loss_.backward()
            grads = [p.grad.clone() for p in recipe.parameters() if p.requires_grad]
            trivial = recipe.baseline(recipe.view(batch, seed=1)).loss
            found.append([loss_.detach(), trivial, *grads])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other))

    def test_hidden_segments_reach_no_latent(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        other = torch.where(view.plan.mask[..., None], torch.randn_like(view.parts), view.parts)
        assert not torch.equal(other, view.parts)
        assert torch.equal(recipe.encoder(other, view.plan), recipe.encoder(view.parts, view.plan))

    def test_baseline_by_hand(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        errors = []
        for values, masked, n in zip(view.parts, view.plan.mask, LENGTHS):
            hidden = masked[:n]
            mean = values[:n][~hidden].mean(0) if not hidden.all() else torch.zeros(16, dtype=torch.float64)
            errors += [((mean - value) ** 2).mean() for value in values[:n][hidden]]
        torch.testing.assert_close(recipe.baseline(view).loss, torch.stack(errors).mean())

    def test_embeddings_have_length_one_and_positions_are_the_table(self):
        recipe = recipes.create("lv_mae", **self.toy)
        parts = recipe.view(self.batch(recipe), seed=1).parts
        torch.testing.assert_close(parts.norm(dim=2), torch.ones(5, 12))
        for part, width in ((recipe.encoder, 16), (recipe.decoder, 8)):
            angle = np.arange(12)[:, None] / 10000 ** (np.arange(width // 2) / (width // 2))
            want = np.concatenate([np.zeros((1, width)), np.concatenate([np.sin(angle), np.cos(angle)], 1)])
            np.testing.assert_allclose(part.pos_embed[0].numpy(), want, rtol=0, atol=1e-6)

    def test_names_of_the_authors(self):
        names = set(recipes.public_weights(self.make()))
        for name in ("cls_token", "pos_embed", "mask_token", "decoder_pos_embed", "blocks.0.attn.qkv.weight",
                     "norm.weight", "decoder_embed.weight", "decoder_blocks.1.mlp.fc2.bias", "decoder_norm.bias",
                     "decoder_pred.weight"):  # fmt: skip
            assert name in names
        assert not any(name.startswith(("encoder.", "decoder.")) for name in names)

    def test_a_run_takes_no_graph_of_its_steps(self, tmp_path):
        """Each batch has another number of tokens."""
        assert self.config(tmp_path).graph == "off"

    def test_features_and_refusals(self):
        recipe = self.make()
        assert recipe.encode(self.batch(recipe)).shape == (5 + sum(LENGTHS), 16)
        with pytest.raises(ValueError, match="order must be"):
            recipes.create("lv_mae", order="reverse")
        with pytest.raises(ValueError, match="masking must be"):
            recipes.create("lv_mae", masking="block")
        with pytest.raises(ValueError, match="loss must be"):
            recipes.create("lv_mae", loss="l1")
        with pytest.raises(ValueError, match=r"lengths must be 3 numbers in \[1, 12\]"):
            recipe(EmbeddingBatch(torch.randn(3, 12, 16), np.array([3, 13, 1])))
