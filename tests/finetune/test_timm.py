"""Classifiers in timm's networks, where timm is installed."""

from __future__ import annotations

import pytest
import torch

from maefast import models
from maefast.finetune.classifier import classifier_of, head_of, timm_state


@pytest.mark.parametrize(
    ("ours", "theirs", "how"),
    [
        ("mae_tiny", "vit_tiny_patch16_224", {"img_size": 64, "global_pool": "avg"}),
        ("fcmae_convnextv2_atto", "convnextv2_atto", {"conv_mlp": False}),
        ("spark_convnext_tiny", "convnext_tiny", {}),
        ("spark_resnet50", "resnet50", {}),
    ],
)
def test_the_same_logits(ours, theirs, how):
    from tests.nn.test_cells_timm import timm  # skips without it

    torch.manual_seed(0)
    network = classifier_of(models.create(ours, img_size=64), 7).double().eval()
    head_of(network).weight.data.normal_()
    other = timm.create_model(theirs, num_classes=7, **how).double().eval()
    other.load_state_dict(timm_state(network), strict=True)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), other(images), rtol=1e-8, atol=1e-8)
