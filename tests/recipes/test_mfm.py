from __future__ import annotations

import pytest
import torch
from torch import nn

from maefast import recipes
from maefast.data.domains import DomainBatch
from maefast.nn.segmentation import ConvPyramid
from maefast.recipe import Progress
from tests.recipes.common import RecipeTests, equal_to_reference


class TestMFM(RecipeTests):
    name = "mfm"
    toy = {
        "img_size": [16, 24], "classes": 4, "channels": [8, 8, 12], "strides": [2, 4, 8], "head_dim": 8,
        "embed_dim": 16, "depth": 2, "num_heads": 2, "threshold": 0.27,
    }  # fmt: skip
    taught = True

    def batch(self, recipe, size=3):
        numbers = [torch.Generator().manual_seed(seed) for seed in (2, 3, 4, 5)]
        images, target = (
            torch.randint(0, 256, (size, 3, 16, 24), dtype=torch.uint8, generator=numbers[i]) for i in (0, 1)
        )
        labels, pseudo = (torch.randint(0, 4, (size, 16, 24), generator=numbers[i]) for i in (2, 3))
        labels[0, :3] = 255
        return DomainBatch(images, labels, target, pseudo)

    @pytest.mark.parametrize(
        "changes",
        [
            {"pseudo": "given", "masks": "exact", "mfm": 0.5, "uda": 2.0},
            {"channels": [8], "strides": [2], "grid": [2, 3], "pseudo": "given"},
            {"channels": [8], "strides": [1], "grid": [2, 3], "pseudo": "given"},
            {"channels": [8, 8], "strides": [4, 8], "mask_ratio": 0.0},
        ],
    )
    def test_choices(self, changes):
        recipe = self.make(**changes)
        batch = self.batch(recipe)
        batch.weight = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(6))
        equal_to_reference(recipe, recipe.view(batch, seed=1), self.reference)

    def test_masks(self):
        batch = self.batch(None)
        plan = torch.stack([self.make().view(batch, seed=seed).plan for seed in range(60)])
        assert plan.shape == (60, 3, 2, 3)
        assert plan.double().mean().item() == pytest.approx(0.4, abs=0.05)
        assert len(set(plan.sum((2, 3)).flatten().tolist())) > 3, "independent cells: counts differ"
        exact = torch.stack([self.make(masks="exact").view(batch, seed=seed).plan for seed in range(9)])
        assert (exact.sum((2, 3)) == int(0.4 * 6)).all()
        assert not self.make(mask_ratio=0.0).view(batch, seed=1).plan.any()

    def test_nothing_hidden_is_nothing_new(self):
        recipe = self.make(mask_ratio=0.0)
        found = recipe(recipe.view(self.batch(recipe), seed=1))
        torch.testing.assert_close(found.pred[1], found.pred[2], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.terms["target"], found.terms["rebuilt"], rtol=1e-12, atol=0)

    def test_hidden_cells_reach_no_prediction(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        maps = recipe.encoder(view.parts[1])
        changed = []
        for one in maps:
            scale = one.shape[2] // 2
            hidden = view.plan.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, None]
            changed.append(torch.where(hidden, torch.randn_like(one), one))
        assert view.plan.any()
        want, got = (recipe.decoder(recipe.rebuilder(of, view.plan)) for of in (maps, changed))
        assert torch.equal(want, got)
        assert not torch.equal(recipe.decoder(maps), recipe.decoder(changed))

    def test_the_rebuilt_term_teaches_all_three(self):
        recipe = self.make()
        recipe(recipe.view(self.batch(recipe), seed=1)).terms["rebuilt"].backward()
        for part in (recipe.encoder, recipe.decoder, recipe.rebuilder):
            for name, parameter in part.named_parameters():
                assert not parameter.requires_grad or parameter.grad.norm() > 0, name
        assert all(parameter.grad is None for parameter in recipe.teacher.parameters())

    def test_inference_does_not_know_the_rebuilder(self):
        recipe, batch = self.make(), self.batch(None)
        view = recipe.view(batch, seed=1)
        want = recipe(view).pred[1], recipe.encode(batch)
        with torch.no_grad():
            for parameter in recipe.rebuilder.parameters():
                parameter.add_(1)
        assert torch.equal(recipe(view).pred[1], want[0])
        assert torch.equal(recipe.encode(batch), want[1])

    def test_pseudo_labels(self):
        recipe, batch = self.make(), self.batch(None)
        _, labels, weight = recipe.view(batch, seed=1).target
        target = (batch.target.double() / 255 - recipe.mean) / recipe.std
        logits = recipe.teacher.decoder(recipe.teacher.encoder(target))
        shares = nn.functional.interpolate(logits, (16, 24), mode="bilinear").softmax(1)
        assert torch.equal(labels, shares.argmax(1))
        torch.testing.assert_close(weight.flatten(), (shares.amax(1) > 0.27).double().mean((1, 2)))
        given = self.make(pseudo="given").view(batch, seed=1).target
        assert torch.equal(given[1], batch.pseudo)
        assert (given[2] == 1).all()

    def test_the_teacher_follows(self):
        recipe = self.make(decay=0.75)
        old = recipe.teacher.encoder.stages[0].down.weight.clone()
        new = recipe.encoder.stages[0].down.weight.detach()
        recipe.after_step(Progress(1, 10, 0.0))
        torch.testing.assert_close(recipe.teacher.encoder.stages[0].down.weight, old / 2 + new / 2)
        recipe.after_step(Progress(9, 10, 0.0))
        torch.testing.assert_close(recipe.teacher.encoder.stages[0].down.weight, (old / 2 + new / 2) * 0.75 + new / 4)

    def test_networks_of_your_own(self):
        torch.manual_seed(0)
        networks = {"encoder": ConvPyramid((6, 10), (4, 8)), "decoder": nn.Sequential(Last(), nn.Conv2d(10, 4, 1))}
        recipe = recipes.create("mfm", **{**self.toy, "channels": [6, 10], "strides": [4, 8], **networks})
        found = recipe(self.batch(recipe))
        assert found.pred[0].shape == (3, 4, 2, 3)
        found.loss.backward()

    def test_published_sizes(self):
        with torch.device("meta"):
            recipe = recipes.create("mfm")
        assert (recipe.grid, recipe.rebuilder.scales) == ((16, 16), (8, 4, 2, 1))
        with torch.device("meta"):
            recipe = recipes.create("mfm", "single")
        assert (recipe.grid, recipe.rebuilder.scales) == ((16, 16), (4,))

    def test_features_and_refusals(self):
        recipe = self.make()
        assert recipe.encode(self.batch(recipe)).shape == (3, 6, 12)
        for name, value, reason in (
            ("images", torch.zeros(3, 3, 8, 8, dtype=torch.uint8), r"images must be torch.uint8 \[3, 3, 16, 24\]"),
            ("labels", torch.zeros(3, 16, 24, dtype=torch.int32), r"labels must be torch.int64 \[3, 16, 24\]"),
        ):
            batch = self.batch(recipe)
            setattr(batch, name, value)
            with pytest.raises(ValueError, match=reason):
                recipe(batch)
        batch = self.batch(recipe)
        batch.pseudo = None
        with pytest.raises(ValueError, match="pseudo labels are wanted"):
            self.make(pseudo="given")(batch)
        for changes, reason in (
            ({"masks": "blocks"}, "masks must be one of"),
            ({"mask_ratio": 1.5}, r"mask_ratio must lie in \[0, 1\]"),
            ({"channels": [8, 8]}, "do not fit a grid"),
            ({"grid": [3, 3]}, "do not fit a grid"),
            ({"img_size": 20}, "not a multiple"),
        ):
            with pytest.raises(ValueError, match=reason):
                self.make(**changes)


class Last(nn.Module):
    def forward(self, maps):
        return maps[-1]
