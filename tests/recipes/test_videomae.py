from __future__ import annotations

import pytest
import torch

from maefast import recipes
from maefast.data.clips import ClipBatch
from tests.recipes.common import RecipeTests, equal_to_reference


class TestVideoMAE(RecipeTests):
    name = "videomae"
    demo_share = 0.7
    toy = {
        "frames": 4, "img_size": [16, 24], "tubelet": [2, 8, 8], "stride": 1, "mask_ratio": 0.5, "embed_dim": 16,
        "depth": 2, "num_heads": 2, "decoder_embed_dim": 8, "decoder_depth": 2, "decoder_num_heads": 2,
    }  # fmt: skip

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        return ClipBatch(torch.randint(0, 256, (size, 3, 4, 16, 24), dtype=torch.uint8, generator=generator))

    def test_plain_pixels(self):
        recipe = self.make(norm_pix=False)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_positions(self):
        recipe = self.make()
        for part, width in ((recipe.encoder, 16), (recipe.decoder, 8)):
            torch.testing.assert_close(part.pos_embed, table(width, 12), rtol=0, atol=1e-7)

    def test_every_frame_has_the_same_mask(self):
        recipe = self.make()
        mask = recipe.view(self.batch(recipe), seed=3).plan.mask.view(3, 2, 2, 3)
        assert torch.equal(mask[:, 0], mask[:, 1])
        assert mask.sum((1, 2, 3)).tolist() == [6, 6, 6]

    def test_published_counts(self):
        with torch.device("meta"):
            recipe = recipes.create("videomae")
        assert recipe.grid == (8, 14, 14)
        clips = torch.zeros(1, 3, 16, 224, 224, dtype=torch.uint8)
        recipe.mean, recipe.std = torch.zeros(3, 1, 1, 1), torch.ones(3, 1, 1, 1)
        plan = recipe.view(ClipBatch(clips), seed=0).plan
        assert (plan.keep, plan.hide) == (160, 1408)

    def test_hidden_pixels_reach_no_latent(self):
        recipe = self.make()
        batch = self.batch(recipe)
        view = recipe.view(batch, seed=1)
        hidden = view.plan.mask.view(3, 1, 2, 2, 3).repeat_interleave(2, 2).repeat_interleave(8, 3)
        hidden = hidden.repeat_interleave(8, 4)
        other = torch.where(hidden, torch.randn_like(view.parts), view.parts)
        assert not torch.equal(other, view.parts)
        assert torch.equal(recipe.encoder(other, view.plan), recipe.encoder(view.parts, view.plan))

    def test_features_and_refusals(self):
        recipe = self.make()
        assert recipe.encode(self.batch(recipe)).shape == (3, 12, 16)
        with pytest.raises(ValueError, match=r"clips must be uint8 \[B, 3, 4, 16, 24\]"):
            recipe(ClipBatch(torch.zeros(2, 3, 4, 16, 16, dtype=torch.uint8)))
        with pytest.raises(ValueError, match="not a multiple of the patch size"):
            recipes.create("videomae", frames=5)
        with pytest.raises(TypeError, match="takes no width; its arguments are frames"):
            recipes.create("videomae", width=5)
        with pytest.raises(ValueError, match="has no size 'giant'; choose from base, small"):
            recipes.create("videomae", "giant")
        with pytest.raises(ValueError, match="unknown recipe 'videomea'; choose from"):
            recipes.create("videomea")


def table(width: int, length: int) -> torch.Tensor:
    """sin and cos in turn, position by position."""
    position, column = torch.arange(length, dtype=torch.float64)[:, None], torch.arange(width)
    angle = position / 10000 ** (2 * (column // 2) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos())
