"""examples/demo.py: it runs, and trains the model that the benchmark behind it times."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from maefast.models import create
from maefast.train.image_models import build_model
from tests.train.common import rows

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("skimage")


@pytest.fixture
def demo():
    spec = importlib.util.spec_from_file_location("maefast_demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_few_steps_leave_everything(demo, tmp_path, monkeypatch, capsys):
    arguments = ["demo.py", "--steps", "2", "--output-dir", str(tmp_path / "demo"), "--no-bench"]
    monkeypatch.setattr(sys, "argv", arguments)
    for _ in range(2):  # the second time there is nothing left to train
        assert demo.main() == 0
        text = capsys.readouterr().out
        assert "after 2 steps" in text
        assert "which of 10 photographs is a crop of? 320 crops" in text
        assert all(re.search(rf"^  {name} +\d+\.\d%", text, re.MULTILINE) for name in ("pre-trained", "random weights"))
    assert len(rows(tmp_path / "demo")) == 2
    for name in ("reconstruction.png", "loss_curve.png", "metrics.csv", "checkpoints/step-00000002/model.safetensors"):
        assert (tmp_path / "demo" / name).is_file()


def test_the_benchmark_times_this_model(demo, tmp_path):
    from maefast.bench.step import PRESETS

    config = demo.demo_config(tmp_path, 1000)
    config.check()
    timed = create(**PRESETS["demo"]["model"])
    assert PRESETS["demo"]["batch"] == config.batch_size
    trained = build_model(config).config
    # The benchmark normalises the targets; the demo does not, since its pictures need colours.
    assert {**trained, "norm_pix_loss": True} == {**timed.config, "norm_pix_loss": True}
