from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.peers.recipes.g2sd import decoder_states
from maefast import models, recipes
from maefast.bench.peers.plain import parameters
from maefast.data.images.batch import ImageBatch
from tests.recipes.common import RecipeTests, equal_to_reference

NAMES = ("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
STUDENT, TEACHER = (dict(zip(NAMES, sizes)) for sizes in ((16, 2, 2, 8, 2, 2), (32, 2, 4, 16, 3, 2)))


class TestG2SD(RecipeTests):
    name = "g2sd"
    toy = {
        "teacher": "random", "img_size": 32, "patch_size": 8, "teacher_at": 1, "student_args": STUDENT,
        "teacher_args": TEACHER,
    }  # fmt: skip
    run = {"img_size": 32, "patch_size": 8}
    taught = True

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        return ImageBatch(torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator))

    @pytest.mark.parametrize("changes", [{"rows": "masked"}, {"beta": 0.5}, {"teacher_at": 2}])
    def test_variants(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_the_teacher_stops_and_sees_the_same_patches(self):
        recipe = self.make()
        teacher, seen = recipe.teacher.module, []
        for index, block in enumerate(teacher.decoder_blocks):
            block.register_forward_hook(lambda *_, index=index: seen.append(index))
        view = recipe.view(self.batch(recipe), seed=1)
        assert seen == [0, 1]
        want = decoder_states(parameters(teacher), "", teacher, view.parts, view.plan.ids_keep, view.plan.ids_restore)
        torch.testing.assert_close(view.target, want[1], rtol=1e-10, atol=1e-10)
        masked = self.make(rows="masked")
        other = masked.view(self.batch(masked), seed=1)
        rows = view.target[:, 1:].gather(1, other.plan.ids_masked[..., None].expand(-1, -1, 16))
        torch.testing.assert_close(other.target, rows)

    def test_the_teacher_itself_has_no_loss(self):
        teacher = models.create("mae", img_size=32, patch_size=8, **{**STUDENT, "decoder_depth": 3}).double()
        recipe = self.make(teacher=teacher)
        own = {name: value for name, value in teacher.state_dict().items() if not name.startswith("decoder_blocks.2")}
        recipe.student.load_state_dict(own)
        recipe.head = nn.LayerNorm(8, eps=1e-6, elementwise_affine=False)
        loss = recipe(self.batch(recipe)).loss
        assert loss < 1e-20

    def test_a_teacher_from_a_file(self, tmp_path):
        source = models.create("mae", img_size=32, patch_size=8, **TEACHER)
        torch.save({"model": source.state_dict()}, tmp_path / "teacher.pth")
        made = self.make(teacher=str(tmp_path / "teacher.pth"), teacher_model="mae")
        weight = source.decoder_blocks[1].mlp.fc1.weight
        assert torch.equal(made.teacher.module.decoder_blocks[1].mlp.fc1.weight, weight.double())

    def test_refusals(self):
        with pytest.raises(ValueError, match="teacher_at must name one of 3 blocks"):
            self.make(teacher_at=3)
        with pytest.raises(TypeError, match="got Linear without encode_visible, decoder_states, config"):
            self.make(teacher=torch.nn.Linear(2, 2))
        with pytest.raises(ValueError, match="teacher has a grid of"):
            self.make(teacher=models.create("mae", img_size=64, patch_size=8, **TEACHER))
        with pytest.raises(ValueError, match="rows must be"):
            self.make(rows="some")
        recipe = recipes.create("g2sd", img_size=32, patch_size=8, student_args=STUDENT)
        assert recipe.encode(self.batch(recipe)).shape == (3, 17, 16)
        with pytest.raises(ValueError, match="G2SD needs a teacher"):
            recipe(self.batch(recipe))
