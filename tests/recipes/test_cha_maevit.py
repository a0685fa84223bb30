from __future__ import annotations

import numpy as np
import pytest
import torch

from maefast import recipes
from maefast.bench.peers.recipes.cha_maevit import padded
from maefast.data.channels import ChannelBatch, Channels, filled, made_channels, read_channels, standardised
from maefast.data.images.files import shipped_photographs
from maefast.recipe import View
from maefast.train import PretrainConfig
from tests.recipes.common import RecipeTests, equal_to_reference


class TestChAMAEViT(RecipeTests):
    name = "cha_maevit"
    toy = {
        "channels": 4, "img_size": 16, "patch_size": 4, "memory": 2, "embed_dim": 16, "depth": 2, "num_heads": 2,
        "decoder_num_heads": 2,
    }  # fmt: skip
    run = {"img_size": 16, "patch_size": 4}

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        return ChannelBatch(torch.randn(size, 4, 16, 16, dtype=torch.float64, generator=generator))

    def ragged(self):
        present = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()
        return ChannelBatch(self.batch(None).images * present[..., None, None], present)

    @pytest.mark.parametrize("changes", [
        {"patches_only": 1.0, "channels_only": 0.0}, {"patches_only": 0.0, "channels_only": 1.0},
        {"patches_only": 0.0, "channels_only": 0.0, "mask_ratio": 0.25}, {"spectrum": 0.0}, {"spectrum": 0.5},
    ])  # fmt: skip
    def test_variants(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    @pytest.mark.parametrize("seed", range(3))
    def test_missing_channels(self, seed):
        recipe = self.make()
        view = recipe.view(self.ragged(), seed=seed)
        absent = view.plan.absent.view(3, 4, 16)
        assert absent.all(2).tolist() == (~self.ragged().present).tolist()
        equal_to_reference(recipe, view, self.reference)
        equal_to_reference(recipe, view, padded)
        other = torch.where(absent.view(3, 1, 4, 4, 4).repeat_interleave(4, 3).repeat_interleave(4, 4),
                            torch.randn_like(view.parts), view.parts)  # fmt: skip
        assert torch.equal(recipe(View(other, view.plan)).loss, recipe(view).loss)

    def test_masks(self):
        seen = []
        for changes in ({"patches_only": 1.0, "channels_only": 0.0}, {"patches_only": 0.0, "channels_only": 1.0}):
            recipe = self.make(**changes)
            seen.append(recipe.view(self.batch(recipe, 64), seed=1).plan.mask.view(64, 4, 16))
        assert (seen[0].sum(2) == 12).all()
        counts = seen[1].sum(2)
        assert set(counts.unique().tolist()) == {0, 16}
        assert set((counts > 0).sum(1).tolist()) == {1, 2, 3}
        mixed = self.make()
        whole = mixed.view(self.batch(mixed, 64), seed=1).plan.mask.view(64, 4, 16).all(2).any(1)
        assert 10 < int(whole.sum()) < 54

    def test_a_hidden_channel_reaches_no_latent(self):
        recipe = self.make(patches_only=0.0, channels_only=1.0)
        view = recipe.view(self.batch(recipe), seed=1)
        gone = view.plan.mask.view(3, 4, 16).all(2)[:, None, :, None, None]
        other = torch.where(gone, torch.randn_like(view.parts), view.parts)
        assert torch.equal(recipe.latents(other, view.plan), recipe.latents(view.parts, view.plan))

    def test_features_and_refusals(self):
        recipe = self.make()
        assert recipe.encode(self.batch(recipe)).shape == (3, 3 + 64, 16)
        with pytest.raises(ValueError, match=r"images must be \[B, 4, 16, 16\]"):
            recipe(ChannelBatch(torch.zeros(2, 3, 16, 16)))
        with pytest.raises(ValueError, match="some are missing in `present`"):
            recipe.encode(self.ragged())
        with pytest.raises(ValueError, match="present must be bool"):
            recipe(ChannelBatch(torch.zeros(2, 4, 16, 16), torch.ones(2, 4)))
        with pytest.raises(ValueError, match="must be shares of one"):
            recipes.create("cha_maevit", patches_only=0.7)
        with pytest.raises(ValueError, match="2 at least"):
            recipes.create("cha_maevit", channels=1)


def test_arrays_of_channels(tmp_path):
    image = np.random.default_rng(0).standard_normal((4, 10, 12)).astype(np.float32)
    image[2] = np.nan
    np.save(tmp_path / "a.npy", image)
    assert read_channels(tmp_path / "a.npy", 4).shape == (4, 10, 12)
    with pytest.raises(ValueError, match=r"an image is numbers \[3, height, width\]"):
        read_channels(tmp_path / "a.npy", 3)
    made, present = standardised(image)
    assert present.tolist() == [True, True, False, True]
    assert not made[2].any()
    assert np.abs(made[[0, 1, 3]].mean((1, 2))).max() < 1e-6
    np.testing.assert_allclose(made[[0, 1, 3]].std((1, 2)), 1, rtol=1e-3)
    with pytest.raises(ValueError, match="all of its channels are missing"):
        standardised(np.full((2, 3, 3), np.nan))


def test_pixels_without_a_value(tmp_path):
    """They have their channel's mean, before anything is resized, and change no other channel."""
    image = np.random.default_rng(0).standard_normal((4, 16, 16)).astype(np.float32)
    broken = image.copy()
    broken[0, 3, 4], broken[0, 5, 6], broken[1] = np.nan, np.inf, -np.inf
    made = filled(broken)
    assert np.array_equal(made[2:], image[2:])
    assert np.isnan(made[1]).all()
    rest = np.delete(image[0].ravel(), [3 * 16 + 4, 5 * 16 + 6])
    np.testing.assert_allclose(made[0, [3, 5], [4, 6]], rest.mean(), rtol=1e-5)
    assert np.array_equal(np.delete(made[0].ravel(), [3 * 16 + 4, 5 * 16 + 6]), rest)
    broken = broken.astype(np.float64)
    broken[3, 0, 0] = 1e300  # more than float32 holds
    np.save(tmp_path / "a.npy", broken)
    source = Channels(4, (8, 8)).open(PretrainConfig(data=str(tmp_path)))
    batch, _ = source.examples(1)
    assert batch.images.isfinite().all()
    assert batch.images.abs().max() < 10
    assert batch.present.tolist() == [[True, False, True, True]]


def test_made_channels():
    pytest.importorskip("skimage")
    path = shipped_photographs()[0]
    one = made_channels(path, 1, 32)
    assert one.shape == (5, 32, 32)
    assert np.array_equal(one, made_channels(path, 1, 32))
    assert not np.array_equal(one, made_channels(path, 2, 32))
