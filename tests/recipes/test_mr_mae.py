from __future__ import annotations

import pytest
import torch

from maefast import models, recipes
from maefast.data.images.batch import ImageBatch
from maefast.recipe import View
from tests.recipes.common import RecipeTests, equal_to_reference

DECODER = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
TOY = {"teacher": "random", "embed_dim": 16, "depth": 2, "num_heads": 2, **DECODER}


class TestMRMAE(RecipeTests):
    name = "mr_mae"
    toy = {**TOY, "backbone": "mcmae", "img_size": 64, "patch_size": 16, "conv_dims": [4, 6], "conv_depths": [1, 1]}
    run = {"img_size": 64, "patch_size": 16}
    taught = True

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        shape = size, 3, *recipe.wants.size
        return ImageBatch(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))

    def plain(self, **changes):
        return self.make(backbone="vit", img_size=32, patch_size=8, **changes)

    @pytest.mark.parametrize(
        "changes",
        [
            {"fused": [0], "mask": "attention", "weight": 0.3, "norm_pix": False},
            {"fused": [1, 0], "mask": "salient", "teacher_at": 0, "conv_mlp_ratio": 2.0},
        ],
    )
    @pytest.mark.parametrize("backbone", ["vit", "mcmae"])
    def test_variants(self, backbone, changes):
        recipe = self.make(backbone=backbone, **changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_a_plain_vit(self):
        recipe = self.plain(mask_ratio=0.6)
        view = recipe.view(self.batch(recipe), seed=1)
        equal_to_reference(recipe, view, self.reference)
        assert (view.plan.keep, view.plan.hide) == (6, 10)

    @pytest.mark.parametrize(("norm", "loss"), [("layernorm", "smooth_l1"), ("l2", "l1"), ("none", "cosine")])
    def test_other_distances(self, norm, loss):
        recipe = self.plain(mimic_norm=norm, mimic_loss=loss)
        view = recipe.view(self.batch(recipe), seed=1)
        mine, theirs = recipe(view).pred[1], view.target
        if norm == "layernorm":
            theirs = torch.nn.functional.layer_norm(theirs, (16,), eps=1e-6)
            want = torch.nn.functional.smooth_l1_loss(mine, theirs)
        else:
            mine, theirs = (x / x.norm(dim=2, keepdim=True) for x in (mine, theirs))
            want = (mine - theirs).abs().mean() if loss == "l1" else (1 - (mine * theirs).sum(2)).mean()
        torch.testing.assert_close(recipe(view).terms["mimic"], want, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("backbone", ["vit", "mcmae"])
    def test_hidden_pixels_reach_no_latent(self, backbone):
        recipe = self.make(backbone=backbone, fused=[0])
        view = recipe.view(self.batch(recipe), seed=1)
        hidden = view.plan.mask.view(3, 1, *recipe.grid).repeat_interleave(16, 2).repeat_interleave(16, 3)
        other = torch.where(hidden, torch.randn_like(view.parts), view.parts)
        one, two = (recipe(View(images, view.plan, view.target)) for images in (view.parts, other))
        assert torch.equal(*(recipe.latents(images, view.plan) for images in (view.parts, other)))
        assert one.terms["mimic"] == two.terms["mimic"]
        assert one.terms["pixels"] != two.terms["pixels"]

    def test_what_each_term_teaches(self):
        recipe = self.make(fused=[0])
        terms = recipe(self.batch(recipe)).terms
        terms["mimic"].backward(retain_graph=True)
        assert all(p.grad is None or not p.grad.any() for p in recipe.decoder.parameters())
        assert recipe.head.weight.grad.any()
        assert recipe.encoder.patch_embed1.proj.weight.grad.any()
        recipe.zero_grad()
        terms["pixels"].backward()
        assert recipe.head.weight.grad is None
        assert recipe.decoder.pred.weight.grad.any()

    def test_features_are_those_of_visible_patches(self):
        recipe = self.plain()
        view = recipe.view(self.batch(recipe), seed=1)
        whole = recipe.taught(view.parts)[0][:, 1:]
        for features, target, keep in zip(whole, view.target, view.plan.ids_keep):
            assert torch.equal(features[keep], target)

    def test_focus(self):
        """The teacher's class token looks at four patches alone."""
        for mask in ("salient", "attention", "random"):
            recipe = self.plain(mask=mask)
            looks = torch.full((3, 16), 1e-9, dtype=torch.double)
            looks[:, [1, 5, 6, 9]] = 1.0
            states = recipe.taught(recipe.images(self.batch(recipe)))[0]
            recipe.taught = lambda images, found=(states, looks): found
            keep = recipe.view(self.batch(recipe), seed=1).plan.ids_keep.sort(1)[0].tolist()
            assert (keep == [[1, 5, 6, 9]] * 3) == (mask != "random")

    def test_weights_of_an_mae_are_enough(self, tmp_path):
        """Public checkpoints of MAE and ConvMAE know neither the head nor the fusion."""
        for make in (self.make, self.plain):
            one, two = make(), make(fused=[1])
            weights = {k: v for k, v in recipes.public_weights(one).items() if not k.startswith("head.")}
            assert "decoder_pred.weight" in weights
            torch.save({"model": weights}, tmp_path / "mae.pth")
            with torch.no_grad():
                two.decoder.pred.weight.zero_()
            head = two.head.weight.clone()
            recipes.load_weights(two, tmp_path / "mae.pth")
            assert torch.equal(two.decoder.pred.weight, one.decoder.pred.weight)
            assert torch.equal(two.head.weight, head)
        model = models.create("mae", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, **DECODER)
        torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
        recipes.load_weights(two, tmp_path / "mae.pth")
        assert torch.equal(two.encoder.norm.weight.float(), model.norm.weight)

    def test_features(self):
        recipe, plain = self.make(), self.plain()
        assert recipe.encode(self.batch(recipe)).shape == (3, 16, 16)
        assert plain.encode(self.batch(plain)).shape == (3, 17, 16)

    def test_teachers(self):
        recipe = recipes.create("mr_mae", **{**self.toy, "teacher": None})
        with pytest.raises(ValueError, match="MRMAE needs a teacher"):
            recipe(self.batch(recipe))
        with pytest.warns(UserWarning, match="the teacher has RANDOM weights"):
            self.make()
        teacher = models.create("mae", img_size=64, patch_size=8, embed_dim=24, depth=3, num_heads=2)
        other = self.make(teacher=teacher)
        assert other.head.out_features == 24
        with pytest.raises(ValueError, match="teacher has 64 patches, the student 4x4"):
            other(self.batch(other))
        with pytest.raises(ValueError, match="teacher_at must name one of 3 blocks, got 3"):
            self.make(teacher=teacher, teacher_at=3)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"backbone": "swin"}, "backbone must be"),
            ({"mask": "block"}, "mask must be"),
            ({"mimic_norm": "batch"}, "mimic_norm must be"),
            ({"mimic_loss": "l2"}, "mimic_loss must be"),
            ({"patch_size": 8}, "patch_size must be 16 with the backbone mcmae"),
            ({"fused": [2]}, "fused must name some of 2 blocks"),
            ({"fused": [0, 0]}, "each once"),
            ({"mask_ratio": 0.98}, "mask_ratio 0.98 leaves 0 of 16 tokens visible"),
        ],
    )
    def test_bad_arguments(self, changes, message):
        with pytest.raises(ValueError, match=message):
            self.make(**changes)
