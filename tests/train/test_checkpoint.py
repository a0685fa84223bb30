"""Checkpoints on their own: what is written, what is kept, what is passed over."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from maefast.models import create
from maefast.train import CheckpointError, checkpoint
from maefast.train.schedule import make_optimizer
from tests.train.common import TINY


def trained(steps=2, seed=0):
    torch.manual_seed(seed)
    model = create("mae", img_size=16, patch_size=4, **TINY)
    optimizer = make_optimizer(model, 0.05)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for _ in range(steps):
        model(torch.randn(2, 3, 16, 16))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state(step, **more):
    return checkpoint.State(step=step, position=step * 8, config={"lr": 0.1}, model_config={"name": "mae"}, **more)


def test_round_trip_is_exact(tmp_path):
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, state(7, extra={"images": 3}), model, optimizer)
    assert path == tmp_path / "step-00000007"
    other, fresh = trained(steps=1, seed=1)
    checkpoint.restore(path, other, fresh)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    before, after = optimizer.state_dict(), fresh.state_dict()
    assert before["state"].keys() == after["state"].keys()
    for index, slots in before["state"].items():
        for kind, value in slots.items():
            assert torch.equal(value, after["state"][index][kind]), (index, kind)
            assert value.dtype == after["state"][index][kind].dtype
    assert checkpoint.read_state(path) == state(7, extra={"images": 3})


def test_before_the_first_step_the_optimizer_has_no_tensors(tmp_path):
    model, optimizer = trained(steps=0)
    path = checkpoint.save(tmp_path, state(0), model, optimizer)
    other, fresh = trained(steps=0, seed=1)
    checkpoint.restore(path, other, fresh)
    assert not fresh.state_dict()["state"]


def test_optimizer_state_is_there_for_what_had_a_gradient(tmp_path):
    """A parameter that had none yet may lack it, others may not."""
    model, optimizer = trained(steps=0)
    model(torch.randn(2, 3, 16, 16))[0].backward()
    model.mask_token.grad = None
    optimizer.step()
    path = checkpoint.save(tmp_path, state(1), model, optimizer)
    other, fresh = trained(steps=1, seed=1)
    checkpoint.restore(path, other, fresh)
    assert fresh.state[other.mask_token] == {}
    assert torch.equal(fresh.state[other.cls_token]["exp_avg"], optimizer.state[model.cls_token]["exp_avg"])
    moments = load_file(path / "optimizer.safetensors")
    save_file(
        {name: moment for name, moment in moments.items() if "cls_token" not in name}, path / checkpoint.OPTIMIZER
    )
    with pytest.raises(CheckpointError, match=r"differ in \['cls_token'\]"):
        checkpoint.restore(path, other, fresh)
    save_file({**moments, "step.nothing": torch.zeros(())}, path / checkpoint.OPTIMIZER)
    with pytest.raises(CheckpointError, match=r"differ in \['nothing'\]"):
        checkpoint.restore(path, other, fresh)
    save_file(moments, path / checkpoint.OPTIMIZER)
    document = json.loads((path / "state.json").read_text())
    assert document.pop("without_optimizer_state") == ["mask_token"]
    (path / "state.json").write_text(json.dumps(document))  # as older versions wrote it
    with pytest.raises(CheckpointError, match=r"differ in \['mask_token'\]"):
        checkpoint.restore(path, other, fresh)


def test_files_are_plain_safetensors_and_json(tmp_path):
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, state(1), model, optimizer)
    assert sorted(file.name for file in path.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert set(load_file(path / "model.safetensors")) == set(model.state_dict())
    moments = load_file(path / "optimizer.safetensors")
    assert {"exp_avg.cls_token", "exp_avg_sq.blocks.0.attn.qkv.weight", "step.norm.bias"} <= set(moments)
    document = json.loads((path / "state.json").read_text())
    assert document["step"] == 1
    assert document["files"]["model.safetensors"] == (path / "model.safetensors").stat().st_size


def test_scaler_state_survives(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)
    model, optimizer = trained()
    loss = scaler.scale(model(torch.randn(2, 3, 16, 16))[0])
    loss.backward()
    scaler.step(optimizer)
    scaler.update(new_scale=512.0)
    path = checkpoint.save(tmp_path, state(1, scaler=scaler.state_dict()), model, optimizer)
    other = torch.amp.GradScaler("cpu")
    other.load_state_dict(checkpoint.read_state(path).scaler)
    assert other.state_dict() == scaler.state_dict()
    assert other.get_scale() == 512.0


def test_last_k_are_kept(tmp_path):
    model, optimizer = trained()
    for step in (2, 4, 6, 8):
        checkpoint.save(tmp_path, state(step), model, optimizer, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006", "step-00000008"]


def test_a_broken_newer_one_never_costs_a_good_one(tmp_path):
    model, optimizer = trained()
    checkpoint.save(tmp_path, state(8), model, optimizer, keep=1)
    (tmp_path / "step-00000008" / "model.safetensors").unlink()
    checkpoint.save(tmp_path, state(6), model, optimizer, keep=1)
    assert checkpoint.latest(tmp_path)[0].name == "step-00000006"
    checkpoint.save(tmp_path, state(8), model, optimizer, keep=1)  # the run reaches the broken one's step
    assert checkpoint.latest(tmp_path) == (tmp_path / "step-00000008", [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


def test_a_newer_one_never_costs_the_one_just_written(tmp_path):
    model, optimizer = trained()
    for step in (8, 4, 6):
        path = checkpoint.save(tmp_path, state(step), model, optimizer, keep=1)
        assert path.is_dir()
    assert [step for step, _ in checkpoint.listing(tmp_path)] == [6, 8]


def damage_missing(path):
    (path / "state.json").unlink()


def damage_cut(path):
    file = path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def damage_json(path):
    (path / "state.json").write_text('{"step": 6, "fil')


def damage_empty(path):
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_missing, "state.json is missing"),
        (damage_cut, r"optimizer.safetensors has \d+ bytes instead of \d+"),
        (damage_json, "state.json cannot be read"),
        (damage_empty, "state.json is missing"),
    ],
)
def test_broken_checkpoints_are_passed_over_and_named(tmp_path, damage, reason):
    model, optimizer = trained()
    for step in (3, 6):
        checkpoint.save(tmp_path, state(step), model, optimizer)
    (tmp_path / "step-00000009.txt").touch()
    damage(tmp_path / "step-00000006")
    found, (note,) = checkpoint.latest(tmp_path)
    assert found.name == "step-00000003"
    assert "ignoring" in note
    assert "step-00000006" in note
    with pytest.raises(CheckpointError, match=reason):
        checkpoint.read_state(tmp_path / "step-00000006")


def test_another_model_and_garbage_are_refused(tmp_path):
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, state(1), model, optimizer)
    torch.manual_seed(0)
    wider = create("mae", img_size=16, patch_size=4, **{**TINY, "embed_dim": 32})
    with pytest.raises(CheckpointError, match="does not fit the model"):
        checkpoint.restore(path, wider, make_optimizer(wider, 0.05))
    size = (path / "model.safetensors").stat().st_size
    (path / "model.safetensors").write_bytes(b"\xff" * size)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.restore(path, model, optimizer)
