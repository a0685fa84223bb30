from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from maefast import recipes
from maefast.bench.peers.plain import parameters
from maefast.bench.peers.recipes.lut import apart, encode
from maefast.data.images.batch import ImageBatch
from maefast.data.images.photometric import NUMBERS, blur, grey, second_view, turned
from maefast.nn.teachers import Averaged, cosine_decay
from maefast.ops import TokenMask
from maefast.recipe import Progress, View
from tests.recipes.common import RecipeTests, equal_to_reference


class TestLUT(RecipeTests):
    name = "lut"
    toy = {
        "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_embed_dim": 8,
        "decoder_depth": 1, "decoder_num_heads": 2, "head_dim": 24,
    }  # fmt: skip
    run = {"img_size": 32, "patch_size": 8}
    taught = True

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        return ImageBatch(torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator))

    @pytest.mark.parametrize("changes", [{"norm_pix": False}, {"weight": 2.0}, {"mask_ratio": 0.5}])
    def test_variants(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_statistics_of_each_view(self):
        recipe = self.make().train()
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference, 1e-8)

    def test_a_module_in_bfloat16(self):
        recipe = self.make().bfloat16().train()
        assert recipe(self.batch(recipe)).loss.isfinite()

    def test_something_must_be_seen(self):
        with pytest.raises(ValueError, match=r"mask_ratio 0.98 leaves 0 of 16 tokens visible"):
            self.make(mask_ratio=0.98)

    def test_views_share_no_patch(self):
        recipe = self.make(mask_ratio=0.5)
        both, first = recipe.view(self.batch(recipe), seed=1).plan
        one, two = both.ids_keep.chunk(2)
        assert torch.equal(one, first.ids_keep)
        assert torch.cat([one, two], 1).sort(1).values.tolist() == [list(range(16))] * 3
        greedy = self.make(mask_ratio=0.25)
        with pytest.raises(ValueError, match="must not exceed num_tokens"):
            greedy.view(self.batch(greedy), seed=1)

    def test_the_average_sees_all_of_both_views_and_gets_no_gradient(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        p = parameters(recipe)
        x = encode(p, "teacher.encoder.", recipe, view.parts)[:, 1:].mean(1)
        x = F.linear(x, p["teacher.projector.0.weight"])
        bn = recipe.teacher.projector[1]
        x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        want = F.linear(torch.relu(x), p["teacher.projector.3.weight"])
        torch.testing.assert_close(view.target, want, rtol=1e-9, atol=1e-9)
        recipe.train()
        assert not recipe.teacher.training
        recipe(view).loss.backward()
        assert all(parameter.grad is None for parameter in recipe.teacher.parameters())
        assert not any(parameter.requires_grad for parameter in recipe.teacher.parameters())

    def test_one_step_of_the_average(self):
        recipe = self.make()
        before = copy.deepcopy(recipe.teacher.state_dict())
        with torch.no_grad():
            for parameter in recipe.encoder.parameters():
                parameter.add_(1)
        recipe.after_step(Progress(1, 10, 0.1))
        for key, old in before.items():
            part, name = key.split(".", 1)
            new = getattr(recipe, part).state_dict()[name]
            now = recipe.teacher.state_dict()[key]
            want = 0.996 * old + 0.004 * new if old.is_floating_point() else new
            torch.testing.assert_close(now, want)

    def test_one_batch_equals_two_passes(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        equal_to_reference(recipe, view, apart)
        both = view.plan[0]
        second = TokenMask.from_scores(both.ids_restore[3:].float(), both.keep)
        alone = recipe.encoder(view.parts[3:], second)
        torch.testing.assert_close(recipe.encoder(view.parts, both)[3:], alone, rtol=1e-12, atol=1e-12)

    def test_hidden_pixels_reach_no_latent(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        hidden = view.plan[0].mask.view(6, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        other = torch.where(hidden, torch.randn_like(view.parts), view.parts)
        assert torch.equal(recipe.encoder(other, view.plan[0]), recipe.encoder(view.parts, view.plan[0]))
        assert recipe(View(other, view.plan, view.target)).terms.keys() == {"pixels", "agreement"}

    def test_a_file_without_the_average(self, tmp_path):
        one, two = self.make(), self.make()
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.add_(0.1)
        public = {k: v for k, v in recipes.public_weights(one).items() if not k.startswith("teacher.")}
        torch.save({"model": public}, tmp_path / "public.pth")
        recipes.load_weights(two, tmp_path / "public.pth")
        assert torch.equal(two.teacher.encoder.blocks[0].mlp.fc1.weight, one.encoder.blocks[0].mlp.fc1.weight)

    def test_features(self):
        recipe = self.make()
        assert recipe.encode(self.batch(recipe)).shape == (3, 17, 16)


def test_decay():
    assert cosine_decay(0.996, 0, 10) == pytest.approx(0.996)
    assert cosine_decay(0.996, 10, 10) == 1
    assert 0.996 < cosine_decay(0.996, 3, 10) < cosine_decay(0.996, 7, 10) < 1
    average = Averaged(part=torch.nn.BatchNorm1d(2))
    assert not average.train().part.training


def test_second_views():
    torch.manual_seed(0)
    images, numbers = torch.rand(64, 3, 12, 16), torch.rand(64, NUMBERS)
    views = second_view(images, numbers)
    assert torch.equal(views, second_view(images, numbers))
    assert views.min() >= 0
    assert views.max() <= 1
    still = numbers.clone()
    still[:, 0], still[:, 1] = 0.9, 0.9  # neither flipped nor jittered
    still[:, 6] = torch.tensor([0.1, 0.5, 0.9, 0.1]).repeat(16)
    views = second_view(images, still)
    torch.testing.assert_close(views[0], grey(images[:1])[0].expand(3, -1, -1))
    torch.testing.assert_close(views[1], torch.where(images[1] >= 128 / 255, 1 - images[1], images[1]))
    torch.testing.assert_close(views[2], blur(images[2:3], 0.1 + 1.9 * still[2:3, 7].view(1, 1, 1, 1))[0])
    flipped = still.clone()
    flipped[:, 0] = 0.1
    torch.testing.assert_close(second_view(images, flipped)[1], views[1].flip(2))
    torch.testing.assert_close(turned(images, torch.zeros(64, 1, 1, 1)), images)
    third = turned(images, torch.full((64, 1, 1, 1), 1 / 3))  # red becomes green
    torch.testing.assert_close(third, images.roll(1, 1), rtol=1e-4, atol=1e-5)
    flat = torch.full((1, 3, 12, 16), 0.3)
    torch.testing.assert_close(blur(flat, torch.full((1, 1, 1, 1), 2.0)), flat)
