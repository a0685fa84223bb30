from __future__ import annotations

import pytest
import torch

from maefast import masking, recipes
from maefast.data.clips import ClipBatch
from maefast.train import graph
from tests.recipes.common import RecipeTests, equal_to_reference


class TestVideoMAEV2(RecipeTests):
    name = "videomae_v2"
    demo_share = 0.7
    toy = {
        "frames": 8, "img_size": [16, 32], "tubelet": [2, 8, 8], "stride": 1, "mask_ratio": 0.5, "embed_dim": 16,
        "depth": 2, "num_heads": 2, "decoder_embed_dim": 8, "decoder_depth": 2, "decoder_num_heads": 2,
    }  # fmt: skip

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        return ClipBatch(torch.randint(0, 256, (size, 3, 8, 16, 32), dtype=torch.uint8, generator=generator))

    @pytest.mark.parametrize(
        "changes",
        [
            {"again": False},
            {"decoder_ratio": 0.25},
            {"decoder_ratio": 0.75, "path": "clockwise"},
            {"decoder_ratio": 0},
            {"norm_pix": False, "mask_ratio": 0.75},
        ],
    )
    def test_every_form(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_other_numbers_of_frames(self):
        """3 tubelets in time: what is decoded differs from clip to clip, and is packed."""
        recipe = self.make(frames=6, again=False)
        clips = ClipBatch(self.batch(recipe, 6).clips[:, :, :6])
        view = recipe.view(clips, seed=3)
        hidden = view.plan.mask.sum(1)
        assert len(set(hidden.tolist())) > 1
        output = recipe(view)
        assert output.pred.shape == (int(hidden.sum()), 384)
        alone = []
        for i in range(6):
            plan = masking.from_bool(view.plan.mask[i : i + 1], absent=view.plan.absent[i : i + 1])
            latent = recipe.encoder(view.parts[i : i + 1], plan)
            alone.append(recipe.decoder(latent, plan).flatten(0, 1))
        torch.testing.assert_close(output.pred, torch.cat(alone), rtol=0, atol=1e-10)

    def test_two_of_each_cell_are_decoded_and_all_four_phases_occur(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe, 32), seed=1)
        decoded = view.plan.mask.scatter(1, view.again, True)
        # What is neither decoded nor visible is absent, so visible positions tell the phase too.
        cells = decoded.view(32, 4, 1, 2, 2, 2)
        assert (cells.sum((3, 5)) == 2).all()
        assert (decoded.view(32, 4, 8).sum(1) == 2).all(), "each position in two of four frames"
        assert len({tuple(row.flatten().tolist()) for row in decoded}) == 4
        assert torch.equal(decoded & ~view.plan.mask, decoded & ~view.plan.absent & ~view.plan.mask)

    def test_every_frame_has_the_same_visible_positions(self):
        recipe = self.make()
        plan = recipe.view(self.batch(recipe), seed=3).plan
        visible = (~plan.mask & ~plan.absent).view(3, 4, 8)
        assert (visible == visible[:, :1]).all()
        assert visible.sum((1, 2)).tolist() == [16, 16, 16]

    def test_without_a_decoder_mask_it_is_videomae(self):
        recipe = self.make(decoder_ratio=0)
        one = recipes.create("videomae", **self.toy).double().eval()
        one.load_state_dict(recipe.state_dict())
        batch = self.batch(recipe)
        view, same = recipe.view(batch, seed=1), one.view(batch, seed=1)
        assert view.again is None
        assert torch.equal(view.plan.mask, same.plan.mask)
        assert torch.equal(recipe(view).loss, one(same).loss)

    def test_published_counts(self):
        with torch.device("meta"):
            recipe = recipes.create("videomae_v2")
        recipe.mean, recipe.std = torch.zeros(3, 1, 1, 1), torch.ones(3, 1, 1, 1)
        view = recipe.view(ClipBatch(torch.zeros(2, 3, 16, 224, 224, dtype=torch.uint8)), seed=0)
        assert (view.plan.keep, view.plan.hide, view.again.shape) == (160, 704, (2, 80))

    def test_the_positions_given_again_only_listen_and_speak(self):
        """They change predictions, but none is made of them."""
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        latent = recipe.encoder(view.parts, view.plan)
        two, one = (recipe.decoder(latent, view.plan, again=again) for again in (view.again, None))
        assert two.shape == one.shape == (3, 8, 384)
        assert not torch.allclose(two, one)

    def test_a_view_passes_through_a_graph(self):
        """Positions given again are as many in every batch, and survive being taken apart."""
        recipe = self.make()
        views = [recipe.view(self.batch(recipe), seed=seed) for seed in (1, 2)]
        assert graph.kinds(views[0]) == graph.kinds(views[1])
        for view in views:
            same = graph.put_together(graph.kinds(views[0]), graph.take_apart(view))
            assert torch.equal(same.again, view.again)
            assert torch.equal(recipe(same).loss, recipe(view).loss)

    def test_hidden_pixels_reach_no_latent(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        unseen = (view.plan.mask | view.plan.absent).view(3, 1, 4, 2, 4)
        for axis, times in ((2, 2), (3, 8), (4, 8)):
            unseen = unseen.repeat_interleave(times, axis)
        other = torch.where(unseen, torch.randn_like(view.parts), view.parts)
        assert not torch.equal(other, view.parts)
        assert torch.equal(recipe.encoder(other, view.plan), recipe.encoder(view.parts, view.plan))

    def test_refusals(self):
        for arguments, message in (
            ({"frames": 6}, "multiple of 4 tubelets"),
            ({"img_size": [24, 32]}, "even"),
            ({"decoder_ratio": 0.6}, "ratio must be 0, 0.25"),
            ({"path": "snake"}, "path must be one of"),
        ):
            with pytest.raises(ValueError, match=message):
                recipes.create("videomae_v2", **{**self.toy, **arguments})
        with pytest.raises(TypeError, match="takes no width; its arguments are decoder_ratio, path, again, frames"):
            recipes.create("videomae_v2", width=5)
