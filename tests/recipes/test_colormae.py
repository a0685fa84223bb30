from __future__ import annotations

import pytest
import torch

from maefast import masking, models, recipes
from maefast.data.images.batch import ImageBatch
from maefast.recipe import View
from maefast.recipes.colormae import normal
from tests.recipes.common import RecipeTests, equal_to_reference

COLOURS = ("red", "green", "blue", "purple")
MODEL = {
    "embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2,
}  # fmt: skip


class TestColorMAE(RecipeTests):
    name = "colormae"
    toy = {**MODEL, "img_size": [32, 48], "patch_size": 8}
    run = {"img_size": [32, 48], "patch_size": 8}

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        return ImageBatch(torch.randint(0, 256, (size, 3, 32, 48), dtype=torch.uint8, generator=generator))

    @pytest.mark.parametrize("colour", COLOURS)
    @pytest.mark.parametrize("norm_pix", [True, False])
    def test_every_colour(self, colour, norm_pix):
        recipe = self.make(colour=colour, norm_pix=norm_pix)
        view = recipe.view(self.batch(recipe), seed=1)
        assert (view.plan.keep, view.plan.hide) == (6, 18)
        equal_to_reference(recipe, view, self.reference)

    def test_the_largest_of_the_map_stay_visible(self):
        """Each sample has noise of its own, the colours filter the same, and no two colours agree."""
        batch, plans = self.batch(None), {}
        for colour in COLOURS:
            recipe = self.make(colour=colour)
            plans[colour] = recipe.view(batch, seed=1).plan.ids_keep
        assert len({tuple(ids.flatten().tolist()) for ids in plans.values()}) == 4
        assert all(len({tuple(sorted(row)) for row in ids.tolist()}) == 3 for ids in plans.values())
        white = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
        purple, green = (masking.coloured(3, (4, 6), 0.75, colour=c, noise=white) for c in ("purple", "green"))
        assert not torch.equal(purple.visible, green.visible)

    def test_the_sampler_leaves_the_loss_as_it_is(self):
        """The same mask, drawn by MAE's sampler: MAE's loss, bit for bit."""
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        plain = models.create("mae_base", **self.toy, norm_pix_loss=True).double()
        plain.load_state_dict(recipes.public_weights(recipe))
        assert torch.equal(recipe(view).loss, plain(view.parts, mask=view.plan)[0])
        other = masking.random(3, 24, 0.75)
        loss = recipe(View(view.parts, other)).loss
        assert torch.equal(loss, plain(view.parts, mask=other)[0])

    def test_published_counts_and_names(self):
        with torch.device("meta"):
            recipe, plain = recipes.create("colormae"), models.create("mae_base")
        assert recipes.public_weights(recipe).keys() == plain.state_dict().keys()
        recipe.mean, recipe.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        assert recipe.view(ImageBatch(torch.zeros(2, 3, 224, 224, dtype=torch.uint8)), seed=0).plan.keep == 49

    def test_hidden_pixels_reach_no_latent(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        hidden = view.plan.mask.view(3, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
        other = torch.where(hidden, torch.randn_like(view.parts), view.parts)
        latents = [recipe.model.encode_visible(images, view.plan) for images in (view.parts, other)]
        assert torch.equal(*latents)

    def test_features_and_refusals(self):
        recipe = self.make()
        assert recipe.encode(self.batch(recipe)).shape == (3, 25, 16)
        for arguments, message in (
            ({"colour": "pink"}, "colour must be one of"),
            ({"sigma": (2.0, 1.0)}, "sigma must be ascending"),
            ({"mask_ratio": 1.5}, "mask ratio must be"),
        ):
            with pytest.raises(ValueError, match=message):
                recipes.create("colormae", **{**self.toy, **arguments})


def test_normal_numbers():
    """Those of uniform ones, at both ends too."""
    ends = normal(torch.tensor([0.0, 1 - 2**-24]))
    assert bool(ends.isfinite().all())
    assert ends[0] == -ends[1]
    grid = normal((torch.arange(4096) + 0.5) / 4096)
    assert abs(float(grid.mean())) < 1e-4
    assert abs(float(grid.std()) - 1) < 2e-3
    assert normal(torch.tensor(0.975)) == pytest.approx(1.959964, abs=1e-5)
