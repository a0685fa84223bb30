"""What ends a run early from within or by a scheduler: all that was trained is saved, and the same command goes on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from maefast import seeds
from maefast.data.images.files import find_images
from maefast.recipes.masked_images import MaskedImages as Objective
from maefast.train import BadImage, ConfigError, checkpoint, pretrain
from maefast.train.loop import Run
from tests.train import victims
from tests.train.common import (
    CREATORS,
    convnet_config,
    losses,
    rows,
    run_process,
    run_together,
    tiny_config,
    write_photos,
)


@pytest.fixture
def folder(tmp_path):
    return write_photos(tmp_path / "photos")


def break_image(folder: Path, seed: int, position: int) -> tuple[Path, bytes]:
    """Damage the image that the run reads at `position` of its first epoch."""
    images = find_images(folder)
    path = Path(images.path(int(seeds.permutation(seed, 0, len(images))[position])))
    content = path.read_bytes()
    path.write_bytes(b"broken")
    return path, content


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_loses_no_step(folder, tmp_path, workers, capsys):
    config = tiny_config(folder, tmp_path / "whole", save_every=100, workers=workers)
    pretrain(config)
    config.output_dir = str(tmp_path / "out")
    path, content = break_image(folder, config.seed, 9)  # in the third batch of four
    with pytest.raises(BadImage, match=path.name):
        pretrain(config)
    assert [row["step"] for row in rows(tmp_path / "out")] == ["1", "2"]
    assert checkpoint.latest(tmp_path / "out" / "checkpoints")[0].name == "step-00000002"
    assert "stopped after step 2 of 12, saved as" in capsys.readouterr().out
    with pytest.raises(BadImage):  # nothing is lost by trying again, and nothing trained twice
        pretrain(config)
    assert len(rows(tmp_path / "out")) == 2
    path.write_bytes(content)
    pretrain(config)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_in_the_first_batch_nothing_is_left(folder, tmp_path):
    config = tiny_config(folder, tmp_path / "out", save_every=100)
    break_image(folder, config.seed, 0)
    with pytest.raises(BadImage):
        pretrain(config)
    assert checkpoint.latest(tmp_path / "out" / "checkpoints")[0] is None


def test_in_a_later_micro_batch_no_buffer_moves(folder, tmp_path):
    """Batch norms keep statistics in the forward: half a step would leave its traces in them."""
    config = convnet_config("toy_spark", folder, tmp_path / "whole", batch_size=2, accum=2, save_every=100)
    pretrain(config, create_model=CREATORS["toy_spark"])
    config.output_dir = str(tmp_path / "out")
    path, content = break_image(folder, config.seed, 7)  # the second half of the second step
    with pytest.raises(BadImage):
        pretrain(config, create_model=CREATORS["toy_spark"])
    assert checkpoint.latest(tmp_path / "out" / "checkpoints")[0].name == "step-00000001"
    path.write_bytes(content)
    pretrain(config, create_model=CREATORS["toy_spark"])
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_in_one_of_two_processes(folder, tmp_path):
    """Both save, stop and say why; neither waits for the other for ever."""
    config = tiny_config(folder, tmp_path / "whole" / "out", batch_size=2, save_every=100)
    (tmp_path / "whole").mkdir()
    assert run_together(victims.train_as, 2, config) == [0, 0]
    config.output_dir = str(tmp_path / "out")
    path, content = break_image(folder, config.seed, 7)  # the second process reads it in step 2
    assert run_together(victims.train_as, 2, config) == [1, 1]
    assert checkpoint.latest(tmp_path / "out" / "checkpoints")[0].name == "step-00000001"
    assert "stopped after step 1 of 12, saved as" in (tmp_path / "rank0.txt").read_text()
    path.write_bytes(content)
    assert run_together(victims.train_as, 2, config) == [0, 0]
    assert losses(tmp_path / "out") == losses(tmp_path / "whole" / "out")


def test_whatever_the_loader_meets(folder, tmp_path, monkeypatch):
    """A worker that was killed for its memory, a disk that is gone: any error of the loader."""
    from maefast.train.data import Loader

    original, calls = Loader.next, []

    def next_(self):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        return original(self)

    monkeypatch.setattr(Loader, "next", next_)
    config = tiny_config(folder, tmp_path / "out", save_every=100)
    with pytest.raises(RuntimeError, match="killed by signal"):
        pretrain(config)
    assert checkpoint.latest(tmp_path / "out" / "checkpoints")[0].name == "step-00000005"
    pretrain(config)
    assert len(rows(tmp_path / "out")) == 12


@pytest.mark.parametrize("moment", ["in a step", "between steps"])
def test_a_loader_process_that_is_killed(folder, tmp_path, moment):
    """As by the kernel, for its memory: torch's handler would raise in mid-step, and the steps so far were lost."""
    config = tiny_config(folder, tmp_path / "whole", save_every=100, workers=1, steps=30)
    pretrain(config)
    config.output_dir = str(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        forward, step = Objective.forward, Run._step
        current = []

        def kill_worker():
            for worker in current[0].loader._iterator._workers:
                os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.2)  # in which the news of its death arrives

        def forward_(self, *args):
            if current[0].done == 4 and moment == "in a step":
                kill_worker()
            return forward(self, *args)

        def step_(self):
            current[:] = [self]
            step(self)
            if self.done == 5 and moment == "between steps":
                kill_worker()

        patch.setattr(Objective, "forward", forward_)
        patch.setattr(Run, "_step", step_)
        with pytest.raises(RuntimeError, match=r"a process that loads images was lost.*DataLoader worker"):
            pretrain(config)
    saved = checkpoint.latest(tmp_path / "out" / "checkpoints")[0]
    assert saved is not None
    assert int(saved.name.removeprefix("step-")) >= 5
    pretrain(config)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_a_worker_outlives_sigterm_for_a_while(folder, tmp_path):
    """SIGTERM to the whole group: the main process finishes its step, for which it needs its workers."""
    config = tiny_config(folder, tmp_path / "whole", save_every=100, workers=1)
    assert run_process(victims.train, config) == 0
    config.output_dir = str(tmp_path / "out")
    assert run_process(victims.train_and_be_told_as_a_group, config, 5, signal.SIGTERM, 1) == 0
    assert checkpoint.latest(tmp_path / "out" / "checkpoints")[0].name == "step-00000005"
    assert "stopped by SIGTERM after step 5 of 12" in (tmp_path / "out" / "log.txt").read_text()
    assert run_process(victims.train, config) == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_a_run_that_fails_ends_at_once(folder, tmp_path):
    """With the error in hand, which holds the loader, its processes are ended all the same."""
    config = tiny_config(folder, tmp_path / "out", workers=2)
    break_image(folder, config.seed, 5)
    began = time.perf_counter()
    with pytest.raises(BadImage) as error:
        pretrain(config)
    assert time.perf_counter() - began < 30
    assert error.value.path.exists()
    children = [Path(f"/proc/{pid}/comm") for pid in children_of(os.getpid())]
    assert not [path for path in children if path.exists() and "pt_data_worker" in path.read_text()]


