"""Layer decay against the rules of the authors' code, and the published values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maefast import models
from maefast.finetune.classifier import classifier_of
from maefast.finetune.layers import layers_of, parameter_groups, published
from maefast.models.convnext import SIZES, ConvNeXt
from maefast.models.resnet import ResNet
from maefast.train.schedule import make_optimizer
from tests.finetune.test_classifier import tiny


def scales(network: nn.Module, decay: float) -> dict[str, tuple[float, float]]:
    """(factor of the learning rate, weight decay) by name."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = parameter_groups(network, 0.05, decay)
    found = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert sum(len(group["params"]) for group in groups) == len(found) == len(names)
    return found


def test_a_vit():
    """MAE: decay ** (depth + 1 - i), i = 0 for what makes tokens, and the number of the block, from 1."""
    found = scales(classifier_of(tiny("mae"), 5), 0.5)
    assert found["patch_embed.proj.weight"] == (0.5**4, 0.05)
    assert found["cls_token"] == found["pos_embed"] == found["patch_embed.proj.bias"] == (0.5**4, 0.0)
    for i in range(3):
        assert found[f"blocks.{i}.attn.qkv.weight"] == (0.5 ** (3 - i), 0.05)
        assert found[f"blocks.{i}.norm1.weight"] == (0.5 ** (3 - i), 0.0)
    assert found["head.weight"] == (1.0, 0.05)
    assert found["fc_norm.weight"] == found["head.bias"] == (1.0, 0.0)


def test_a_short_convnext():
    """ConvNeXt V2's "single": a block a layer, the downsampling with the block behind it."""
    net = ConvNeXt((1, 2, 3, 1), (8, 8, 8, 8), num_classes=3)
    layers, last = layers_of(net)
    assert last == 8
    expected = {"downsample_layers.0.0.weight": 1, "stages.0.0.dwconv.weight": 1, "downsample_layers.1.1.weight": 2,
                "stages.1.0.grn.gamma": 2, "stages.1.1.norm.bias": 3, "downsample_layers.2.0.weight": 4,
                "stages.2.2.pwconv1.weight": 6, "downsample_layers.3.1.bias": 7, "stages.3.0.pwconv2.bias": 7,
                "norm.weight": 8, "head.weight": 8}  # fmt: skip
    assert {name: layers[name] for name in expected} == expected
    found = scales(net, 0.9)
    assert found["head.weight"] == (1.0, 0.05)
    assert found["stages.3.0.pwconv1.weight"] == (pytest.approx(0.9), 0.05)
    assert found["stages.1.0.grn.gamma"] == (pytest.approx(0.9**6), 0.0)  # [1, 1, 1, C], and no matrix


def test_a_long_convnext():
    """ConvNeXt V2's "group": twelve layers, three blocks of the third stage in one."""
    with torch.device("meta"):
        layers, last = layers_of(ConvNeXt(SIZES["base"][0], (8, 8, 8, 8), num_classes=3))
    assert last == 13
    expected = {"downsample_layers.0.0.weight": 0, "stages.0.2.norm.bias": 1, "downsample_layers.1.1.weight": 2,
                "stages.1.0.norm.bias": 2, "downsample_layers.2.0.weight": 3, "stages.2.0.norm.bias": 3,
                "stages.2.5.norm.bias": 4, "stages.2.26.norm.bias": 11, "downsample_layers.3.1.bias": 12,
                "stages.3.0.norm.bias": 12, "norm.weight": 13, "head.bias": 13}  # fmt: skip
    assert {name: layers[name] for name in expected} == expected


def test_no_layer_learns_faster_than_the_head():
    with torch.device("meta"):
        layers, last = layers_of(ConvNeXt((3, 3, 36, 3), (8, 8, 8, 8), num_classes=3))
    assert (max(layers.values()), last) == (13, 13)
    assert [layers[f"stages.2.{block}.norm.bias"] for block in (26, 27, 35)] == [11, 12, 12]


def test_only_a_long_third_stage_is_grouped():
    with torch.device("meta"):
        layers, last = layers_of(ConvNeXt((12, 1, 2, 1), (8, 8, 8, 8), num_classes=3))
    assert last == 17
    assert [layers[f"stages.0.{block}.norm.bias"] for block in (0, 11)] == [1, 12]


def test_a_resnet():
    layers, last = layers_of(ResNet((1, 2, 1, 1), width=8, num_classes=3))
    assert last == 6
    assert [layers[name] for name in ("conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer2.1.bn3.weight",
                                      "layer4.0.downsample.0.weight", "fc.bias")] == [0, 0, 1, 3, 5, 6]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments", "source"),
    [
        ("mae_base", {}, "ViT-B"),
        ("mae_small", {}, "ViT-B"),
        ("mae_large", {"depth": 1, "decoder_depth": 1}, "ViT-L"),
        ("fcmae_convnextv2_pico", {}, "atto"),
        ("fcmae_convnextv2_tiny", {}, "tiny"),
        ("fcmae_convnextv2_huge", {}, "base"),
        ("spark_convnext_base", {}, "ConvNeXt-B"),
        ("spark_resnet50", {}, "ResNet-50"),
    ],
)
def test_published_values(name, arguments, source):
    with torch.device("meta"):
        found = published(models.create(name, **arguments))
    assert found.source.endswith(source)


def test_a_model_may_have_groups_of_its_own():
    class Own(nn.Linear):
        def parameter_groups(self, weight_decay):
            return [{"params": [self.weight], "weight_decay": weight_decay, "lr_scale": 0.5}]

    (group,) = make_optimizer(Own(2, 2), 0.1).param_groups
    assert (group["weight_decay"], group["lr_scale"]) == (0.1, 0.5)
