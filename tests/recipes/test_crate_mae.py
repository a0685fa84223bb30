from __future__ import annotations

import pytest
import torch

from maefast import masking, recipes
from maefast.data.images.batch import ImageBatch
from maefast.ops import TokenMask
from maefast.recipe import View
from tests.recipes.common import RecipeTests, equal_to_reference


class TestCrateMAE(RecipeTests):
    name = "crate_mae"
    demo_share = 0.2
    toy = {
        "img_size": [32, 48], "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_depth": 2,
    }  # fmt: skip
    run = {"img_size": [32, 48], "patch_size": 8}

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        return ImageBatch(torch.randint(0, 256, (size, 3, 32, 48), dtype=torch.uint8, generator=generator))

    @pytest.mark.parametrize(
        "changes",
        [{"norm_pix": True}, {"step": 0.3, "threshold": 0.1}, {"depth": 1, "decoder_depth": 3, "mask_ratio": 0.5}],
    )
    def test_variants(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_hidden_pixels_reach_nothing(self):
        """All positions have latents, none knows what is hidden; and mask tokens are seen by visible ones."""
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        assert (view.plan.keep, view.plan.hide) == (6, 18)
        hidden = view.plan.mask.view(3, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
        other = torch.where(hidden, torch.randn_like(view.parts), view.parts)
        before = recipe.latents(view.parts, view.plan)
        assert before.shape == (3, 25, 16)
        assert torch.equal(recipe.latents(other, view.plan), before)
        with torch.no_grad():
            recipe.mask_token.add_(torch.randn_like(recipe.mask_token))
        changed = (recipe.latents(view.parts, view.plan) != before).any(2)
        assert changed[:, 1:].logical_or(view.plan.mask).all()
        assert changed[:, 0].all()

    def test_nothing_hidden_is_plain_autoencoding(self):
        recipe = self.make()
        images = recipe.view(self.batch(recipe), seed=1).parts
        all_seen = masking.random(3, 24, 0.0)
        latents = recipe.latents(images)
        torch.testing.assert_close(recipe.latents(images, all_seen), latents, rtol=1e-12, atol=1e-12)
        assert recipe.predict(latents).shape == (3, 24, 192)
        plan = masking.random(3, 24, 0.75)
        some = recipe.predict(latents, plan)
        want = recipe.predict(latents).gather(1, plan.ids_masked[..., None].expand(-1, -1, 192))
        torch.testing.assert_close(some, want, rtol=1e-12, atol=1e-12)

    def test_ragged_equals_each_alone(self):
        recipe = self.make()
        images = recipe.view(self.batch(recipe), seed=1).parts
        mask = torch.rand(3, 24, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.2], [0.5], [0.9]])
        plan = TokenMask.from_bool(mask)
        assert plan.keep is None
        out = recipe(View(images, plan))
        latents, preds = recipe.latents(images, plan), out.pred.split(mask.sum(1).tolist())
        for i in range(3):
            alone = TokenMask.from_bool(mask[i : i + 1])
            one = recipe.latents(images[i : i + 1], alone)
            torch.testing.assert_close(latents[i], one[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(preds[i], recipe.predict(one, alone).flatten(0, -2), rtol=1e-12, atol=1e-12)
        equal_to_reference(recipe, View(images, plan), self.reference)

    def test_published_counts_and_names(self):
        with torch.device("meta"):
            recipe = recipes.create("crate_mae")
        shapes = {name: tuple(tensor.shape) for name, tensor in recipes.public_weights(recipe).items()}
        assert len(shapes) == 11 + 24 * 8
        assert shapes["decoder_pos_embed"] == (1, 197, 768)
        assert shapes["decoder_blocks.11.layers.0.1.fn.qkv.weight"] == (768, 768)
        for name in ("0.norm.bias", "0.fn.to_out.0.bias", "1.norm.weight"):
            assert shapes[f"blocks.0.layers.0.{name}"] == (768,)
        assert shapes["blocks.0.layers.0.1.fn.weight"] == shapes["decoder_blocks.0.layers.0.0.fn.weight"] == (768, 768)
        recipe.mean, recipe.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        assert recipe.view(ImageBatch(torch.zeros(2, 3, 224, 224, dtype=torch.uint8)), seed=0).plan.keep == 49

    def test_features_and_refusals(self):
        recipe = self.make()
        assert recipe.encode(self.batch(recipe)).shape == (3, 25, 16)
        for arguments, message in (
            ({"num_heads": 3}, "multiple of the number of heads"),
            ({"step": 0.0}, "step must be positive"),
            ({"threshold": -1.0}, "threshold must not be negative"),
            ({"patch_size": 7}, "not a multiple of the patch size"),
        ):
            with pytest.raises(ValueError, match=message):
                recipes.create("crate_mae", **{**self.toy, **arguments})
