from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from maefast import recipes
from maefast.data.clips import ClipBatch
from maefast.nn import encode_together, pool_visible
from maefast.recipe import Recipe, View
from tests.recipes.common import RecipeTests, equal_to_reference


class TestCrossVideoMAE(RecipeTests):
    name = "cross_video_mae"
    toy = {
        "frames": 4, "img_size": [16, 24], "tubelet": [2, 8, 8], "patch_size": 8, "stride": 1, "mask_ratio": 0.5,
        "frame_mask_ratio": 0.5, "proj_dim": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_embed_dim": 8,
        "decoder_depth": 1, "frame_decoder_depth": 2, "decoder_num_heads": 1,
    }  # fmt: skip

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        return ClipBatch(torch.randint(0, 256, (size, 3, 4, 16, 24), dtype=torch.uint8, generator=generator))

    @pytest.mark.parametrize(
        "changes",
        [
            {"norm_pix": False, "intra": 0.3, "cross": 2.0, "temperature": 0.5},
            {"shared": True},
            {"mask_ratio": [0.5, 0.75], "decoder_depth": 2},
            {"mask_ratio": [0.5, 0.75], "frame_mask_ratio": [0.4, 0.7], "shared": True},
        ],
    )
    def test_other_arguments(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    @pytest.mark.parametrize("ratio", [0.5, [0.5, 0.75]])
    def test_one_packed_batch_is_each_alone(self, ratio):
        """Clips and frames through the same blocks, and each view through blocks of its own that are equal."""
        recipe, apart = self.make(mask_ratio=ratio, shared=True), self.make(mask_ratio=ratio)
        weights = recipe.state_dict()
        copies = {
            name.replace("encoder.", "frame_encoder.", 1): value
            for name, value in weights.items() if name.startswith("encoder.blocks.")
        }  # fmt: skip
        apart.load_state_dict({**weights, **copies})
        view = recipe.view(self.batch(recipe), seed=1)
        one, two = recipe(view), apart(view)
        for name, term in one.terms.items():
            torch.testing.assert_close(two.terms[name], term, rtol=1e-12, atol=0)

    def test_views(self):
        recipe = self.make(mask_ratio=[0.5, 0.75])
        batch = self.batch(recipe)
        view = recipe.view(batch, seed=3)
        clips, frames = view.parts
        same = (batch.clips.double() / 255 - recipe.mean) / recipe.std
        torch.testing.assert_close(clips[:3], same, rtol=0, atol=1e-6)
        assert not torch.allclose(clips[3:], same, atol=0.1)
        found = [[t for t in range(4) if torch.equal(frame, clip[:, t])] for frame, clip in zip(frames, clips)]
        assert all(len(times) == 1 for times in found)
        assert found[:3] == found[3:]
        seen, stills = view.plan
        assert (~seen.mask).sum(1).tolist() == [6, 6, 6, 3, 3, 3]
        assert (~stills.mask).sum(1).tolist() == [3] * 6
        masks = {tuple(row) for row in seen.mask[:3].tolist()} | {tuple(row) for row in seen.mask[3:].tolist()}
        assert len(masks) > 2
        one = recipe.view(ClipBatch(batch.clips[:1]), seed=3)
        for whole, alone in zip((*view.parts, view.plan[0].mask), (*one.parts, one.plan[0].mask)):
            assert torch.equal(whole[[0, 3]], alone)

    def test_published_counts(self):
        with torch.device("meta"):
            recipe = recipes.create("cross_video_mae")
        recipe.mean, recipe.std = torch.zeros(3, 1, 1, 1), torch.ones(3, 1, 1, 1)
        clips = torch.zeros(1, 3, 16, 224, 224, dtype=torch.uint8)
        seen, stills = recipe.view(ClipBatch(clips), seed=0).plan
        assert (seen.batch, seen.num_tokens, seen.keep) == (2, 1568, 156)
        assert (stills.batch, stills.num_tokens, stills.keep) == (2, 196, 49)

    @pytest.mark.parametrize("shared", [False, True])
    def test_hidden_pixels_reach_no_latent(self, shared):
        recipe = self.make(shared=shared)
        view = recipe.view(self.batch(recipe), seed=1)
        seen, stills = (plan.mask for plan in view.plan)
        tubes = seen.view(6, 1, 2, 2, 3).repeat_interleave(2, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
        patches = stills.view(6, 1, 2, 3).repeat_interleave(8, 2).repeat_interleave(8, 3)
        parts = [torch.where(mask, torch.randn_like(x), x) for mask, x in zip((tubes, patches), view.parts)]
        assert not torch.equal(parts[0], view.parts[0])
        one, two = recipe(view), recipe(replace(view, parts=tuple(parts)))
        assert all(torch.equal(*both) for both in zip(one.pred, two.pred))
        assert all(torch.equal(one.terms[n], two.terms[n]) for n in one.terms if "contrast" in n)

    def test_pairs_find_each_other(self):
        """Clips of moving squares: frames find their clips among 16, all views being in one packed batch."""
        torch.manual_seed(0)
        options = {**self.toy, "img_size": 16, "embed_dim": 32, "depth": 1, "intra": 0.2, "shared": True, "colour": 0.0,
                   "scale": [0.9, 1.0]}  # fmt: skip
        recipe, steps = recipes.create("cross_video_mae", **options), 150
        optimizer = torch.optim.AdamW(recipe.parameters())
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
            recipe(recipe.view(ClipBatch(squares(16, step)), seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        right = [found(recipe, recipe.view(ClipBatch(squares(16, seed)), seed=seed)) for seed in range(1000, 1004)]
        assert sum(right) / len(right) > 0.9

    def test_features_and_refusals(self):
        for shared in (False, True):
            assert self.make(shared=shared).encode(self.batch(None)).shape == (3, 13, 16)
        for changes, match in (
            ({"mask_ratio": 1.0}, r"mask_ratio must lie in \(0, 1\)"),
            ({"frame_mask_ratio": [0.5, 0.5, 0.5]}, "frame_mask_ratio must lie in"),
            ({"mask_ratio": 0.98}, "mask_ratio 0.98 leaves 0 of 12 tokens visible"),
            ({"frame_mask_ratio": [0.5, 0.98]}, "frame_mask_ratio 0.98 leaves 0 of"),
            ({"temperature": 0}, "temperature must be positive"),
            ({"patch_size": 7}, "not a multiple of the patch size"),
        ):
            with pytest.raises(ValueError, match=match):
                self.make(**changes)
        with pytest.raises(ValueError, match=r"clips must be uint8 \[B, 3, 4, 16, 24\]"):
            self.make()(ClipBatch(torch.zeros(2, 3, 4, 16, 16, dtype=torch.uint8)))
        with pytest.raises(ValueError, match="scale must rise from above 0"):
            self.make(scale=[0.0, 1.0])(self.batch(None))


@torch.no_grad()
def found(recipe: Recipe, view: View) -> float:
    """How many frames are nearest to their clips."""
    latents = encode_together((recipe.encoder, recipe.frame_encoder), view.parts, view.plan, recipe.encoder.blocks)
    clips, frames = (
        F.normalize(to(pool_visible(latent, plan, 1)).unflatten(0, (2, -1)).mean(0), dim=1)
        for to, latent, plan in zip((recipe.projector, recipe.frame_projector), latents, view.plan)
    )
    return ((frames @ clips.T).argmax(1) == torch.arange(len(clips))).float().mean().item()


def squares(count: int, seed: int) -> torch.Tensor:
    """A square that moves over a ground, each in a colour of its own: uint8 [count, 3, 4, 16, 16]."""
    generator = torch.Generator().manual_seed(seed)
    clips = torch.rand(count, 3, 1, 1, 1, generator=generator).expand(-1, -1, 4, 16, 16).clone()
    colours = torch.rand(count, 3, 1, 1, generator=generator)
    for clip, colour, (x, y) in zip(clips, colours, torch.randint(0, 5, (count, 2), generator=generator).tolist()):
        for t in range(4):
            clip[:, t, y : y + 8, x + t : x + t + 8] = colour
    return (255 * clips).to(torch.uint8)
