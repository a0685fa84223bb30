from __future__ import annotations

import pytest
import torch

from maefast import recipes
from maefast.data.volumes import VolumeBatch
from maefast.nn import HierarchicalDecoder, sincos_3d
from maefast.ops import TokenMask
from tests.recipes.common import RecipeTests, equal_to_reference


class TestHiEndMAE(RecipeTests):
    name = "hi_end_mae"
    toy = {
        "img_size": [8, 8, 12], "patch_size": [4, 2, 4], "channels": 2, "mask_ratio": 0.6, "embed_dim": 48, "depth": 3,
        "num_heads": 3, "states": [0, 1], "decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 3,
    }  # fmt: skip

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        return VolumeBatch(torch.rand(size, *self.shape(recipe), generator=generator, dtype=torch.float64))

    @staticmethod
    def shape(recipe):
        return recipe.wants.channels, *recipe.wants.size

    @pytest.mark.parametrize(
        "changes", [{"norm_pix": False}, {"states": [2]}, {"decoder_depth": 0, "states": [0, 1, 2]}, {"patch_size": 4}]
    )
    def test_variants(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_counts(self):
        plan = self.make().view(self.batch(self.make()), seed=3).plan
        assert (plan.keep, plan.hide) == (9, 15)  # int(24 * 0.4)
        for size, counts in (("base16", (54, 162)), ("large12", (128, 384))):
            with torch.device("meta"):
                whole = recipes.create("hi_end_mae", size)
            assert whole.encoder.pos_embed.shape[0] == 1 + sum(counts)
            assert int(sum(counts) * (1 - whole.mask_ratio)) == counts[0]
            assert whole.decoder.pred.out_features == whole.patch_size[0] ** 3
            assert [len(whole.decoder.blocks), len(whole.decoder.cross_blocks)] == [2, 3]

    def test_states_are_outputs_of_blocks(self):
        """By hooks; the deepest is looked at first."""
        recipe = self.make(states=[0, 2])
        view, seen, looked = recipe.view(self.batch(recipe), seed=1), [], []
        for block in recipe.encoder.blocks:
            block.register_forward_hook(lambda module, args, out: seen.append(out))
        for block in recipe.decoder.cross_blocks:
            block.cross_attn.register_forward_pre_hook(lambda module, args: looked.append(args[1]))
        recipe(view)
        shallow, deep = recipe.decoder.embed[:2]
        torch.testing.assert_close(looked[0], deep(seen[2]))
        torch.testing.assert_close(looked[1], shallow(seen[0]))

    def test_hidden_voxels_reach_no_prediction(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        hidden = view.plan.mask.view(3, 1, *recipe.grid)
        for axis, side in enumerate(recipe.patch_size, 2):
            hidden = hidden.repeat_interleave(side, axis)
        other = torch.where(hidden, torch.randn_like(view.parts), view.parts)
        assert not torch.equal(other, view.parts)
        assert torch.equal(recipe(type(view)(other, view.plan)).pred, recipe(view).pred)

    def test_features_and_refusals(self):
        recipe = self.make()
        assert recipe.encode(self.batch(recipe)).shape == (3, 25, 48)
        with pytest.raises(ValueError, match=r"volumes must be \[B, 2, 8, 8, 12\]"):
            recipe(VolumeBatch(torch.zeros(2, 2, 8, 8, 8)))
        for changes, reason in (
            ({"img_size": 9}, "not a multiple of the patch size"),
            ({"img_size": [8, 8]}, r"img_size must be a positive int or \(depth, height, width\)"),
            ({"states": [1, 0]}, "states must name blocks of the encoder below 3, from 0 and rising"),
            ({"states": [3]}, "states must name blocks"),
            ({"states": []}, "one state or more"),
            ({"embed_dim": 16}, "multiple of 6"),
            ({"window": [3, 1]}, "window must be"),
        ):
            with pytest.raises(ValueError, match=reason):
                self.make(**changes)


def test_the_decoder_wants_what_it_looks_at():
    decoder = HierarchicalDecoder(16, 4, sincos_3d(24, (2, 2, 2), 1), 2, 24, 1, 3)
    plan = TokenMask.from_bool(torch.arange(8).expand(2, 8) < 5)
    latent = torch.randn(2, 4, 16)
    assert decoder(latent, plan, [latent, latent]).shape == (2, 5, 4)
    with pytest.raises(ValueError, match="looks at 2 states, got 1"):
        decoder(latent, plan, [latent])
    ragged = TokenMask.from_bool(torch.arange(16).view(2, 8) < 9)
    with pytest.raises(ValueError, match="as many visible and masked tokens"):
        decoder(latent, ragged, [latent, latent])
