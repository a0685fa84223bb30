"""Mixup, CutMix, smoothed targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maefast.finetune.mix import mix, soft_targets
from maefast.finetune.recipe import cross_entropy
from maefast.seeds import Draw


def constant(batch: int = 4, size: tuple[int, int] = (12, 20)) -> tuple[torch.Tensor, torch.Tensor]:
    """Image i is i everywhere, and its class is i."""
    images = torch.arange(batch, dtype=torch.float64).view(-1, 1, 1, 1).expand(batch, 2, *size).clone()
    return images, soft_targets(torch.arange(batch), batch, 0.0, torch.float64)


@pytest.mark.parametrize("kind", ["mixup", "cutmix", "both"])
def test_images_and_targets_have_the_same_shares(kind):
    images, targets = constant()
    before = images.clone()
    seen = set()
    for seed in range(40):
        how = {"mixup": 0.8 if kind != "cutmix" else 0.0, "cutmix": 1.0 if kind != "mixup" else 0.0}
        mixed, soft = mix(images, targets, np.random.default_rng(seed), **how)
        share = soft[0, 0].item()
        for i in range(4):
            assert mixed[i].mean().item() == pytest.approx(share * i + (1 - share) * (3 - i))
            assert soft[i, i].item() == pytest.approx(share)
            assert soft[i, 3 - i].item() == pytest.approx(1 - share)
        values = set(mixed[0].unique().tolist())
        seen.add("cutmix" if values <= {0.0, 3.0} and len(values) == 2 else "mixup")
    assert torch.equal(images, before)
    assert (kind == "both" and seen == {"mixup", "cutmix"}) or kind in seen


def test_the_odd_one_in_the_middle_is_mixed_with_itself():
    images, targets = constant(3)
    mixed, soft = mix(images, targets, np.random.default_rng(0), 0.8, 0.0)
    torch.testing.assert_close(mixed[1], images[1])
    torch.testing.assert_close(soft[1], targets[1])


def test_without_either_nothing_changes():
    images, targets = constant()
    assert mix(images, targets, np.random.default_rng(0), 0.0, 0.0) == (images, targets)


def test_smoothed_targets_are_those_of_torch():
    logits, labels = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 4, 2, 2, 1, 3])
    mine = cross_entropy(logits, soft_targets(labels, 5, 0.1, torch.float64))
    torch.testing.assert_close(mine, F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_what_a_batch_shares_is_a_function_of_its_first_place():
    one, two, three = (Draw(3, key).shared("mix").random() for key in ([7, 8], [7, 9], [8, 7]))
    assert one == two != three
