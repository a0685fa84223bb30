from __future__ import annotations

import pytest
import torch

from maefast import masking, models, recipes
from maefast.data.points import PointBatch
from maefast.nn import Groups
from maefast.nn.teachers import FeatureTeacher
from maefast.recipe import View
from tests.recipes.common import RecipeTests, equal_to_reference


class TestI2PMAE(RecipeTests):
    name = "i2p_mae"
    demo_share = 0.7
    toy = {
        "teacher": "random", "points": 60, "groups": [24, 12, 6], "group_sizes": [5, 4, 3], "mask_ratio": 0.6,
        "embed_dims": [16, 16, 32], "depths": [1, 2, 1], "num_heads": 2, "drop_path": 0.0, "img_size": 32,
        "patch_size": 8, "teacher_dim": 16,
    }  # fmt: skip
    taught = mask_of_teacher = True

    def batch(self, recipe, size=3):
        return PointBatch(torch.randn(size, 60, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))

    @pytest.mark.parametrize(
        "changes",
        [
            {"mask": "random"},
            {"bug_compat": True},
            {"mask_ratio": 0.3, "up_depths": [2]},
            {"groups": [24, 12], "group_sizes": [5, 4], "embed_dims": [16, 32], "depths": [1, 1],
             "decoder_depths": [2], "up_depths": []},
        ],
    )  # fmt: skip
    def test_variants(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    @pytest.mark.parametrize("embed_all", [True, False])
    def test_statistics_of_the_batch(self, embed_all):
        recipe = self.make(embed_all=embed_all).train()
        before = recipe.encoder.embeds[1].first_conv[1].running_mean.clone()
        # Biases in front of batch norms have no gradient but rounding, more of it here than elsewhere.
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference, tolerance=1e-8)
        assert not torch.equal(recipe.encoder.embeds[1].first_conv[1].running_mean, before)

    def test_masks(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe, 8), seed=0)
        fine, middle, coarse = view.plan
        assert (coarse.keep, coarse.hide) == (3, 3)  # int(0.6 * 6) are hidden
        assert middle.keep is None
        assert fine.keep is None
        for below, above, index in zip((fine, middle), (middle, coarse), view.parts[0].index[1:]):
            for sample in range(8):
                children = set(index[sample][~above.mask[sample]].flatten().tolist())
                assert set((~below.mask[sample]).nonzero().flatten().tolist()) == children

    def test_published_counts(self):
        with torch.device("meta"):
            recipe = recipes.create("i2p_mae")
        recipe.to_empty(device="cpu")  # no weight is looked at
        recipe.teacher = lambda images: (torch.zeros(len(images), 196, 512), torch.rand(len(images), 196))
        view = recipe.view(PointBatch(torch.randn(1, 2048, 3)), seed=0)
        assert [plan.num_tokens for plan in view.plan] == [512, 256, 64]
        assert view.plan[2].keep == 13
        assert view.target.shape == (1, 512, 1536)

    def test_the_mask_follows_the_teacher(self):
        recipe = self.make(temperature=1e-6)

        def teacher(images):
            looks = torch.linspace(1, 0, 4, dtype=torch.float64)[:, None].expand(4, 4)  # at small rows of each picture
            return torch.zeros(len(images), 16, 16).double(), looks.flatten().expand(len(images), -1)

        recipe.teacher = teacher
        view = recipe.view(self.batch(recipe), seed=1)
        for centres, mask in zip(view.parts[0].groups[2].centres, view.plan[2].mask):
            assert centres[~mask].sum() < centres[mask].sum()

    def test_what_an_index_of_zero_shows(self):
        """The release makes token 0 of sample 0 visible; no other sample changes."""
        found, both = 0, [self.make(bug_compat=quirk) for quirk in (False, True)]
        for seed in range(8):
            sane, release = (recipe.view(self.batch(recipe), seed=seed).plan for recipe in both)
            assert torch.equal(sane[2].mask, release[2].mask)
            assert all(not plan.mask[0, 0] for plan in release[:2])
            assert all(torch.equal(a.mask[1:], b.mask[1:]) for a, b in zip(sane, release))
            found += int(sane[1].mask[0, 0])
        assert found

    def test_hidden_points_reach_no_latent(self):
        """In eval mode: in training the statistics of the batch norms are of all groups, as published."""
        recipe = self.make()
        (scales, up), plans = (view := recipe.view(self.batch(recipe), seed=1)).parts, view.plan
        points = torch.where(plans[0].mask[..., None, None], 9.0, scales.groups[0].points)
        other = scales._replace(groups=(Groups(points, scales.groups[0].centres), *scales.groups[1:]))
        mine, theirs = recipe(view), recipe(View((other, up), plans, view.target))
        assert all(map(torch.equal, mine.pred, theirs.pred))

    def test_one_by_one(self):
        recipe = self.make()
        batch = self.batch(recipe)
        view = recipe.view(batch, seed=1)
        output = recipe(view)
        alone = []
        for i in range(3):
            one = recipe.view(PointBatch(batch.points[i : i + 1]), seed=1)
            plan = recipe.plans(masking.from_bool(view.plan[2].mask[i : i + 1]), one.parts[0])
            alone.append(recipe(View(one.parts, plan, one.target)))
        for k in (0, 1):
            pred = torch.cat([single.pred[k].flatten(0, -2) for single in alone])
            torch.testing.assert_close(output.pred[k], pred, rtol=1e-10, atol=1e-10)

    def test_features(self):
        recipe = self.make()
        assert recipe.encode(self.batch(recipe)).shape == (3, 6, 32)
        # Some points belong to no group of the next scale, and the release leaves them out.
        other = self.make(bug_compat=True).encode(self.batch(recipe))
        assert other.shape == (3, 6, 32)
        untaught = recipes.create("i2p_mae", **{**self.toy, "teacher": None}).double()
        assert untaught.encode(self.batch(recipe)).shape == (3, 6, 32)
        with pytest.raises(ValueError, match="I2PMAE needs a teacher"):
            untaught(self.batch(recipe))

    @pytest.mark.parametrize(
        ("changes", "error", "match"),
        [
            ({"groups": [90, 12, 6]}, ValueError, "90 groups of 5 points do not fit 60 points"),
            ({"group_sizes": [5, 4]}, ValueError, "as many scales"),
            ({"embed_dims": [16, 16]}, ValueError, "need a width of embed_dims each"),
            ({"decoder_depths": [1]}, ValueError, "of decoder_depths one less"),
            ({"depths": [1, 1]}, ValueError, "depths must name at least one block for each of 3"),
            ({"mask": "near"}, ValueError, "mask must be"),
            ({"temperature": 0.0}, ValueError, "temperature must be positive"),
            ({"teacher": 3}, TypeError, "teacher must be a module, a name or folder, or 'random', got int"),
            ({"teacher": torch.nn.Linear(2, 2)}, TypeError, "a teacher is a mae_"),
        ],
    )
    def test_refusals(self, changes, error, match):
        with pytest.raises(error, match=match):
            recipes.create("i2p_mae", **{**self.toy, **changes})

    def test_other_clouds(self):
        recipe = self.make()
        with pytest.raises(ValueError, match=r"points must be \[B, 60, 3\]"):
            recipe(PointBatch(torch.zeros(2, 30, 3)))


