"""Learning rate, warm-up and parameter groups."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from maefast.models import create
from maefast.train import ConfigError, checkpoint, pretrain
from maefast.train.schedule import BETAS, Schedule, make_optimizer, parameter_groups, peak_lr, warmup_steps
from tests.train.common import TINY, in_two_parts, losses, rows, tiny_config


def test_table_worked_out_by_hand():
    # Peak 1, warm-up 4 of 12 steps, floor 0.2: 0, 1/4, 1/2, 3/4, then 0.2 + 0.4 (1 + cos(k pi / 8)).
    schedule = Schedule(peak=1.0, total=12, warmup=4, low=0.2)
    table = [0.0, 0.25, 0.5, 0.75, 1.0, 0.96955181, 0.88284271, 0.75307337, 0.6, 0.44692663, 0.31715729, 0.23044819]
    assert [schedule(step) for step in range(12)] == pytest.approx(table, abs=1e-8)
    assert schedule(12) == pytest.approx(0.2)


def test_without_warmup_the_first_step_has_the_peak():
    schedule = Schedule(peak=3e-4, total=4)
    assert [schedule(step) for step in range(4)] == pytest.approx([3e-4, 2.5606602e-4, 1.5e-4, 4.393398e-5])


def test_a_warmup_as_long_as_the_run():
    schedule = Schedule(peak=1.0, total=4, warmup=4)
    assert [schedule(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_batch_size_rule():
    assert peak_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)  # MAE's ViT-L on 64 GPUs
    assert peak_lr(1.5e-4, 64) == pytest.approx(3.75e-5)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.05, 10), (0.999, 200), (1, 1), (40, 40), (500, 200)])
def test_warmup_is_a_share_or_a_number_of_steps(warmup, steps):
    assert warmup_steps(warmup, 200) == steps


def test_groups_follow_mae():
    model = create("mae", img_size=16, patch_size=4, **TINY)
    no_decay, decay = parameter_groups(model, 0.05)
    assert (no_decay["weight_decay"], decay["weight_decay"]) == (0.0, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in decay["params"]}
    free = {names[id(parameter)] for parameter in no_decay["params"]}
    assert {"cls_token", "mask_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= decayed
    assert {"blocks.0.norm1.weight", "blocks.0.attn.qkv.bias", "decoder_pred.bias", "norm.bias"} <= free
    # The frozen position tables belong to neither.
    assert decayed | free == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "pos_embed" not in decayed | free
    assert make_optimizer(model, 0.05).defaults["betas"] == BETAS == (0.9, 0.95)


def test_a_model_without_trainable_parameters():
    layer = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        make_optimizer(layer, 0.1)


def test_the_run_uses_the_schedule(photos, tmp_path):
    pretrain(tiny_config(photos, tmp_path, lr=None, blr=0.5, steps=10, warmup=3, accum=2, min_lr=1e-4))
    peak = 0.5 * 4 * 2 / 256
    expected = [
        peak * s / 3 if s < 3 else 1e-4 + (peak - 1e-4) * (1 + math.cos(math.pi * (s - 3) / 7)) / 2 for s in range(10)
    ]
    assert [float(row["lr"]) for row in rows(tmp_path)] == pytest.approx(expected, rel=1e-12)


def test_weight_decay_and_learning_rate_reach_the_optimizer(photos, tmp_path, monkeypatch):
    """One step with gradient zero moves decaying parameters by the factor 1 - lr * decay and no others."""
    import maefast.train.loop as loop

    seen = {}
    original = loop.Run._step

    def step(self):
        for parameter in self.model.parameters():
            parameter.register_hook(torch.zeros_like) if parameter.requires_grad else None
        before = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        original(self)
        seen.update(
            {name: (before[name], parameter.detach().clone()) for name, parameter in self.model.named_parameters()}
        )

    monkeypatch.setattr(loop.Run, "_step", step)
    pretrain(tiny_config(photos, tmp_path, steps=1, warmup=0, lr=0.1, weight_decay=0.5))
    for name, (before, after) in seen.items():
        factor = 1 - 0.1 * 0.5 if before.ndim > 1 and not name.endswith("pos_embed") else 1
        torch.testing.assert_close(after, before * factor, rtol=1e-6, atol=0)


def test_moments_in_bfloat16_go_on_bit_for_bit_and_take_half(photos, tmp_path, monkeypatch):
    sizes = {}
    for state in ("fp32", "bf16"):
        pretrain(tiny_config(photos, tmp_path / state, optim_state=state))
        file = tmp_path / state / "checkpoints" / "step-00000012" / checkpoint.OPTIMIZER
        moments = [tensor for name, tensor in load_file(file).items() if not name.startswith("step.")]
        sizes[state] = sum(tensor.nbytes for tensor in moments)
    assert sizes["fp32"] == 2 * sizes["bf16"]
    in_two_parts(tiny_config(photos, tmp_path / "parts", optim_state="bf16"), monkeypatch, stop=7)
    assert losses(tmp_path / "parts") == losses(tmp_path / "bf16")
    assert losses(tmp_path / "parts")[:2] == losses(tmp_path / "fp32")[:2]  # the first has a learning rate of 0
    assert losses(tmp_path / "parts") != losses(tmp_path / "fp32")


def test_another_precision_of_the_moments_is_told_when_a_run_goes_on(photos, tmp_path, capsys):
    pretrain(tiny_config(photos, tmp_path, steps=3))
    pretrain(tiny_config(photos, tmp_path, steps=4, optim_state="bf16"))
    assert "optim_state: fp32 -> bf16" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--optim-state must be fp32 or bf16, not 'fp16'"):
        tiny_config(photos, tmp_path, optim_state="fp16").check()
