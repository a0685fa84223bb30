"""Two gloo processes with a batch of b see what one process with a batch of 2 b sees."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from maefast.train import checkpoint, pretrain
from tests.train import victims
from tests.train.common import losses, rows, run_together, tiny_config, write_photos


def assert_same_sequence(one, two):
    assert [(step, lr) for step, _, lr in one] == [(step, lr) for step, _, lr in two]
    assert [float(loss) for _, loss, _ in one] == pytest.approx([float(loss) for _, loss, _ in two], rel=1e-5)


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    pretrain(tiny_config(photos, out, batch_size=8, lr=None, blr=0.3, clip=1.0, steps=9))
    return losses(out)


def pair(photos, out, **changes):
    return tiny_config(photos, out, batch_size=4, lr=None, blr=0.3, clip=1.0, steps=9, **changes)


def test_torchrun_equals_one_process(alone, photos, tmp_path):
    config = pair(photos, tmp_path / "out", workers=1)
    config.dump(tmp_path / "config.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "maefast.cli", "pretrain", "--config", str(tmp_path / "config.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert done.stdout.count("finished 9 steps") == 1  # only the main process talks
    assert_same_sequence(losses(tmp_path / "out"), alone)


def test_four_processes(alone, photos, tmp_path):
    config = replace(pair(photos, tmp_path / "out"), batch_size=2)
    assert run_together(victims.train_as, 4, config) == [0] * 4
    assert_same_sequence(losses(tmp_path / "out"), alone)


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_process_that_dies_is_started_again_and_the_run_goes_on(alone, photos, tmp_path, fsdp):
    pair(photos, tmp_path / "out", save_every=2, fsdp=fsdp).dump(tmp_path / "config.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "tests.train.elastic", str(tmp_path / "config.yaml"), "5"]
    # Else torch 2.13 lets processes that were started again look for the dead ones' addresses.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert_same_sequence(losses(tmp_path / "out"), alone)


def test_accumulation_in_two_processes(alone, photos, tmp_path):
    config = replace(pair(photos, tmp_path / "out"), batch_size=2, accum=2)
    assert run_together(victims.train_as, 2, config) == [0, 0]
    assert_same_sequence(losses(tmp_path / "out"), alone)


def test_both_resume_from_the_same_step_also_with_another_number_of_processes(alone, photos, tmp_path):
    config = pair(photos, tmp_path / "out", save_every=2)
    # A signal to one of the two stops both, after the same step.
    assert run_together(victims.train_as, 2, config, told_rank=1, told_at=5) == [0, 0]
    assert checkpoint.latest(tmp_path / "out" / "checkpoints")[0].name == "step-00000005"
    assert "stopped by a signal to another process after step 5 of 9" in (tmp_path / "rank0.txt").read_text()
    single = replace(config, batch_size=8, steps=9)
    pretrain(single)  # the rest by one process, with twice the batch
    assert_same_sequence(losses(tmp_path / "out"), alone)


def test_unreadable_images_of_all_processes_are_reported(tmp_path):
    folder = write_photos(tmp_path / "photos", count=4)
    for i in range(4):
        (folder / f"broken{i}.png").write_bytes(b"broken")
    config = pair(folder, tmp_path / "out", skip_bad=True)
    assert run_together(victims.train_as, 2, config) == [0, 0]
    assert "4 unreadable image(s) met and skipped" in (tmp_path / "rank0.txt").read_text()
    assert len(rows(tmp_path / "out")) == 9
