"""`--graph`: the same run with and without, on a CPU with a tape in place of a CUDA graph; and where it cannot be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from maefast.graphs import capture
from maefast.train import ConfigError, TrainError, checkpoint, graph, pretrain, schedule
from tests.graphs.tape import FakeRecorder
from tests.recipes import test_dmae
from tests.train.common import CREATORS, convnet_config, in_two_parts, losses, rows, tiny_config

TOY = test_dmae.TestDMAE()  # its loss has two parts


@pytest.fixture
def taped(monkeypatch):
    """Captures on a CPU; a graph's learning rate is float32, so that of the plain runs is rounded, too."""
    recorders = []

    def recorder(*arguments):
        recorders.append(FakeRecorder(*arguments))
        return recorders[-1]

    monkeypatch.setattr(capture, "recorder", recorder)
    monkeypatch.setattr(graph, "problem", lambda *_: None)
    original = schedule.Schedule.__call__
    monkeypatch.setattr(schedule.Schedule, "__call__", lambda self, step: float(np.float32(original(self, step))))
    return recorders


def norms(out):
    return [row["grad_norm"] for row in rows(out)]


def equal_runs(a, b) -> None:
    assert losses(a) == losses(b)
    assert norms(a) == norms(b)
    first, second = (checkpoint.latest(out / "checkpoints")[0] for out in (a, b))
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = checkpoint.load_weights(first / name), checkpoint.load_weights(second / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.parametrize("changes", [{"recompute": True}, {"clip": 0.5, "accum": 3}, {"amp": "bf16", "clip": 1.0}])
def test_the_run_is_the_same(photos, tmp_path, taped, changes, capsys):
    for name in ("off", "auto"):
        pretrain(tiny_config(photos, tmp_path / name, graph=name, picture_every=5, picture_rows=2, **changes))
        assert ("as a CUDA graph" in capsys.readouterr().out) == (name == "auto")
    assert taped[0].events == ["run"] * 3 + ["record"] + ["replay"] * 9
    assert len(taped) == 1
    equal_runs(tmp_path / "off", tmp_path / "auto")


def test_parts_of_the_loss(tmp_path, taped):
    for name in ("off", "on"):
        pretrain(TOY.config(tmp_path / name, graph=name, accum=2))
    assert taped[0].events.count("replay") == 3
    equal_runs(tmp_path / "off", tmp_path / "on")
    terms = [[(row["loss/pixels"], row["loss/features"]) for row in rows(tmp_path / name)] for name in ("off", "on")]
    assert terms[0] == terms[1]
    assert len(set(terms[0])) == 6


@pytest.mark.parametrize("kind", ["fcmae", "toy_spark"])
def test_convnets(photos, tmp_path, taped, kind):
    """Batch norms, and stochastic depth drawn from the seed of the step. A net of one's own asks for a graph."""
    for name in ("off", "on"):
        pretrain(convnet_config(kind, photos, tmp_path / name, graph=name), create_model=CREATORS.get(kind))
    assert taped[0].events.count("replay") == 3
    equal_runs(tmp_path / "off", tmp_path / "on")


def test_resuming(photos, tmp_path, taped, monkeypatch):
    whole = tiny_config(photos, tmp_path / "whole", save_every=5, clip=1.0)
    pretrain(replace(whole, graph="off"))
    parts = replace(whole, output_dir=str(tmp_path / "parts"))
    in_two_parts(parts, monkeypatch, 6)
    equal_runs(tmp_path / "whole", tmp_path / "parts")
    assert [recorder.events.count("replay") for recorder in taped] == [3, 4]


def fail(self, function):
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_capture_that_fails(photos, tmp_path, taped, monkeypatch, capsys):
    pretrain(tiny_config(photos, tmp_path / "off", graph="off", accum=2, clip=1.0))
    monkeypatch.setattr(FakeRecorder, "record", fail)
    pretrain(tiny_config(photos, tmp_path / "auto", accum=2, clip=1.0))
    assert "going on without a CUDA graph: the step cannot be captured" in capsys.readouterr().out
    equal_runs(tmp_path / "off", tmp_path / "auto")
    with pytest.raises(TrainError, match=r"--graph on: the step cannot be captured.*\.item"):
        pretrain(tiny_config(photos, tmp_path / "on", graph="on"))


def test_where_it_cannot_be(photos, tmp_path):
    with pytest.raises(ConfigError, match=r"--graph on: .* needs a CUDA device, and this run is on the cpu"):
        pretrain(tiny_config(photos, tmp_path / "on", graph="on"))
    with pytest.raises(ConfigError, match="--graph must be auto, on or off, not 'yes'"):
        pretrain(tiny_config(photos, tmp_path / "yes", graph="yes"))
    assert not any(tmp_path.iterdir())
    for name in ("auto", "off"):
        pretrain(tiny_config(photos, tmp_path / name, graph=name, clip=1.0))
    equal_runs(tmp_path / "auto", tmp_path / "off")


def test_reasons():
    class Fake:
        device, num_processes = torch.device("cuda"), 1

    config = tiny_config("photos", "out")
    assert graph.problem(config, Fake) is None
    assert "--amp bf16 needs none" in graph.problem(replace(config, amp="fp16"), Fake)
    Fake.num_processes = 4
    assert "it is for one process, and 4 train together" in graph.problem(config, Fake)


def test_a_model_of_ones_own_and_one_that_has_hooks(photos, tmp_path, taped, monkeypatch):
    def create(name, **arguments):
        from maefast.models import create

        return create(name, **arguments)

    pretrain(tiny_config(photos, tmp_path / "own", steps=1), create_model=create)
    assert not taped  # it may throw dice on the host
    original = schedule.make_optimizer

    def make_optimizer(*arguments):
        optimizer = original(*arguments)
        optimizer.register_step_post_hook(lambda *_: None)
        return optimizer

    monkeypatch.setattr(schedule, "make_optimizer", make_optimizer)
    pretrain(tiny_config(photos, tmp_path / "auto", steps=1))
    assert not taped
    with pytest.raises(ConfigError, match=r"--graph on: .* step post-hook"):
        pretrain(tiny_config(photos, tmp_path / "on", steps=1, graph="on"))
