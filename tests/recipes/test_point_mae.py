from __future__ import annotations

import numpy as np
import pytest
import torch

from maefast import masking, recipes
from maefast.data.points import PointBatch, Points, read_cloud
from maefast.nn import Groups, PointEmbed, group_points
from maefast.recipe import View
from tests.recipes.common import RecipeTests, equal_to_reference


class TestPointMAE(RecipeTests):
    name = "point_mae"
    demo_share = 0.2
    toy = {
        "points": 40, "groups": 8, "group_size": 5, "embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_depth": 2,
        "decoder_num_heads": 2, "drop_path": 0.0,
    }  # fmt: skip

    def batch(self, recipe, size=3):
        return PointBatch(torch.randn(size, 40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))

    @pytest.mark.parametrize("changes", [{"embed_all": False}, {"mask": "near"}, {"mask_ratio": 0.25}])
    def test_variants(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    @pytest.mark.parametrize("embed_all", [True, False])
    def test_statistics_of_the_batch(self, embed_all):
        recipe = self.make(embed_all=embed_all).train()
        before = recipe.encoder.patch_embed.first_conv[1].running_mean.clone()
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)
        assert not torch.equal(recipe.encoder.patch_embed.first_conv[1].running_mean, before)

    def test_masks(self):
        with torch.device("meta"):
            recipe = recipes.create("point_mae")
        recipe.to_empty(device="cpu")  # no weight is looked at
        plan = recipe.view(PointBatch(torch.randn(2, 1024, 3)), seed=0).plan
        assert (plan.keep, plan.hide) == (26, 38)
        near = self.make(mask="near", mask_ratio=0.5)
        view = near.view(self.batch(near), seed=0)
        for centres, mask in zip(view.parts.centres, view.plan.mask):
            distance = torch.cdist(centres, centres)
            assert mask.sum() == 4
            assert any(row[mask].max() <= row[~mask].min() for row in distance)

    def test_hidden_points_reach_no_latent(self):
        """In eval mode: in training the statistics of the batch norms are of all groups, as published."""
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        points = torch.where(view.plan.mask[..., None, None], torch.randn_like(view.parts.points), view.parts.points)
        other = recipe.encoder(Groups(points, view.parts.centres), view.plan)
        assert torch.equal(other, recipe.encoder(view.parts, view.plan))

    def test_samples_of_different_counts(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        mask = torch.zeros(3, 8, dtype=torch.bool)
        mask[0, :3] = mask[1, 2:4] = mask[2, :6] = True
        output = recipe(View(view.parts, masking.from_bool(mask)))
        alone = [
            recipe(View(Groups(*(part[i : i + 1] for part in view.parts)), masking.from_bool(mask[i : i + 1])))
            for i in range(3)
        ]
        pred = torch.cat([single.pred.reshape(-1, 15) for single in alone])
        torch.testing.assert_close(output.pred, pred, rtol=1e-10, atol=1e-10)

    def test_features_and_refusals(self):
        recipe = self.make()
        assert recipe.encode(self.batch(recipe)).shape == (3, 8, 16)
        with pytest.raises(ValueError, match=r"points must be \[B, 40, 3\]"):
            recipe(PointBatch(torch.zeros(2, 30, 3)))
        with pytest.raises(ValueError, match="9 groups of 99 points do not fit clouds of 40"):
            recipes.create("point_mae", points=40, groups=9, group_size=99)
        with pytest.raises(ValueError, match="mask must be"):
            recipes.create("point_mae", mask="far")


def test_groups_are_the_nearest_points():
    points = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    groups, centres = group_points(points, 6, 4)
    for cloud, middle, group in zip(points, centres, groups):
        assert torch.equal(middle[0], cloud[0])
        for centre, members in zip(middle, group):
            nearest = (cloud - centre).square().sum(1).argsort(stable=True)[:4]
            assert torch.equal(members, cloud[nearest] - centre)


def test_tokens_do_not_depend_on_the_order_of_points():
    embed = PointEmbed(8).double().eval()
    points = torch.randn(2, 3, 7, 3, dtype=torch.float64)
    centres = torch.zeros(2, 3, 3)
    tokens = embed(Groups(points, centres))
    other = embed(Groups(points[:, :, torch.randperm(7)], centres))
    torch.testing.assert_close(other, tokens, rtol=1e-12, atol=1e-12)


# --- data


def test_files_of_points(tmp_path):
    cloud = np.random.default_rng(0).standard_normal((50, 4))
    np.save(tmp_path / "a.npy", cloud)
    np.savez(tmp_path / "b.npz", cloud)
    np.savetxt(tmp_path / "c.xyz", cloud)
    np.savetxt(tmp_path / "d.txt", cloud, delimiter=",")
    for name in ("a.npy", "b.npz", "c.xyz", "d.txt"):
        np.testing.assert_allclose(read_cloud(tmp_path / name), cloud[:, :3])
    np.save(tmp_path / "e.npy", np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"a cloud is numbers \[points, 3 or more\]"):
        read_cloud(tmp_path / "e.npy")
    np.save(tmp_path / "f.npy", np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match="not finite"):
        read_cloud(tmp_path / "f.npy")


def test_samples_of_clouds():
    wants, raw = Points(20), np.random.default_rng(0).standard_normal((50, 3)) + 5
    one, two = (wants.sample(raw, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(one, two)
    assert one.dtype == np.float32
    example = wants.example(raw)
    assert np.abs(example.mean(0)).max() < 1e-6
    assert abs(np.linalg.norm(example, axis=1).max() - 1) < 1e-6
    with pytest.raises(ValueError, match="10 points, fewer than the 20"):
        wants.sample(raw[:10], np.random.default_rng(0))