def children_of(pid: int) -> list[str]:
    path = Path(f"/proc/self/task/{pid}/children")
    return path.read_text().split() if path.exists() else []


def test_the_handler_of_signals_is_put_back(folder, tmp_path):
    before = signal.getsignal(signal.SIGCHLD)
    pretrain(tiny_config(folder, tmp_path / "out", workers=1, steps=2))
    after = signal.getsignal(signal.SIGCHLD)
    assert after is before or "torch" in after.__module__  # torch's own, which it sets once for a process


def test_another_number_of_processes_is_told(folder, tmp_path, capsys):
    config = tiny_config(folder, tmp_path / "out", steps=2, batch_size=2)
    pretrain(config)
    config.batch_size, config.steps = 4, 3
    pretrain(config)
    text = capsys.readouterr().out
    assert "images per step: 2 -> 4 (1 -> 1 processes)" in text


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
@pytest.mark.parametrize("workers", [0, 1])
def test_the_signal_of_schedulers(folder, tmp_path, workers):
    """SIGUSR1, sent to the whole group as SLURM does, saves and stops; it may come twice."""
    config = tiny_config(folder, tmp_path / "whole", save_every=100, workers=workers)
    assert run_process(victims.train, config) == 0
    config.output_dir = str(tmp_path / "out")
    assert run_process(victims.train_and_be_told_as_a_group, config, 5, signal.SIGUSR1) == 0
    assert checkpoint.latest(tmp_path / "out" / "checkpoints")[0].name == "step-00000005"
    assert "stopped by SIGUSR1 after step 5 of 12" in (tmp_path / "out" / "log.txt").read_text()
    assert run_process(victims.train, config) == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_a_second_sigterm_acts_as_usual(folder, tmp_path):
    from maefast.train.signals import StopSignal

    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) is before
        assert signal.getsignal(signal.SIGINT) == stop._handle  # another one still only asks
    assert signal.getsignal(signal.SIGINT) is not None


def test_what_the_first_signal_says(capfd):
    from maefast.train.signals import StopSignal

    for number, told in ((signal.SIGINT, "; press again to stop at once without saving"), (signal.SIGTERM, "")):
        with StopSignal(tell=True):
            os.kill(os.getpid(), number)
        assert capfd.readouterr().err.strip() == f"stopping after this step and saving{told}"
    with StopSignal():  # of a process beside the main one
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_an_output_folder_that_cannot_be_one_is_refused_at_once(folder, tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(ConfigError, match=r"--output-dir .*: .*file is not a folder"):
            pretrain(tiny_config(folder, tmp_path / name))
    if os.geteuid():  # root may write anywhere
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        with pytest.raises(ConfigError, match="may not be written"):
            pretrain(tiny_config(folder, closed / "out"))
