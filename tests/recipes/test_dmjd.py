from __future__ import annotations

import math

import pytest
import torch

from maefast import masking
from maefast.data.images.batch import ImageBatch
from maefast.data.images.hog import hog
from maefast.nn.conv_vit import ConvViT
from maefast.ops import TokenMask
from maefast.recipe import View
from tests.recipes.common import RecipeTests, equal_to_reference


class TestDMJD(RecipeTests):
    name = "dmjd"
    toy = {
        "img_size": 64, "conv_dims": [4, 6], "conv_depths": [1, 1], "embed_dim": 16, "depth": 2, "num_heads": 2,
        "decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2,
    }  # fmt: skip
    run = {"img_size": 64}

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        shape = size, 3, *recipe.wants.size
        return ImageBatch(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))

    @pytest.mark.parametrize(
        "changes",
        [
            {"block": 1, "theta": 0.5, "visible_loss": "mse", "masked_loss": "smooth_l1"},
            {"block": 1, "paired": False},
            {"block": 1, "mask_ratio": 0.5, "pred_ratio": 0.75, "conv_depths": [2, 1]},
        ],
    )
    def test_variants(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    @pytest.mark.parametrize(("block", "keep"), [(2, 19 * 4), (1, 78)])
    def test_what_one_view_sees_the_other_masks(self, block, keep):
        recipe = self.make(img_size=224, block=block)
        plan = recipe.view(self.batch(recipe, 2), seed=1).plan
        assert (plan.batch, plan.num_tokens, plan.keep) == (4, 196, keep)
        one, two = plan.mask.view(2, 2, 14, 14).unbind()
        assert (one | two).all()
        blocks = torch.cat([one, two]).unfold(1, block, block).unfold(2, block, block).flatten(3)
        assert torch.equal(blocks.all(3), blocks.any(3))
        assert not torch.equal(one[0], one[1])

    def test_a_lower_prediction_rate_sees_some_again(self):
        recipe = self.make(img_size=128, mask_ratio=0.5, pred_ratio=0.75)
        one, two = recipe.view(self.batch(recipe), seed=1).plan.mask.view(2, 3, -1).unbind()
        assert (one | two).float().mean(1).tolist() == [0.75] * 3
        for wrong in ({"pred_ratio": 0.4}, {"mask_ratio": 0.0}, {"pred_ratio": 1.5}):
            with pytest.raises(ValueError, match="mask_ratio <= pred_ratio"):
                self.make(**wrong)
        with pytest.raises(ValueError, match=r"mask_ratio 0.99 leaves 0 of"):
            self.make(mask_ratio=0.99, pred_ratio=1.0)

    def test_each_visible_token_learns_its_own_target(self):
        """Predictions that are the targets in place have no loss; paired as published they have."""
        for paired in (True, False):
            recipe = self.make(block=1, paired=paired)
            view = recipe.view(self.batch(recipe), seed=1)
            both = torch.cat([view.target] * 2).flatten(0, 1)
            pred = [both[index.long()].view(6, -1, 108) for index in (view.plan.masked, view.plan.visible)]
            terms = recipe._terms(pred, view)
            assert terms["masked"] == 0
            assert (terms["visible"] == 0) == paired

    def test_hidden_pixels_reach_no_latent(self):
        recipe = self.make(block=1)
        view = recipe.view(self.batch(recipe), seed=1)
        images = torch.cat([view.parts] * 2)
        hidden = view.plan.mask.view(6, 1, *recipe.grid).repeat_interleave(16, 2).repeat_interleave(16, 3)
        other = torch.where(hidden, torch.randn_like(images), images)
        assert torch.equal(recipe.encoder(other, view.plan), recipe.encoder(images, view.plan))
        assert recipe(View(images[:3], view.plan, view.target)).terms.keys() == {"masked", "visible"}

    def test_features(self):
        recipe = self.make()
        assert recipe.encode(self.batch(recipe)).shape == (3, 16, 16)

    @pytest.mark.parametrize("name", ["masked_loss", "visible_loss"])
    def test_unknown_losses(self, name):
        with pytest.raises(ValueError, match=name):
            self.make(**{name: "l2"})

    def test_sizes_that_do_not_fit(self):
        with pytest.raises(ValueError, match="not a multiple"):
            self.make(img_size=48)
        recipe = self.make()
        with pytest.raises(ValueError, match="images must be"):
            recipe.encoder(torch.zeros(1, 3, 32, 32).double())


def test_the_encoder_on_ragged_and_whole_images():
    torch.manual_seed(0)
    encoder = ConvViT((3, 4), 3, (4, 6), (1, 2), 16, 2, 2).double()
    images = torch.randn(3, 3, 48, 64, dtype=torch.double)
    keep = [2, 7, 12]
    plan = TokenMask.from_scores(torch.rand(3, 12), keep)
    packed = encoder(images, plan).split(keep)
    for i, index in enumerate(plan.visible.split(keep)):
        alone = encoder(images[i : i + 1], TokenMask.from_indices(index[None].long() - 12 * i, 12))
        torch.testing.assert_close(packed[i][None], alone, rtol=1e-12, atol=1e-12)
    whole = encoder(images)
    everything = TokenMask.all_visible(3, 12)
    torch.testing.assert_close(whole, encoder(images, everything), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="two stages"):
        ConvViT((2, 2), conv_dims=(4,))


def test_enlarged_masks():
    plan = TokenMask.from_indices(torch.tensor([[5, 0]]), 6)
    fine = masking.enlarge(plan, (2, 3), (1, 2))
    assert fine.ids_keep.tolist() == [[10, 0, 11, 1]]
    assert fine.mask.view(2, 6).int().tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    with pytest.raises(ValueError, match="must keep as many of 3 x 3"):
        masking.enlarge(plan, (3, 3))


def test_views_that_share_tokens():
    noise = torch.rand(2, 10)
    one, two = masking.disjoint(2, 10, keep=4, noise=noise, step=3)
    rank = noise.argsort(1)
    assert torch.equal(one.ids_keep, rank[:, :4])
    assert torch.equal(two.ids_keep, rank[:, 3:7])
    for wrong in ({"step": 5}, {"keep": 6, "step": 5}, {"step": -1}):
        with pytest.raises(ValueError, match="step must"):
            masking.disjoint(2, 10, **{"keep": 4, "noise": noise, **wrong})


def test_histograms_of_gradients():
    images = torch.randint(0, 256, (2, 2, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, x = hog(images, bins=9, cell=4), images.double()
    want = torch.zeros(2, 2, 2, 3, 9, dtype=torch.double)
    for b, c, i, j in torch.cartesian_prod(*map(torch.arange, images.shape)).tolist():
        down = float(x[b, c, i + 1, j] - x[b, c, i - 1, j]) if 0 < i < 7 else 0.0
        across = float(x[b, c, i, j + 1] - x[b, c, i, j - 1]) if 0 < j < 11 else 0.0
        angle = math.degrees(math.atan2(down, across)) % 180
        want[b, c, i // 4, j // 4, int(angle // 20)] += math.hypot(down, across) / 16
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(hog(x, cell=4), want, rtol=1e-12, atol=1e-9)
    with pytest.raises(ValueError, match="no multiple of a cell"):
        hog(images)
    with pytest.raises(TypeError, match="images must be a tensor"):
        hog(images[0])
