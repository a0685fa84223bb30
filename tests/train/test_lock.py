"""One run to a folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from maefast.train import ConfigError, lock, loop, pretrain
from maefast.train.finetune import FineTuning
from maefast.train.lock import FolderLock
from tests.train import victims
from tests.train.common import run_together, tiny_config

fcntl = pytest.importorskip("fcntl")


def test_a_second_run_is_refused_and_the_first_goes_on(photos, tmp_path, monkeypatch):
    original, config = loop.Run._step, tiny_config(photos, tmp_path / "out", steps=3)

    def step(self):
        if self.done == 1:
            with pytest.raises(ConfigError, match=rf"out is in use .*\(process {os.getpid()}\); give another --out"):
                pretrain(config)
        original(self)

    monkeypatch.setattr(loop.Run, "_step", step)
    assert pretrain(config).step == 3
    assert not (tmp_path / "out" / lock.NAME).exists()
    assert pretrain(config).step == 3  # and once more, when nobody holds it


def test_all_processes_of_a_second_run_are_told(photos, tmp_path):
    held = FolderLock(tmp_path / "out")
    assert run_together(victims.train_as, 2, tiny_config(photos, tmp_path / "out", batch_size=2)) == [1, 1]
    held.close()


def test_a_run_that_is_refused_leaves_the_lock_to_others(photos, tmp_path):
    with pytest.raises(ConfigError, match="--min-lr"):
        pretrain(tiny_config(photos, tmp_path / "new" / "out", min_lr=1.0))
    assert not (tmp_path / "new").exists()
    FolderLock(tmp_path / "new" / "out").close()


def test_the_option_is_that_of_the_command(tmp_path):
    held = FolderLock(tmp_path)
    with pytest.raises(ConfigError, match=r"give another --output$"):
        FolderLock(tmp_path, FineTuning.folder_option)
    held.close()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_run_holds_nothing(tmp_path):
    """Nor do processes that it forked and that live a little longer."""
    code = "import os, sys, time; from pathlib import Path; from maefast.train.lock import FolderLock; "
    code += "held = FolderLock(Path(sys.argv[1])); os.fork() or time.sleep(60); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], start_new_session=True) as process:
        try:
            while not (tmp_path / lock.NAME).exists() or len(_children(process.pid)) < 1:
                time.sleep(0.01)
            with pytest.raises(ConfigError, match=f"process {process.pid}"):
                FolderLock(tmp_path)
            process.kill()
            process.wait()
            FolderLock(tmp_path).close()
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def _children(pid: int) -> list[str]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


def test_where_there_are_no_locks(photos, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    assert pretrain(tiny_config(photos, tmp_path / "a", steps=1)).step == 1
    monkeypatch.setattr(lock, "fcntl", None)
    assert pretrain(tiny_config(photos, tmp_path / "b", steps=1)).step == 1


def test_another_run_that_ends_meanwhile(tmp_path, monkeypatch):
    """It takes its file away between this one's opening and locking it."""
    original, first = fcntl.flock, FolderLock(tmp_path)

    def flock(*arguments):
        first.close()
        return original(*arguments)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    second = FolderLock(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="in use"):
        FolderLock(tmp_path)
    second.close()
