from __future__ import annotations

import pytest
import torch
from torch import nn

from maefast import models, recipes
from maefast.data.images.batch import ImageBatch
from maefast.data.images.smooth import with_square
from maefast.models.perceptual import PerceptualMAE
from maefast.nn import QFormer
from tests.recipes.common import RecipeTests, equal_to_reference

_TINY = {"embed_dim": 16, "depth": 3, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1,
         "decoder_num_heads": 2, "patch_size": 8}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the teacher has RANDOM weights")
class TestQFormerAE(RecipeTests):
    name = "q_former_ae"
    demo_share = 0.7
    toy = {
        "backbone": "random", "backbone_args": _TINY, "metric": "random", "metric_args": _TINY, "at": [-2, 2],
        "loss_patches": [8, 16], "loss_at": [0, 1], "map_patches": [4, 8], "map_at": [1, 2], "img_size": 32,
        "patch_size": 8, "embed_dim": 16, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 2,
        "decoder_num_heads": 2, "registers": 2,
    }  # fmt: skip
    run = {"img_size": 32, "patch_size": 8}
    taught = True

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        return ImageBatch(torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator))

    @pytest.mark.parametrize(
        "changes", [{"depth": 3}, {"causal": False}, {"registers": 0, "pixels": 0.5}, {"patch_size": 4, "at": [1]}]
    )
    def test_variants(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_a_batch_is_prepared_by_the_recipe(self):
        """Nothing is random here."""
        recipe = self.make()
        batch = self.batch(recipe)
        assert torch.equal(recipe(recipe.view(batch, seed=5)).loss, recipe(recipe.view(batch, seed=6)).loss)

    def test_frozen_networks_are_no_part_of_it(self):
        recipe = self.make()
        assert not [name for name in recipe.state_dict() if "metric" in name or "backbone" in name]
        before = [parameter.clone() for parameter in recipe.metric.module.parameters()]
        recipe(self.batch(recipe)).loss.backward()
        assert all(parameter.grad is None for parameter in recipe.metric.module.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, recipe.metric.module.parameters()))

    def test_samples_do_not_see_each_other(self):
        recipe = self.make()
        batch = self.batch(recipe)
        view = recipe.view(batch, seed=1)
        alone = torch.cat([recipe(recipe.view(ImageBatch(batch.images[i : i + 1]), seed=1)).pred for i in range(3)])
        torch.testing.assert_close(recipe(view).pred, alone, rtol=1e-9, atol=1e-9)

    def test_maps_of_anomalies(self):
        recipe = self.make()
        images = recipe.images(self.batch(recipe))
        maps, rebuilt = recipe.anomalies(images)
        assert maps.shape == (3, 32, 32)
        assert rebuilt.shape == images.shape
        assert (maps > 0).all()

    def test_public_names(self):
        public = recipes.public_weights(self.make())
        for name in ("encoders.0.final_projection.weight", "junction.queries", "junction.blocks.0.attn.Wqkv.weight",
                     "junction.blocks.0.cross_attn.to_out.1.bias", "decoder.decoder_blocks.1.mlp.fc2.weight",
                     "decoder.decoder_prediction.bias", "decoder.reg_tokens"):  # fmt: skip
            assert name in public

    def test_a_backbone_of_transformers(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.Dinov2Config(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
        )
        torch.manual_seed(0)
        model = transformers.Dinov2Model(config).eval()
        recipe = recipes.create(self.name, **{**self.toy, "backbone": model, "at": [0, -1]})
        images = recipe.images(self.batch(recipe))
        found = recipe.view(self.batch(recipe), seed=1).target["features"]
        states = model(images, output_hidden_states=True).hidden_states
        torch.testing.assert_close(found, torch.cat([states[1], states[3]], 1))
        assert recipe(self.batch(recipe)).loss.isfinite()

    def test_refusals(self):
        recipe = self.make(metric=None, backbone=None)
        with pytest.raises(ValueError, match="needs backbone and metric: backbone=FILE"):
            recipe(self.batch(recipe))
        for changes, error, reason in (
            ({"at": [3]}, ValueError, "at must name some of the backbone's 3 blocks"),
            ({"loss_at": [3]}, ValueError, "loss_at must name one of 3 blocks"),
            ({"map_patches": [5]}, ValueError, "patch_sizes must divide images"),
            ({"backbone": nn.Linear(2, 2)}, TypeError, "backbone must be a mae_\\* model or a ViT of transformers"),
            ({"num_heads": 3}, ValueError, "multiple of the number of heads"),
            ({"depth": 0}, ValueError, "at least one block and one query"),
        ):
            with pytest.raises(error, match=reason):
                self.make(**changes)


def test_the_metric_is_the_mae_at_its_own_patch_size():
    torch.manual_seed(0)
    model = models.create("mae", img_size=32, **_TINY).double().eval()
    metric = PerceptualMAE(model, (4, 8), (0, 2)).double()
    images, other = torch.randn(2, 2, 3, 32, 32).double()
    for found, wanted in zip(metric.states(images, 8, (0, 2)), model.states(images, at=(0, 2))):
        torch.testing.assert_close(found, wanted[:, 1:], rtol=1e-12, atol=1e-12)
    target = metric(images, (4, 8), (0, 2))
    assert [tuple(state.shape) for states in target for state in states] == [(2, 64, 16)] * 2 + [(2, 16, 16)] * 2
    same, images = images, images.clone().requires_grad_()
    assert metric.maps(same, target, (4, 8), (0, 2)).abs().max() < 1e-12
    other.requires_grad_()
    metric.maps(other, metric(images, (4, 8), (0, 2)), (4, 8), (0, 2)).mean().backward()
    assert other.grad.abs().sum() > 0
    assert images.grad is None  # to what is rebuilt alone


def test_queries_look_at_nothing_if_all_that_is_there_says_so():
    """A context that no query likes leaves the learned null value."""
    torch.manual_seed(0)
    attention = QFormer(16, 4, 2, head_dim=8).blocks[0].cross_attn.double()
    queries, context = torch.randn(1, 4, 16).double(), torch.zeros(2, 5, 16).double()
    with torch.no_grad():
        attention.null_kv[0] = 0
        found = attention(queries, context)  # six equal scores, five values of zero
        null = attention.null_kv[1].repeat(2) / 6
        want = attention.to_out(null.expand(2, 4, -1))
    torch.testing.assert_close(found, want)


def test_causal_queries():
    torch.manual_seed(0)
    former = QFormer(16, 4, 2, head_dim=8, causal=True).double().eval()
    context = torch.randn(2, 5, 16).double()
    with torch.no_grad():
        before = former(context)
        former.queries[:, 2] += 1
        changed = (former(context) - before).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False, False, True, True]


def test_squares():
    images = torch.zeros(3, 3, 30, 40)
    found, where = with_square(images, torch.ones(3, 1, 1))
    assert where.sum((1, 2)).tolist() == [36] * 3
    assert torch.equal(found[:, 0] == 1, where)
