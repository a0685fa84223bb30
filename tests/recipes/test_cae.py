from __future__ import annotations

import pytest
import torch

from maefast import recipes
from maefast.data.images.batch import ImageBatch
from maefast.nn import Regressor
from maefast.recipes.cae import RandomCodes
from tests.recipes.common import RecipeTests, equal_to_reference


class TestCAE(RecipeTests):
    name = "cae"
    toy = {
        "tokenizer": "random", "codes": 16, "img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 2,
        "num_heads": 2, "regressor_depth": 2, "decoder_depth": 1, "drop_path": 0.0,
    }  # fmt: skip
    run = {"img_size": 64, "patch_size": 8}

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        return ImageBatch(torch.randint(0, 256, (size, 3, 64, 64), dtype=torch.uint8, generator=generator))

    @pytest.mark.parametrize("changes", [{"align": 0.5}, {"mask_ratio": 0.25}])
    def test_variants(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_masks_are_blocks_of_an_exact_count(self):
        recipe = self.make()
        plan = recipe.view(self.batch(recipe), seed=1).plan
        assert (plan.keep, plan.hide) == (32, 32)
        masks = plan.mask.view(3, 8, 8)
        joined = (masks[:, 1:] & masks[:, :-1]).sum() + (masks[..., 1:] & masks[..., :-1]).sum()
        assert joined > 100  # at random about 96 * 3 * 2 / 4 * 56 / 64 = 84
        alone = recipe.view(ImageBatch(self.batch(recipe).images[:1]), seed=1).plan
        assert torch.equal(alone.mask[0], plan.mask[0])  # whatever else is in the batch
        with torch.device("meta"):
            whole = recipes.create("cae")
        assert whole.grid == (14, 14)

    def test_the_aligned_latents_get_no_gradient(self):
        recipe = self.make(align=1.0)
        view = recipe.view(self.batch(recipe), seed=1)
        terms = recipe(view).terms
        terms["latents"].backward()
        shifted = view.parts.clone().requires_grad_()
        recipe.compute(type(view)(shifted, view.plan, view.target)).terms["latents"].backward()
        hidden = view.plan.mask.view(3, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
        assert not shifted.grad[hidden.expand_as(shifted)].any()
        assert shifted.grad.any()

    def test_hidden_pixels_reach_no_prediction(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        hidden = view.plan.mask.view(3, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
        other = torch.where(hidden, torch.randn_like(view.parts), view.parts)
        assert torch.equal(recipe(type(view)(other, view.plan, view.target)).pred, recipe(view).pred)

    def test_without_a_tokenizer(self):
        recipe = self.make(tokenizer=None)
        assert recipe.encode(self.batch(recipe)).shape == (3, 65, 16)
        with pytest.raises(ValueError, match="CAE needs a tokenizer"):
            recipe(self.batch(recipe))


def test_the_order_of_hidden_patches_does_not_matter():
    torch.manual_seed(0)
    regressor = Regressor(16, 2, 2).double()
    masked, visible = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double()
    positions, shown = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double()
    order = torch.randperm(5)
    out = regressor(masked, visible, positions, shown)
    other = regressor(masked[:, order], visible, positions[:, order], shown)
    torch.testing.assert_close(other, out[:, order], rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="multiple of the number of heads"):
        Regressor(16, 1, 3)


class Told(torch.nn.Module):
    """A tokenizer that says what it is told to."""

    def __init__(self, codes):
        super().__init__()
        self.codes = codes

    def forward(self, images):
        return self.codes


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(3, 64), r"codes int64 \[3, 64\], got torch.float32 \[3, 64\]"),
        (torch.zeros(3, 32, dtype=torch.int64), r"got torch.int64 \[3, 32\]"),
        (None, "got NoneType"),
        (torch.full((3, 64), 16), "beyond 0 to 15"),
        (torch.full((3, 64), -1), "beyond 0 to 15"),
    ],
)
def test_codes_are_looked_at(codes, message):
    recipe = recipes.create("cae", **{**TestCAE.toy, "tokenizer": Told(codes)})
    with pytest.raises(ValueError, match=message):
        recipe.view(TestCAE().batch(recipe))


def test_tokenizers_are_looked_at():
    with pytest.raises(TypeError, match="a module or 'random', got 'dalle'"):
        recipes.create("cae", tokenizer="dalle")
    with pytest.raises(ValueError, match="a power of two, at least 2, got 1000"):
        recipes.create("cae", tokenizer="random", codes=1000)


def test_random_codes():
    codes = RandomCodes(16, (4, 4))(torch.randn(8, 3, 16, 16))
    assert codes.shape == (8, 16)
    assert codes.min() >= 0
    assert codes.max() < 16
    assert len(codes.unique()) > 8
