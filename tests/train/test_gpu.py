"""The loop on a GPU: precisions, resuming, pinned batches, losses read from the device now and then."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from maefast.train import checkpoint, loop, pretrain
from tests.train.common import CREATORS, convnet_config, in_two_parts, losses, rows, tiny_config

pytestmark = pytest.mark.gpu


def column(out):
    return [float(row["loss"]) for row in rows(out)]


@pytest.mark.parametrize(("amp", "tolerance"), [("no", 1e-3), ("bf16", 3e-2), ("fp16", 3e-2)])
def test_losses_are_near_those_of_the_cpu(photos, tmp_path, amp, tolerance):
    common = {"steps": 12, "lr": 1e-4, "clip": 1.0, "log_every": 5, "workers": 1}
    pretrain(tiny_config(photos, tmp_path / "cpu", **common))
    result = pretrain(tiny_config(photos, tmp_path / "gpu", device="auto", amp=amp, picture_rows=2, **common))
    assert column(tmp_path / "gpu") == pytest.approx(column(tmp_path / "cpu"), rel=tolerance)
    assert [int(row["step"]) for row in rows(tmp_path / "gpu")] == list(range(1, 13))
    assert (tmp_path / "gpu" / "reconstruction.png").exists()
    assert (checkpoint.read_state(result.checkpoint).scaler is not None) == (amp == "fp16")


@pytest.mark.parametrize("amp", ["no", "fp16"])
def test_a_run_in_two_parts(photos, tmp_path, monkeypatch, amp):
    whole = tiny_config(photos, tmp_path / "whole", device="auto", amp=amp, save_every=4, clip=1.0)
    parts = replace(whole, output_dir=str(tmp_path / "parts"))
    pretrain(whole)
    in_two_parts(parts, monkeypatch, 6)
    assert [row[0] for row in losses(tmp_path / "parts")] == [row[0] for row in losses(tmp_path / "whole")]
    # torch's own GPU kernels do not promise the same bits twice, so nearly equal is what can be asked for.
    assert column(tmp_path / "parts") == pytest.approx(column(tmp_path / "whole"), rel=1e-3)


@pytest.mark.parametrize("changes", [{}, {"accum": 2, "clip": 1.0, "amp": "bf16"}])
def test_as_a_graph(photos, tmp_path, changes, capsys):
    for name in ("off", "on"):
        pretrain(tiny_config(photos, tmp_path / name, device="auto", graph=name, picture_every=5, workers=1, **changes))
    assert "as a CUDA graph" in capsys.readouterr().out
    assert column(tmp_path / "on") == pytest.approx(column(tmp_path / "off"), rel=3e-2 if changes else 1e-3)


@pytest.mark.parametrize("kind", ["fcmae", "toy_spark"])
def test_convnets_as_a_graph(photos, tmp_path, kind):
    for name in ("off", "on"):
        config = convnet_config(kind, photos, tmp_path / name, device="auto", graph=name)
        pretrain(config, create_model=CREATORS.get(kind))
    assert column(tmp_path / "on") == pytest.approx(column(tmp_path / "off"), rel=1e-2)


@pytest.mark.parametrize("graph", ["off", "on"])
@pytest.mark.parametrize("kind", ["mae", "fcmae"])
def test_a_step_never_waits_for_the_device(photos, tmp_path, monkeypatch, graph, kind):
    original = loop.Run._step

    def step(self):
        quiet = self.done not in (0, 3)  # kernels are compiled, the graph is captured
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")
        try:
            original(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop.Run, "_step", step)
    make = tiny_config if kind == "mae" else lambda *args, **more: convnet_config("fcmae", *args, **more)
    pretrain(make(photos, tmp_path, device="auto", graph=graph, clip=1.0, amp="bf16", steps=8, workers=1))
