from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from maefast import models, recipes
from maefast.bench.peers.plain import blocks, parameters
from maefast.bench.peers.recipes.dmae import encoder_input
from maefast.data.images.batch import ImageBatch
from maefast.errors import ConfigError
from maefast.nn.teachers import Frozen
from maefast.train import PretrainConfig, pretrain
from tests.recipes.common import RecipeTests, equal_to_reference

STUDENT = {
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
TEACHER = {
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


class TestDMAE(RecipeTests):
    name = "dmae"
    toy = {
        "teacher": "random", "img_size": 32, "patch_size": 8, "at": 1, "teacher_at": 2, "student_args": STUDENT,
        "teacher_args": TEACHER,
    }  # fmt: skip
    run = {"img_size": 32, "patch_size": 8}
    taught = True

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        return ImageBatch(torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator))

    @pytest.mark.parametrize("changes", [{"norm_pix": True}, {"mask_ratio": 0.9}, {"weight": 3.0}, {"at": 2}])
    def test_variants(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_the_teacher_stops_and_sees_the_same_patches(self):
        recipe = self.make()
        teacher = recipe.teacher.module
        seen = []
        for index, block in enumerate(teacher.blocks):
            block.register_forward_hook(lambda *_, index=index: seen.append(index))
        view = recipe.view(self.batch(recipe), seed=1)
        assert seen == [0, 1, 2]
        p = parameters(teacher)
        x = encoder_input(p, "", view.parts, (8, 8))
        x = torch.cat([x[:, :1], x[:, 1:].gather(1, view.plan.ids_keep[..., None].expand(-1, -1, 32))], 1)
        want = blocks(x, p, "blocks.", 4)[2]
        torch.testing.assert_close(view.target, want, rtol=1e-10, atol=1e-10)
        assert not view.target.requires_grad

    def test_the_teacher_is_not_trained_nor_saved(self):
        recipe = self.make()
        teacher = recipe.teacher.module
        mine = {id(parameter) for parameter in recipe.parameters()}
        assert not mine & {id(parameter) for parameter in teacher.parameters()}
        assert not any(name.startswith("teacher") for name in recipe.state_dict())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        recipe.train()
        assert not teacher.training
        recipe.float()
        assert teacher.pos_embed.dtype is torch.float32
        assert "teacher" not in {name for name, _ in recipe.named_modules()}

    def test_a_teacher_from_a_file(self, tmp_path):
        source = models.create("mae", img_size=32, patch_size=8, **TEACHER)
        torch.save({"model": source.state_dict()}, tmp_path / "teacher.pth")
        made = self.make(teacher=str(tmp_path / "teacher.pth"), teacher_model="mae")
        assert torch.equal(made.teacher.module.blocks[2].mlp.fc1.weight, source.blocks[2].mlp.fc1.weight.double())
        assert made.config["teacher"].endswith("teacher.pth")
        given = self.make(teacher=source)
        assert "teacher" not in given.config
        assert given.head.out_features == 32

    def test_three_visible_patches(self):
        with torch.device("meta"):
            recipe = recipes.create("dmae", mask_ratio=0.98)
        assert recipe.head.weight.shape == (1024, 768)
        images, noise = torch.zeros(1, 3, 224, 224), torch.rand(1, 196)
        from maefast import seeds

        plan = recipe.plan(images, seeds.Draw(0, [0]), 196, 0.98)
        assert plan.keep == 3
        assert noise.shape[1] == recipe.student.num_patches

    def test_without_a_teacher(self, tmp_path):
        recipe = recipes.create("dmae", img_size=32, patch_size=8, student_args=STUDENT, at=1)
        assert recipe.encode(self.batch(recipe)).shape == (3, 17, 16)
        with pytest.raises(ValueError, match="DMAE needs a teacher"):
            recipe(self.batch(recipe))
        with pytest.raises(ConfigError, match="the recipe 'dmae' needs a teacher"):
            pretrain(PretrainConfig(recipe="dmae", data="demo", output_dir=str(tmp_path), device="cpu"))

    def test_refusals(self):
        with pytest.raises(ValueError, match="at must name one of 3 blocks"):
            self.make(at=3)
        with pytest.raises(ValueError, match="teacher_at must name one of 4 blocks"):
            self.make(teacher_at=4)
        with pytest.raises(TypeError, match=r"teacher must be a mae_. model, got Linear without states, config"):
            self.make(teacher=nn.Linear(2, 2))
        with pytest.raises(TypeError, match="teacher must be a module, a file or 'random', got int"):
            self.make(teacher=3)
        with pytest.raises(ValueError, match=r"teacher has a grid of \(8, 8\) patches, the student one of \(4, 4\)"):
            self.make(teacher=models.create("mae", img_size=64, patch_size=8, **TEACHER))
        with pytest.warns(UserWarning, match="the teacher has RANDOM weights") as caught:
            recipe = self.make()
        (told,) = caught
        assert len(warnings.formatwarning(told.message, told.category, told.filename, told.lineno).splitlines()) == 1
        with pytest.raises(ValueError, match=r"images must be uint8 or uint16 \[B, 3, 32, 32\]"):
            recipe(ImageBatch(torch.zeros(2, 3, 32, 24, dtype=torch.uint8)))


def test_a_frozen_network():
    teacher = Frozen(nn.Sequential(nn.Linear(2, 3), nn.Dropout()).train())
    x = torch.ones(1, 2, requires_grad=True)
    assert torch.equal(teacher(x), teacher(x))
    assert not teacher(x).requires_grad
