"""`--wandb`, against a package that writes down what it is asked for, and the real one where it is installed."""

from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace

import pytest

from maefast.errors import ConfigError, TrainError
from maefast.train.loop import pretrain

from .common import rows, tiny_config


class Run:
    def __init__(self, breaks_at: int | None = None) -> None:
        self.history, self.finished, self._breaks_at = {}, 0, breaks_at

    def log(self, values, step):
        if step == self._breaks_at:
            raise ConnectionError("no network")
        self.history.setdefault(step, {}).update(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    """started: what `init` was given, call by call."""
    made = SimpleNamespace(started=[], run=Run(), Image=list)

    def init(**options):
        made.started.append(options)
        return made.run

    made.init = init
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def test_numbers_and_pictures_of_one_run_that_goes_on(photos, tmp_path, wandb):
    pretrain(tiny_config(photos, tmp_path, steps=4, wandb="masked", picture_rows=2))
    pretrain(tiny_config(photos, tmp_path, steps=6, wandb="masked"))
    first, second = wandb.started
    assert (first["project"], first["name"]) == ("masked", tmp_path.name)
    assert first["config"]["steps"] == 4
    assert (second["id"], second["resume"]) == (first["id"], "allow")
    assert wandb.run.finished == 2
    written = [values["train/loss"] for values in wandb.run.history.values()]
    assert list(wandb.run.history) == list(range(1, 7))
    assert written == pytest.approx([float(row["loss"]) for row in rows(tmp_path)])
    assert "reconstruction" in wandb.run.history[4]
    shutil.rmtree(tmp_path / "checkpoints")  # a run that starts anew is another one
    pretrain(tiny_config(photos, tmp_path, steps=1, wandb="masked"))
    assert wandb.started[2]["id"] != first["id"]


def test_what_fails_on_the_way_ends_the_logging_alone(photos, tmp_path, wandb, capsys):
    wandb.run = Run(breaks_at=3)
    assert pretrain(tiny_config(photos, tmp_path, steps=5, wandb="masked")).step == 5
    assert list(wandb.run.history) == [1, 2]
    assert capsys.readouterr().out.count("wandb failed, and gets no more of this run: no network") == 1


def test_what_fails_at_the_start_stops_before_training(photos, tmp_path, wandb):
    def init(**options):
        raise RuntimeError("api_key not configured")

    wandb.init = init
    with pytest.raises(ConfigError, match=r"--wandb masked: api_key not configured .*WANDB_MODE=offline"):
        pretrain(tiny_config(photos, tmp_path, steps=1, wandb="masked"))
    assert not list(tmp_path.glob("checkpoints/*"))


def test_without_the_package(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrainError, match=r"maefast\[wandb\]"):
        pretrain(tiny_config(photos, tmp_path, steps=1, wandb="masked"))


def test_the_package_itself_without_network(photos, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    pretrain(tiny_config(photos, tmp_path, steps=2, wandb="masked", picture_rows=1))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
