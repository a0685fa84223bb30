from __future__ import annotations

import math

import pytest
import torch

from maefast import models, recipes
from maefast.data.images.batch import ImageBatch
from maefast.recipe import View
from tests.recipes.common import RecipeTests, equal_to_reference

SIZES = {
    "embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2,
}  # fmt: skip


class TestMixedAE(RecipeTests):
    name = "mixed_ae"
    toy = {"img_size": 32, "patch_size": 8, **SIZES}
    run = {"img_size": 32, "patch_size": 8}

    def batch(self, recipe, size=8):
        generator = torch.Generator().manual_seed(2)
        shape = size, 3, *recipe.wants.size
        return ImageBatch(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))

    @pytest.mark.parametrize(
        "changes",
        [
            {"group": 2, "weight": 0.7, "temperature": 0.1, "norm_pix": False},
            {"homologous": 1, "top": 6, "segments": False},
            {"homologous": 0},
            {"group": 8, "top": 17},
        ],
    )
    def test_variants(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_a_batch_that_groups_do_not_divide(self):
        """Is filled up with its first images."""
        recipe = self.make()
        view = recipe.view(self.batch(recipe, 6), seed=1)
        assert torch.equal(view.parts[6:], view.parts[:2])
        equal_to_reference(recipe, view, self.reference)

    def test_each_place_is_in_a_mix_once(self):
        recipe = self.make(img_size=224, patch_size=16)
        plan = recipe.view(self.batch(recipe), seed=1).plan
        assert (plan.batch, plan.num_tokens, plan.keep) == (8, 196, 49)
        assert ((~plan.mask).view(2, 4, 196).sum(1) == 1).all()
        assert not torch.equal(plan.mask[:4], plan.mask[4:])

    def test_unmixing_gives_each_image_its_own(self):
        """Of latents that name their place in the mix, in plan order."""
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        places = torch.cat([torch.tensor([[-1], [-2]]), view.plan.ids_keep.view(2, 16)], 1)[..., None]
        own = recipe.unmixed(places)[..., 0]
        assert own[:, 0].tolist() == [-1] * 4 + [-2] * 4
        assert torch.equal(own[:, 1:], view.plan.ids_keep)

    def test_all_tokens_are_ordinary_attention(self):
        one, two = self.make(top=17), self.make(homologous=0)
        view = one.view(self.batch(one), seed=1)
        torch.testing.assert_close(one(view).loss, two(view).loss, rtol=1e-10, atol=1e-10)
        assert (one(view).loss - self.make()(view).loss).abs() > 1e-6

    def test_patches_that_are_not_in_the_mix_reach_no_latent(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        hidden = view.plan.mask.view(8, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        other = torch.where(hidden, torch.randn_like(view.parts), view.parts)
        assert torch.equal(recipe.mixed(other, view.plan), recipe.mixed(view.parts, view.plan))
        one, two = (recipe(View(images, view.plan)).terms for images in (view.parts, other))
        assert one["contrast"] == two["contrast"]
        assert one["pixels"] != two["pixels"]

    def test_mixes_do_not_mix(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        other = torch.cat([view.parts[:4], torch.randn_like(view.parts[4:])])
        one, two = (recipe.mixed(images, view.plan) for images in (view.parts, other))
        torch.testing.assert_close(one[0], two[0], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(one[1], two[1])

    def test_the_contrast_of_latents_that_are_alike(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        recipe.mixed = lambda images, plan: torch.ones(2, 17, 16, dtype=torch.double)
        found, trivial = recipe(view).terms["contrast"], recipe.baseline(view).terms["contrast"]
        assert found.item() == pytest.approx(trivial.item(), rel=1e-12) == pytest.approx(0.1 * math.log(15))

    def test_weights_of_an_mae(self, tmp_path):
        model = models.create("mae", img_size=32, patch_size=8, **SIZES)
        torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
        recipe = self.make()
        recipes.load_weights(recipe, tmp_path / "mae.pth")
        batch = self.batch(recipe)
        want = model.double().encode(recipe.images(batch))
        torch.testing.assert_close(recipe.encode(batch), want, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"group": 3}, "group must be at least 2 and divide the 16 patches"),
            ({"group": 1}, "group must be at least 2"),
            ({"top": 18}, "top must lie in 1 to 17"),
            ({"homologous": 3}, "homologous in 0 to 2"),
        ],
    )
    def test_bad_arguments(self, changes, message):
        with pytest.raises(ValueError, match=message):
            self.make(**changes)
