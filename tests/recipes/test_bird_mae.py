from __future__ import annotations

import numpy as np
import pytest
import torch

from maefast import recipes
from maefast.data.spectrograms import SpectrogramBatch
from tests.recipes.common import RecipeTests, equal_to_reference


class TestBirdMAE(RecipeTests):
    name = "bird_mae"
    demo_share = 0.25
    toy = {
        "frames": 32, "mels": 16, "patch_size": 4, "rate": 8000, "seconds": 0.3, "embed_dim": 16, "depth": 2,
        "num_heads": 2, "decoder_embed_dim": 8, "decoder_depth": 2, "decoder_num_heads": 2,
    }  # fmt: skip

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        return SpectrogramBatch(torch.randn(size, 1, 32, 16, generator=generator) * 4 - 7)

    @pytest.mark.parametrize(
        "changes", [{"norm_pix": False}, {"positions": "release"}, {"patch_size": [8, 4], "mask_ratio": 0.8}]
    )
    def test_other_arguments(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_values_are_normalised(self):
        recipe = self.make()
        batch = self.batch(recipe)
        want = (batch.spectrograms.double() + 7.2) / 8.86
        torch.testing.assert_close(recipe.view(batch, seed=0).parts, want, rtol=0, atol=1e-6)

    def test_published_counts(self):
        for ratio, keep in ((0.75, 64), (0.8, 51)):
            with torch.device("meta"):
                recipe = recipes.create("bird_mae", mask_ratio=ratio)
            assert recipe.grid == (32, 8)
            assert recipe.wants.bank.frames(recipe.wants.samples) == 498
            recipe.mean, recipe.scale = torch.zeros(()), torch.ones(())
            plan = recipe.view(SpectrogramBatch(torch.zeros(2, 1, 512, 128)), seed=0).plan
            assert (plan.keep, plan.hide) == (keep, 256 - keep)

    def test_positions(self):
        """Against numpy, value by value: first half of the width for the column, each half sines before cosines."""
        fresh = {place: recipes.create("bird_mae", **self.toy, positions=place) for place in ("grid", "release")}
        for part, width in (("encoder", 16), ("decoder", 8)):
            tables = {place: getattr(recipe, part).pos_embed[0] for place, recipe in fresh.items()}
            for place, (rows, columns) in (("grid", (8, 4)), ("release", (4, 8))):
                want = np.zeros((1 + rows * columns, width))
                for token in range(rows * columns):
                    for half, at in enumerate((token % columns, token // columns)):
                        for i in range(width // 4):
                            angle = at / 10000 ** (i / (width // 4))
                            want[1 + token, half * width // 2 + i] = np.sin(angle)
                            want[1 + token, half * width // 2 + width // 4 + i] = np.cos(angle)
                np.testing.assert_allclose(tables[place].numpy(), want, rtol=0, atol=1e-6)
            assert not torch.equal(tables["grid"], tables["release"])

    def test_hidden_values_reach_no_latent(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        hidden = view.plan.mask.view(3, 1, 8, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        other = torch.where(hidden, torch.randn_like(view.parts), view.parts)
        assert not torch.equal(other, view.parts)
        assert torch.equal(recipe.encoder(other, view.plan), recipe.encoder(view.parts, view.plan))

    def test_names_of_the_authors(self):
        names = recipes.public_weights(self.make()).keys()
        for name in ("encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed.proj.weight", "decoder.mask_token",
                     "encoder.blocks.0.attn.qkv.weight", "decoder.decoder_embed.weight", "decoder.decoder_pos_embed",
                     "decoder.blocks.1.mlp.fc2.bias", "decoder.decoder_norm.weight"):  # fmt: skip
            assert name in names

    def test_features_and_refusals(self):
        recipe = self.make()
        assert recipe.encode(self.batch(recipe)).shape == (3, 33, 16)
        with pytest.raises(ValueError, match=r"spectrograms must be \[B, 1, 32, 16\], got \(2, 1, 16, 32\)"):
            recipe(SpectrogramBatch(torch.zeros(2, 1, 16, 32)))
        with pytest.raises(ValueError, match="not a multiple of the patch size"):
            recipes.create("bird_mae", mels=100)
        with pytest.raises(ValueError, match="positions must be"):
            recipes.create("bird_mae", positions="learned")
        with pytest.raises(ValueError, match="std must be positive"):
            recipes.create("bird_mae", std=0)
        with pytest.raises(ValueError, match=r"10 seconds are 998 frames, which must lie in \[1, 512\]"):
            recipes.create("bird_mae", seconds=10)