def test_features_of_our_own_teacher():
    torch.manual_seed(0)
    model = models.create(
        "mae", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=1
    ).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    features, looks = FeatureTeacher(model)(images)
    want = model.norm(model.states(images, at=(1,))[0])[:, 1:]
    torch.testing.assert_close(features, want, rtol=1e-12, atol=1e-12)
    assert looks.shape == (2, 16)


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "ViTModel"])
def test_features_of_a_teacher_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
        "patch_size": 8, "projection_dim": 24, "attn_implementation": "eager",
    }  # fmt: skip
    clip = kind.startswith("CLIP")
    config = getattr(transformers, "CLIPVisionConfig" if clip else "ViTConfig")(**sizes)
    model = getattr(transformers, kind)(config).eval()
    images = torch.randn(2, 3, 32, 32)
    teacher = FeatureTeacher(model)
    teacher.clip = False
    features, looks = teacher(images)
    out = model(pixel_values=images, output_attentions=True)
    want = out.last_hidden_state[:, 1:]
    if clip:  # transformers norms and projects the class token alone
        inner = getattr(model, "vision_model", model)
        want = inner.post_layernorm(want)
    if kind.endswith("Projection"):
        want = model.visual_projection(want)
        assert teacher.width == 24
        assert not torch.allclose(FeatureTeacher(model)(images)[0], features)  # CLIP's own mean and deviation
    torch.testing.assert_close(features, want)
    torch.testing.assert_close(looks, out.attentions[-1][:, :, 0, 1:].mean(1))
