"""Killed at any moment, resumed with the same command: the losses are those of a run that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maefast.models import create
from maefast.train import CheckpointError, ConfigError, checkpoint, loop, pretrain
from maefast.train.export import export_file
from maefast.train.reconstruct import reconstruct_files
from tests.train import victims
from tests.train.common import assert_equal, in_two_parts, losses, rows, run_process, tensors, tiny_config


@pytest.fixture(scope="module")
def untouched(photos, tmp_path_factory):
    """(step, loss, lr) of a run of 12 steps that nobody disturbs."""
    out = tmp_path_factory.mktemp("untouched")
    assert run_process(victims.train, tiny_config(photos, out, clip=1.0)) == 0
    sequence = losses(out)
    assert len(sequence) == 12
    assert len({loss for _, loss, _ in sequence}) == 12
    return sequence


@pytest.mark.parametrize(
    ("moment", "step", "resumes_at"),
    [
        ("writing tensors", 3, 0),  # the very first checkpoint
        ("writing tensors", 6, 3),
        ("before the rename", 9, 6),
        ("after the rename", 6, 6),
        ("removing an old one", 3, 6),  # step 3 is removed when 6 is there and one is kept
        ("in a step", 8, 6),
    ],
)
def test_killed_and_resumed(moment, step, resumes_at, untouched, photos, tmp_path):
    config = tiny_config(photos, tmp_path, clip=1.0, keep=1 if "removing" in moment else 3)
    assert run_process(victims.train_and_die, config, moment, step) == -signal.SIGKILL
    found, _ = checkpoint.latest(tmp_path / "checkpoints")
    assert (found is None and resumes_at == 0) or found.name == f"step-{resumes_at:08d}"
    assert run_process(victims.train, config) == 0
    text = (tmp_path / "log.txt").read_text()
    assert ("half-written" in text) == (moment in ("writing tensors", "before the rename"))
    assert (f"{resumes_at} steps done" in text) == (resumes_at > 0)
    assert losses(tmp_path) == untouched
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


def test_killed_again_and_again_with_workers(untouched, photos, tmp_path):
    config = tiny_config(photos, tmp_path, clip=1.0, workers=1, save_every=2)
    assert run_process(victims.train_and_die, replace(config, workers=0), "in a step", 3) == -signal.SIGKILL
    assert run_process(victims.train_and_die, config, "in a step", 9) == -signal.SIGKILL
    workers = [int(pid) for pid in (tmp_path / "children.txt").read_text().split()]
    assert len(workers) == (1 if sys.platform == "linux" else 0)
    assert gone_within(30, workers), "a loader worker outlived its killed run"
    assert run_process(victims.train, config) == 0
    assert losses(tmp_path) == untouched


def gone_within(seconds, pids):
    """Whether the processes end (or are zombies that nobody reaps) within so many seconds."""

    def alive(pid):
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    end = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(alive(pid) for pid in pids)


def test_killed_from_outside_at_no_chosen_moment(untouched, photos, tmp_path):
    """SIGKILL to `python -m maefast.cli pretrain` whenever it has logged a few steps, then the same command again."""
    config = tiny_config(photos, tmp_path / "out", clip=1.0)
    path = tmp_path / "config.yaml"
    config.dump(path)
    command = [sys.executable, "-m", "maefast.cli", "pretrain", "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "out" / "metrics.csv"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        time.sleep(0.002)
    process.kill()
    process.wait()
    if process.returncode == 0:
        pytest.fail("the run was over before it could be killed")
    process.stdout.close()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "resuming from" in done.stdout
    assert losses(tmp_path / "out") == untouched


def test_sigterm_finishes_the_step_and_saves(untouched, photos, tmp_path):
    config = tiny_config(photos, tmp_path, clip=1.0, save_every=100)
    assert run_process(victims.train_and_be_told, config, 5, signal.SIGTERM) == 0
    assert checkpoint.latest(tmp_path / "checkpoints")[0].name == "step-00000005"
    assert "stopped by SIGTERM after step 5 of 12" in (tmp_path / "log.txt").read_text()
    assert losses(tmp_path) == untouched[:5]
    assert run_process(victims.train_and_be_told, config, 9, signal.SIGINT) == 0
    assert run_process(victims.train, config) == 0
    assert losses(tmp_path) == untouched


def test_workers_accumulation_and_saving_do_not_change_the_losses(untouched, photos, tmp_path):
    pretrain(tiny_config(photos, tmp_path / "a", clip=1.0, workers=2, save_every=100, cache_mb=0))
    assert losses(tmp_path / "a") == untouched
    # Two micro-batches of 2 are the same samples as one batch of 4; sums are only ordered differently.
    pretrain(tiny_config(photos, tmp_path / "b", clip=1.0, batch_size=2, accum=2))
    for (step, one, lr), (step2, two, lr2) in zip(untouched, losses(tmp_path / "b"), strict=True):
        assert (step, lr) == (step2, lr2)
        assert float(one) == pytest.approx(float(two), rel=1e-5)


def test_finished_run_is_left_alone(photos, tmp_path, capsys):
    config = tiny_config(photos, tmp_path, steps=3)
    first = pretrain(config)
    stamp = first.checkpoint.stat().st_mtime_ns
    again = pretrain(config)
    assert (again.step, again.checkpoint, again.loss) == (3, first.checkpoint, first.loss)
    assert first.checkpoint.stat().st_mtime_ns == stamp
    assert len(rows(tmp_path)) == 3


def test_a_finished_run_keeps_what_it_was_trained_with(photos, tmp_path, capsys):
    config = tiny_config(photos, tmp_path, steps=3)
    pretrain(config)
    before = (tmp_path / "config.yaml").read_text()
    capsys.readouterr()
    pretrain(replace(config, lr=0.5, seed=7, batch_size=2, keep=9, warmup=1.0))
    text = capsys.readouterr().out
    assert (tmp_path / "config.yaml").read_text() == before
    told = [line for line in text.splitlines() if "the run is finished" in line]
    assert len(told) == 1
    assert all(part in told[0] for part in ("lr: 0.01 -> 0.5", "seed: 0 -> 7", "batch_size: 4 -> 2", "is not used"))
    assert "resuming with changed" not in text
    (tmp_path / "config.yaml").unlink()
    pretrain(config)
    assert (tmp_path / "config.yaml").read_text() == before
    pretrain(replace(config, steps=4, lr=0.5))  # which is trained with
    assert "lr: 0.5" in (tmp_path / "config.yaml").read_text()


def test_weights_to_start_from_are_not_passed_over_silently(photos, tmp_path, capsys):
    config = tiny_config(photos, tmp_path / "b", steps=2)
    start = str(pretrain(replace(config, output_dir=str(tmp_path / "a"))).checkpoint)
    pretrain(replace(config, init_from=start))
    capsys.readouterr()
    pretrain(replace(config, init_from=start, steps=3))
    assert "is not used" not in capsys.readouterr().out
    pretrain(replace(config, init_from="other.pth", steps=4))
    assert f"--init-from other.pth is not used: the run in {tmp_path / 'b'} goes on" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [1, 2])
def test_a_checkpoint_that_is_broken_inside(photos, tmp_path, keep):
    config = tiny_config(photos, tmp_path, steps=4, save_every=2, keep=keep)
    path = pretrain(config).checkpoint
    with open(path / checkpoint.MODEL, "r+b") as file:
        file.write(b"\xff" * 8)
    then = "goes on from step-00000002" if keep == 2 else "there is no older one"
    with pytest.raises(CheckpointError, match=f"cannot be read.*Remove the folder {path}; .*{then}"):
        pretrain(replace(config, steps=6))


def test_resume_none_does_not_overwrite_a_run(photos, tmp_path):
    pretrain(tiny_config(photos, tmp_path, steps=3))
    with pytest.raises(ConfigError, match="holds a run at step-00000003"):
        pretrain(tiny_config(photos, tmp_path, steps=3, resume="none"))


def test_going_back_sets_newer_checkpoints_aside(untouched, photos, tmp_path, capsys):
    config = tiny_config(photos, tmp_path, clip=1.0, keep=9)
    pretrain(config)
    config.resume = str(tmp_path / "checkpoints" / "step-00000006")
    pretrain(config)
    assert losses(tmp_path) == untouched
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert [name for name in names if name.startswith("superseded")] == [
        "superseded-0-step-00000009",
        "superseded-0-step-00000012",
    ]
    assert "step-00000012" in names


def test_changed_settings_are_said_and_another_model_is_refused(photos, tmp_path, capsys):
    pretrain(tiny_config(photos, tmp_path, steps=3))
    capsys.readouterr()
    pretrain(tiny_config(photos, tmp_path, steps=6, batch_size=2, weight_decay=0.1))
    text = capsys.readouterr().out
    assert "batch_size: 4 -> 2" in text
    assert "weight_decay: 0.05 -> 0.1" in text
    assert "total steps: 3 -> 6" in text
    assert float(rows(tmp_path)[-1]["epoch"]) == pytest.approx((3 * 4 + 3 * 2) / 10)
    with pytest.raises(CheckpointError, match=r"another model.*depth: 1 -> 2"):
        pretrain(tiny_config(photos, tmp_path, model_args={**tiny_config(photos, tmp_path).model_args, "depth": 2}))
    with pytest.raises(ConfigError, match="only 4"):
        pretrain(tiny_config(photos, tmp_path, steps=4))


def unused_parameters(name, **arguments):
    model = create(name, **arguments)
    model.unused = torch.nn.Linear(3, 3)
    return model


def tied_weights(name, **arguments):
    model = create(name, **arguments)
    model.decoder_blocks[0].norm1.weight = model.blocks[0].norm1.weight
    return model


@pytest.mark.parametrize("make", [unused_parameters, tied_weights])
def test_models_of_one_s_own_go_on(photos, tmp_path, monkeypatch, make):
    """With parameters that never get a gradient, and with one that has two names."""
    whole = tiny_config(photos, tmp_path / "whole", steps=4, save_every=2)
    pretrain(whole, create_model=make)
    in_two_parts(replace(whole, output_dir=str(tmp_path / "parts")), monkeypatch, 3, create_model=make)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert_equal(tensors(tmp_path / "whole", 4), tensors(tmp_path / "parts", 4))


def test_tied_weights_are_read_under_both_names(photos, tmp_path):
    path = pretrain(tiny_config(photos, tmp_path / "out", steps=1), create_model=tied_weights).checkpoint
    found = checkpoint.load_weights(path / checkpoint.MODEL)
    assert torch.equal(found["decoder_blocks.0.norm1.weight"], found["blocks.0.norm1.weight"])
    export_file(tmp_path / "out", tmp_path / "timm.safetensors", "timm")
    exported = checkpoint.load_weights(tmp_path / "timm.safetensors")
    assert torch.equal(exported["blocks.0.norm1.weight"], found["blocks.0.norm1.weight"])
    reconstruct_files(tmp_path / "out", sorted(photos.rglob("*.png"))[:1], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_the_loss_scaler_of_fp16_goes_on(photos, tmp_path, monkeypatch):
    """With a loss scaler that grows every second step. (Real fp16 needs a GPU; the scaler runs on a CPU too.)"""
    make = loop.make_accelerator

    def with_scaler(config):
        accelerator = make(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        return accelerator

    monkeypatch.setattr(loop, "make_accelerator", with_scaler)
    whole = tiny_config(photos, tmp_path / "whole", steps=6, save_every=3, clip=1.0, warmup=0)
    parts = replace(whole, output_dir=str(tmp_path / "parts"))
    pretrain(whole)
    in_two_parts(parts, monkeypatch, 5)
    scalers = [
        checkpoint.read_state(tmp_path / name / "checkpoints" / "step-00000006").scaler for name in ("whole", "parts")
    ]
    assert scalers[0] == scalers[1]
    assert scalers[0]["scale"] == 64.0 * 2**3
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
