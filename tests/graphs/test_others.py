"""Hugging Face's ViTMAE in a graphed step, as it is and accelerated."""

from __future__ import annotations

import pytest
import torch

import maefast
from tests.graphs.common import adamw
from tests.graphs.common import taped as taped

transformers = pytest.importorskip("transformers")
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64, "patch_size": 8, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
}  # fmt: skip


def vitmae(accelerated: bool):
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SMALL, norm_pix_loss=True)).train()
    return maefast.accelerate(model, repair_positions=True) if accelerated else model


@pytest.mark.parametrize("accelerated", [False, True])
def test_vitmae(taped, accelerated):
    model, other = vitmae(accelerated), vitmae(accelerated)
    optimizer, second = adamw(model), adamw(other)
    data = torch.randn(6, 2, 3, 32, 32)
    torch.manual_seed(5)
    wanted = []
    for images in data:
        optimizer.zero_grad()
        loss = model(pixel_values=images).loss
        loss.backward()
        optimizer.step()
        wanted.append(loss.detach())
    torch.manual_seed(5)
    step = maefast.graphed_step(other, second)
    found = [step(pixel_values=images) for images in data]
    assert step.captured
    assert all(map(torch.equal, found, wanted))
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
