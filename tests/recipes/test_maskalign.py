from __future__ import annotations

import pytest
import torch

from maefast import models, recipes
from maefast.bench.peers.plain import blocks, linear, norm, parameters
from maefast.bench.peers.recipes.dmae import encoder_input
from maefast.data.images.batch import ImageBatch
from maefast.nn.teachers import ImageTeacher
from tests.recipes.common import RecipeTests, equal_to_reference


class TestMaskAlign(RecipeTests):
    name = "maskalign"
    toy = {
        "teacher": "random", "img_size": 32, "patch_size": 8, "layers": 2, "embed_dim": 16, "depth": 4, "num_heads": 2,
        "drop_path": 0.0,
    }  # fmt: skip
    run = {"img_size": 32, "patch_size": 8}
    taught = mask_of_teacher = True

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        return ImageBatch(torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator))

    @pytest.mark.parametrize("changes", [{"mask": "random"}, {"layers": 4}, {"mask_ratio": 0.9}])
    def test_variants(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_a_gradient_reaches_every_block(self):
        recipe = self.make(layers=1)
        with torch.no_grad():
            recipe.mix.copy_(torch.eye(4) + 0.01)
        recipe(self.batch(recipe)).loss.backward()
        for block in recipe.encoder.blocks:
            assert block.mlp.fc1.weight.grad.abs().max() > 0
        assert recipe.mix.grad[-1].abs().min() > 0
        assert all(p.grad is not None for p in recipe.parameters() if p.requires_grad)  # or DDP would wait for it

    def test_the_mask_follows_the_teacher(self):
        recipe = self.make(mask_ratio=0.7)
        looks = torch.zeros(3, 16)
        looks[:, [1, 5, 6, 9]] = 1.0
        states = recipe.teacher.module(recipe.images(self.batch(recipe)), range(2, 4))[0]
        recipe.teacher = lambda images, at: (states, looks)
        view = recipe.view(self.batch(recipe), seed=1)
        assert view.plan.ids_keep.sort(1).values.tolist() == [[1, 5, 6, 9]] * 3

    def test_without_a_teacher(self):
        recipe = recipes.create("maskalign", img_size=32, patch_size=8, embed_dim=16, depth=5, num_heads=2)
        assert recipe.encode(self.batch(recipe)).shape == (3, 17, 16)
        with pytest.raises(ValueError, match="MaskAlign needs a teacher"):
            recipe(self.batch(recipe))
        with pytest.raises(ValueError, match="layers must lie in 1 to 4"):
            self.make(layers=5)
        with pytest.raises(TypeError, match="a teacher is a mae_"):
            self.make(teacher=torch.nn.Linear(2, 2))
        with pytest.raises(ValueError, match="a teacher of 2 blocks for a student of 4"):
            self.make(teacher=models.create("mae", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2))
        with pytest.raises(TypeError, match="teacher must be a module, a name or folder, or 'random', got int"):
            self.make(teacher=3)
        other = self.make(teacher=models.create("mae", img_size=32, patch_size=4, embed_dim=16, depth=4, num_heads=2))
        with pytest.raises(ValueError, match="teacher has 64 patches, the student 4x4"):
            other(self.batch(other))
        with pytest.warns(UserWarning, match="the teacher has RANDOM weights"):
            self.make()
        with pytest.raises(ValueError, match="two blocks at least, got 1"):
            self.make(teacher=models.create("mae", img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2))


def test_where_our_own_teacher_looks():
    torch.manual_seed(0)
    model = models.create("mae", img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    states, looks = ImageTeacher(model)(images, (0, 2))
    p = parameters(model)
    want = blocks(encoder_input(p, "", images, (8, 8)), p, "blocks.", 2)
    for mine, theirs in zip(states, (want[0], want[2])):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    qkv = linear(norm(want[1], p, "blocks.2.norm1"), p, "blocks.2.attn.qkv").unflatten(-1, (3, 2, 8))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    full = (q @ k.transpose(2, 3) * 8**-0.5).softmax(-1).mean(1)
    torch.testing.assert_close(looks, full[:, 0, 1:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "ViTModel"])
def test_where_a_teacher_of_transformers_looks(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
        "patch_size": 8, "attn_implementation": "eager",
    }  # fmt: skip
    config = getattr(transformers, kind.replace("Model", "Config"))(**sizes)
    model = getattr(transformers, kind)(config).eval()
    images = torch.randn(2, 3, 32, 32)
    states, looks = ImageTeacher(model)(images, (1, 2))
    if kind == "CLIPVisionModel":
        mean, std = (torch.tensor(n).view(3, 1, 1) for n in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        low, wide = (
            torch.tensor(n).view(3, 1, 1)
            for n in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        )
        images = (images * std + mean - low) / wide
    want = model(pixel_values=images, output_hidden_states=True, output_attentions=True)
    for mine, theirs in zip(states, want.hidden_states[2:]):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(looks, want.attentions[-1][:, :, 0, 1:].mean(1))
