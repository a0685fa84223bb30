"""`maefast data-speed`: what is said of what was measured, and that it is measured."""

from __future__ import annotations

import os

import pytest

from maefast.train import ConfigError
from maefast.train.data_speed import DataSpeed, data_speed
from tests.train.common import tiny_config


@pytest.mark.parametrize(
    ("given", "taken", "cores", "said"),
    [
        ({0: 100.0, 4: 380.0}, 95.0, 8, "the step is the bottleneck: the data keep up with 4.0 times as much"),
        ({0: 100.0, 2: 190.0}, 450.0, 8, "the data are the bottleneck: --workers 5 would keep up"),
        ({0: 100.0, 2: 190.0}, 4500.0, 8, "they would need 45 cores, and this machine has 8"),
        ({0: 100.0}, 99.0, 1, "the step is the bottleneck"),
    ],
)
def test_what_is_said(given, taken, cores, said):
    lines = DataSpeed("image", given, taken, 0.5).lines(cores)
    assert lines[0] == "no worker: 100 images/s"
    assert lines[-2] == f"a step: {taken:.0f} images/s (500 ms)"
    assert said in lines[-1]


def test_a_source_is_measured(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = []
    config = tiny_config(photos, tmp_path / "out", workers=1, batch_size=4)
    found = data_speed(config, 0.2, lines.append)
    assert sorted(found.given) == [0, 1]
    assert min(found.given.values()) > 0
    assert found.taken == pytest.approx(4 / found.seconds)
    assert "10 images of" in lines[0]
    assert lines[-4].startswith("no worker: ")
    assert not list(tmp_path.iterdir())  # nothing is written


def test_a_folder_that_nothing_is_written_to_need_not_be_one(photos, tmp_path, monkeypatch):
    from maefast.train.profiling import profile_run

    monkeypatch.setattr(os, "access", lambda *_: False)
    config = tiny_config(photos, tmp_path / "out", batch_size=4)
    with pytest.raises(ConfigError, match="may not be written to"):
        config.check()
    assert data_speed(config, 0.05, str).taken > 0
    profile_run(config, 1, say=str)


def test_bad_options(photos, tmp_path):
    for seconds in (0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="--seconds must be above 0 and finite"):
            data_speed(tiny_config(photos, tmp_path), seconds)
    with pytest.raises(ConfigError, match="no such folder"):
        data_speed(tiny_config("nowhere", tmp_path), 1)
