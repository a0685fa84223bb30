from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maefast import recipes
from maefast.bench.peers.plain import parameters
from maefast.bench.peers.recipes.dmae import autoencoder, patches
from maefast.data.images.batch import ImageBatch
from maefast.data.scenes import Scenes, sphere_scene
from tests.recipes.common import RecipeTests, equal_to_reference, scatter

SIZES = {"img_size": (20, 15), "patch_size": 5, "embed_dim": 16, "depth": 2, "num_heads": 2}


def scenes(count: int, size: tuple[int, int], views: int = 3):
    wants = Scenes(size, views)
    return wants.collate([wants.example(sphere_scene(i, views, size)) for i in range(count)], np.arange(count))


class TestNViST(RecipeTests):
    name = "nvist"
    toy = {
        **SIZES, "views": 3, "rays": 20, "samples": 6, "near_far": [0.5, 1.5], "decoder_depth": 2,
        "decoder_num_heads": 2, "resolution": 6, "decoder_patch": 3, "density_dim": 2, "colour_dim": 3, "box": 0.5,
    }  # fmt: skip
    run = {"img_size": [20, 15], "patch_size": 5}

    def batch(self, recipe, size=3):
        return scenes(size, (20, 15))

    def test_a_view_is_whole_for_a_perceptual_distance(self):
        seen = []

        def distance(pred, true):
            seen.append((pred, true))
            return (pred - true).abs().flatten(1).mean(1)

        recipe = self.make(perceptual=distance)
        batch = self.batch(recipe)
        view = recipe.view(batch, seed=1)
        assert view.target.shape == (3, 300 + 20, 3)
        output = recipe(view)
        pred, true = seen[0]
        assert pred.shape == true.shape == (3, 3, 20, 15)
        others = (255 * true).round().to(torch.uint8)
        assert all(any(torch.equal(one, view) for view in views[1:]) for one, views in zip(others, batch.views))
        torch.testing.assert_close(output.terms["perceptual"], 0.1 * (pred - true).abs().mean())

    def test_a_perceptual_module_stays_outside(self):
        recipe = self.make(perceptual=torch.nn.Linear(2, 2))
        assert not any(name.startswith("perceptual") for name in recipe.state_dict())

    def test_rays_meet_their_pixels(self):
        recipe = self.make(rays=2000)
        view = recipe.view(self.batch(recipe), seed=1)
        centre = -torch.linalg.vecdot(view.parts["origins"], view.parts["directions"])
        near = (view.parts["origins"] + centre[..., None] * view.parts["directions"]).norm(dim=2)
        hit = (view.target > 0).any(2)
        assert near[hit].max() < 0.6  # spheres of at most 0.34, at most 0.21 from the origin
        assert hit[near > 0.6].sum() == 0
        assert view.parts["poses"][:, 0, :, 3].allclose(torch.tensor([0.0, 0.0, -1.0]).double(), atol=1e-6)

    def test_other_views_do_not_reach_the_field(self):
        recipe = self.make()
        batch = self.batch(recipe)
        before = recipe(recipe.view(batch, seed=1)).pred
        batch.views[:, 1:] = 255 - batch.views[:, 1:]
        assert torch.equal(recipe(recipe.view(batch, seed=1)).pred, before)

    def test_the_encoder_has_its_own_rate(self):
        recipe = self.make(encoder_rate=0.5)
        groups = recipe.parameter_groups(0.01)
        assert [group["lr_scale"] for group in groups] == [0.5, 1.0, 1.0]
        trained = sum(p.requires_grad for p in recipe.parameters())
        assert sum(len(group["params"]) for group in groups) == trained

    def test_it_starts_from_the_first_stage(self, tmp_path):
        mae = recipes.create("nvist_mae", **SIZES, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)
        torch.save({"model": mae.network.state_dict()}, tmp_path / "mae.pth")
        recipe = self.make().float()
        recipes.load_weights(recipe, tmp_path / "mae.pth")
        batch = self.batch(recipe)
        want = mae.model.states(mae.images(ImageBatch(batch.views[:, 0])), None, (1,))[0]
        torch.testing.assert_close(recipe.encode(batch), want)

    def test_it_learns_one_scene(self):
        """A sphere, to a fixed error."""
        recipe = self.make(views=4, rays=64, samples=12, embed_dim=24, resolution=12).float().train()
        batch, before = scenes(1, (20, 15), 4), None
        optimizer = torch.optim.AdamW([p for p in recipe.parameters() if p.requires_grad], lr=3e-3)
        for step in range(200):
            loss = recipe(recipe.view(batch, seed=step)).terms["colours"]
            before = loss.item() if before is None else before
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            errors = [recipe(recipe.view(batch, seed=1000 + i)).terms["colours"].item() for i in range(10)]
        assert sum(errors) / 10 < min(0.006, before / 4)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"views": 1}, "views must be 2 at least"),
            ({"near_far": (1.0, 0.5)}, "near_far must rise"),
            ({"resolution": 7}, "resolution must be a multiple of patch"),
        ],
    )
    def test_refusals(self, changes, message):
        with pytest.raises(ValueError, match=message):
            self.make(**changes)


def test_the_first_stage_is_mae():
    """Loss and all gradients, on an image that is not a square."""
    toy = {**SIZES, "decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
    torch.manual_seed(0)
    recipe = recipes.create("nvist_mae", **toy).double()
    scatter(recipe)

    def plain(recipe, view):
        plan = view.plan
        pred = autoencoder(parameters(recipe), "model.", recipe.model, view.parts, plan.ids_keep, plan.ids_restore)[1]
        error = F.mse_loss(pred, patches(view.parts, (5, 5)), reduction="none").mean(2)
        return {"pixels": (error * plan.mask).sum() / plan.mask.sum()}

    images = torch.randint(0, 256, (3, 3, 20, 15), dtype=torch.uint8)
    equal_to_reference(recipe, recipe.view(ImageBatch(images), seed=1), plain)
