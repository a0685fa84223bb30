from __future__ import annotations

import pytest
import torch

from maefast import recipes
from maefast.data.points import PointBatch
from maefast.nn import Groups
from tests.recipes.common import RecipeTests, equal_to_reference


class TestPointCMAE(RecipeTests):
    name = "point_cmae"
    demo_share = 0.2
    toy = {
        "points": 40, "groups": 8, "group_size": 5, "embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_depth": 2,
        "decoder_num_heads": 2, "drop_path": 0.0,
    }  # fmt: skip

    def batch(self, recipe, size=3):
        return PointBatch(torch.randn(size, 40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))

    def test_only_the_same_group(self):
        recipe = self.make(pairing="same")
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_two_independent_masks(self):
        recipe = self.make()
        one, two = (plan.mask for plan in recipe.view(self.batch(recipe, 3), seed=1).plan)
        assert one.sum(1).tolist() == two.sum(1).tolist() == [4, 4, 4]
        assert not torch.equal(one, two)

    @pytest.mark.parametrize("pairing", ["all", "same"])
    def test_nothing_hidden_twice(self, pairing):
        recipe = self.make(pairing=pairing)
        a, b = torch.randn(2, 3, 8, 16, dtype=torch.float64, requires_grad=True)
        twice = torch.zeros(3, 8, dtype=torch.bool)
        term = recipe.contrast(a, b, twice)
        assert term == 0
        twice[1, 2] = True
        cosine = torch.cosine_similarity(a[1, 2], b[1], dim=-1)
        want = 1 - (cosine[2] if pairing == "same" else cosine.mean())
        torch.testing.assert_close(recipe.contrast(a, b, twice), want)

    def test_one_batch_equals_two_passes(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        one, two = view.plan
        both, swapped = recipe.latents(view.parts, (one, two)), recipe.latents(view.parts, (one, one))
        torch.testing.assert_close(both[0], swapped[0], rtol=1e-12, atol=1e-12)
        assert both[1].shape == both[0].shape

    def test_hidden_points_reach_no_latent(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        hidden = view.plan[0].mask[..., None, None]
        points = torch.where(hidden, torch.randn_like(view.parts.points), view.parts.points)
        other = recipe.latents(Groups(points, view.parts.centres), view.plan)
        mine = recipe.latents(view.parts, view.plan)
        assert torch.equal(other[0], mine[0])
        assert not torch.equal(other[1], mine[1])

    def test_features_and_refusals(self):
        recipe = self.make()
        assert recipe.encode(self.batch(recipe)).shape == (3, 9, 16)
        with pytest.raises(ValueError, match="pairing must be"):
            recipes.create("point_cmae", pairing="none")
