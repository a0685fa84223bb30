"""Other people's models, as they are and accelerated, and recipes."""

from __future__ import annotations

import copy

import pytest
import torch

import maefast
from maefast import recipes
from maefast.integrations import _worth
from maefast.profiling import profile
from tests.profiling.common import patient


@pytest.fixture
def vitmae():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=64, patch_size=8,
        decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
    )  # fmt: skip
    model = transformers.ViTMAEForPreTraining(config)
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.normal_()
        model.decoder.decoder_pos_embed.normal_()
    return model


@pytest.mark.parametrize("accelerated", [False, True])
@patient
def test_vitmae(vitmae, accelerated):
    model = maefast.accelerate(copy.deepcopy(vitmae)) if accelerated else vitmae
    images = torch.randn(8, 3, 64, 64)
    with _worth.always():
        report = profile(lambda: model(images).loss.backward(), model, steps=2)
    for name in ("mask", "embed", "encoder attention", "encoder MLP", "encoder norms", "decoder attention",
                 "decoder MLP", "decoder norms", "loss"):  # fmt: skip
        assert report.stage(name).forward > 0, name
        assert name == "mask" or report.stage(name).backward > 0, name
    if accelerated:
        assert report.stage("restore").backward > 0
        ran = str(maefast.report(model)).partition("calls since then")[2]
        assert "ran fast 7 times" in ran  # two to warm up, two timed, three recorded
        assert "own code" not in ran.partition("compared")[0]
    assert sum(stage.share for stage in report.stages if stage.name in ("other", "autograd")) < 0.35


def test_that_a_model_can_be_accelerated_is_seen(vitmae):
    from maefast.profiling.summary import replaceable

    assert replaceable(vitmae)
    assert not replaceable(maefast.accelerate(vitmae))
    assert not replaceable(torch.nn.Linear(1, 1))
    assert not replaceable(maefast.models.create("mae_tiny", img_size=32))


@patient
def test_a_recipe():
    from maefast.data.points import PointBatch

    torch.manual_seed(0)
    recipe = recipes.create("point_mae", points=64, groups=8, group_size=8, embed_dim=32, depth=1, num_heads=2,
                            decoder_depth=1, decoder_num_heads=2)  # fmt: skip
    batch = PointBatch(torch.rand(2, 64, 3))
    report = profile(lambda: recipe(batch).loss.backward(), recipe, steps=2)
    for name in (
        "prepare",
        "mask",
        "embed",
        "encoder attention",
        "encoder MLP",
        "restore",
        "decoder attention",
        "loss",
    ):
        assert report.stage(name).forward > 0, name
