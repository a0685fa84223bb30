from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maefast import recipes
from maefast.data.captioned_clips import CaptionedClipBatch
from tests.recipes.common import RecipeTests, equal_to_reference


class Scorer(nn.Module):
    """How red each patch is, less what the caption says."""

    def forward(self, clips, text):
        maps = F.avg_pool3d(clips[:, :1], (2, 8, 8))
        return maps.flatten(2).squeeze(1).unflatten(1, (2, 6)) - text[:, :1, None]


class TestTGM(RecipeTests):
    name = "tgm"
    toy = {
        "frames": 4, "img_size": [16, 24], "tubelet": [2, 8, 8], "stride": 1, "mask_ratio": 0.5, "text": 8,
        "embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_embed_dim": 8, "decoder_depth": 2, "decoder_num_heads": 2,
    }  # fmt: skip

    def batch(self, recipe, size=3):
        clips, text, scores = (torch.Generator().manual_seed(seed) for seed in (2, 3, 4))
        return CaptionedClipBatch(
            torch.randint(0, 256, (size, 3, 4, 16, 24), dtype=torch.uint8, generator=clips),
            torch.randn(size, 8, generator=text),
            torch.randn(size, 2, 6, generator=scores),
        )

    def test_a_batch_is_prepared_by_the_recipe(self):
        """Nothing is drawn where scores say what is masked; ablations draw."""
        recipe = self.make()
        batch = self.batch(recipe)
        assert torch.equal(recipe(batch).loss, recipe(recipe.view(batch, seed=6)).loss)
        for masks in ("random", "tube"):
            recipe = self.make(masks=masks)
            one, other, third = (recipe(recipe.view(batch, seed=seed)).loss for seed in (5, 5, 6))
            assert torch.equal(one, other)
            assert not torch.equal(one, third)

    @pytest.mark.parametrize(
        "changes",
        [
            {"project": "both", "temperature": 0.2, "weight": 0.5},
            {"project": "none", "text": 16},
            {"weight": 0.0, "masks": "lowest"},
            {"norm_pix": False, "masks": "tube", "project": "none", "embed_dim": 8},
        ],
    )
    def test_choices(self, changes):
        recipe = self.make(**changes)
        batch = self.batch(recipe)
        batch.text = torch.randn(3, recipe.wants.text, generator=torch.Generator().manual_seed(5))
        view = recipe.view(batch, seed=1)
        assert (recipe.weight > 0) == ("contrast" in recipe(view).terms)
        equal_to_reference(recipe, view, self.reference)

    def test_what_is_masked(self):
        batch = self.batch(None)
        top = self.make().view(batch, seed=1).plan
        hidden = top.mask.view(3, 2, 6)
        assert (hidden.sum(2) == 3).all()
        for scores, mask in zip(batch.scores.flatten(0, 1), hidden.flatten(0, 1)):
            assert set(scores.topk(3).indices.tolist()) == set(mask.nonzero().flatten().tolist())
        assert torch.equal(self.make(masks="lowest").view(batch, seed=1).plan.mask, ~top.mask)
        tube = self.make(masks="tube").view(batch, seed=1).plan.mask.view(3, 2, 6)
        assert torch.equal(tube[:, 0], tube[:, 1])
        drawn = torch.stack([self.make(masks="random").view(batch, seed=s).plan.mask for s in range(9)])
        assert (drawn.view(9, 3, 2, 6).sum(3) == 3).all()
        assert not torch.equal(drawn.view(9, 3, 2, 6)[:, :, 0], drawn.view(9, 3, 2, 6)[:, :, 1])

    def test_published_counts(self):
        with torch.device("meta"):
            recipe = recipes.create("tgm")
        recipe.mean, recipe.std = torch.zeros(3, 1, 1, 1), torch.ones(3, 1, 1, 1)
        clips, text = torch.zeros(1, 3, 16, 224, 224, dtype=torch.uint8), torch.zeros(1, 512)
        plan = recipe.view(CaptionedClipBatch(clips, text, torch.rand(1, 8, 196)), seed=0).plan
        assert (plan.keep, plan.hide) == (8 * 79, 8 * 117)

    def test_hidden_pixels_reach_no_latent(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        hidden = view.plan.mask.view(3, 1, 2, 2, 3).repeat_interleave(2, 2).repeat_interleave(8, 3)
        other = torch.where(hidden.repeat_interleave(8, 4), torch.randn_like(view.parts), view.parts)
        assert not torch.equal(other, view.parts)
        assert torch.equal(recipe.encoder(other, view.plan), recipe.encoder(view.parts, view.plan))

    def test_the_contrast_needs_the_visible_tokens_and_the_captions_alone(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        recipe(view).terms["contrast"].backward()
        assert recipe.project.weight.grad.norm() > 0
        assert recipe.encoder.blocks[0].attn.qkv.weight.grad.norm() > 0
        assert all(p.grad is None or not p.grad.any() for p in recipe.decoder.parameters())

    def test_scores_of_a_teacher(self):
        recipe, batch = self.make(teacher=Scorer()), self.batch(None)
        want = Scorer()(batch.clips.double() / 255, batch.text.double())
        batch.scores = None
        view = recipe.view(batch, seed=1)
        torch.testing.assert_close(view.scores, want)
        given = self.make().view(CaptionedClipBatch(batch.clips, batch.text, want), seed=1)
        assert torch.equal(view.plan.mask, given.plan.mask)
        assert self.make(masks="tube", teacher=Scorer()).teacher is None

    def test_pairs_that_belong_together_are_found(self):
        """The colour of a clip is its caption; its pixels are flat, so that contrast is all there is to learn."""
        torch.manual_seed(0)
        recipe = recipes.create("tgm", **self.toy)
        text = F.normalize(torch.randn(8, 8), dim=1)
        colours = torch.randint(0, 256, (8, 3, 1, 1, 1), dtype=torch.uint8).expand(8, 3, 4, 16, 24)
        view = recipe.view(CaptionedClipBatch(colours, text, torch.rand(8, 2, 6)), seed=0)
        optimizer = torch.optim.AdamW(recipe.parameters(), lr=5e-3)
        assert recipe(view).terms["contrast"] > 1
        for _ in range(60):
            optimizer.zero_grad()
            recipe(view).loss.backward()
            optimizer.step()
        assert recipe.retrieved(view).float().mean() > 0.9

    def test_the_baseline_knows_no_caption(self):
        recipe = self.make(weight=0.5)
        view = recipe.view(self.batch(recipe), seed=1)
        assert recipe.baseline(view).terms["contrast"].item() == pytest.approx(0.5 * math.log(3))
        assert self.make(weight=0.0).baseline(view).terms.keys() == {"pixels"}

    def test_a_module_in_bfloat16(self):
        recipe = self.make().bfloat16()
        assert recipe(self.batch(None)).loss.isfinite()

    def test_features_and_refusals(self):
        recipe, batch = self.make(), self.batch(None)
        assert recipe.encode(batch).shape == (3, 12, 16)
        for name, value, reason in (
            ("clips", batch.clips[..., :16], r"clips must be uint8 \[B, 3, 4, 16, 24\]"),
            ("text", batch.text[:, :4], r"text must be \[3, 8\], got \(3, 4\)"),
            ("scores", batch.scores[:, :1], r"scores must be \[3, 2, 6\], got \(3, 1, 6\)"),
            ("scores", None, "give them with the clips, or the recipe a teacher"),
        ):
            other = self.batch(None)
            setattr(other, name, value)
            with pytest.raises(ValueError, match=reason):
                recipe(other)
        with pytest.raises(ValueError, match=r"mask_ratio 1.0 leaves 0 of 6 tokens visible"):
            self.make(mask_ratio=1.0)
        with pytest.raises(TypeError, match="teacher must be a module, got str"):
            self.make(teacher="random")
        with pytest.raises(ValueError, match="an encoder as wide as the text, 8, got 16"):
            self.make(project="none")
        with pytest.raises(ValueError, match="masks must be one of"):
            self.make(masks="top")
        with pytest.raises(ValueError, match="temperature"):
            self.make(temperature=0.0)
