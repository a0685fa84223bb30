"""Volumes: the same network on both sides, and a file after every round."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from maefast.bench import machine, volumes
from tests.bench.common import LIMITS


@pytest.fixture(autouse=True)
def light(monkeypatch):
    monkeypatch.setattr(machine, "measure", lambda device, dtypes: LIMITS)


def test_all_networks_are_the_same():
    calls = volumes.runs(1, 32, 0.6, torch.float32, widths=(4, 8))
    values = [float(run()) for run in calls.values()]
    assert len(values) == 3
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_flops_are_those_of_visible_sites():
    """All visible: what torch counts, less the padding that it counts too. 4 of 8 cells: half of that, less what
    crosses to hidden cells."""
    counted = machine.count_flops(volumes.runs(1, 32, 0.0, torch.float32, widths=(4, 8))["dense, contiguous"])
    whole, half = (volumes.needed_flops(1, 32, ratio, widths=(4, 8)) for ratio in (0.0, 0.5))
    assert 0.85 * counted < whole < counted
    assert 0.8 * whole / 2 < half <= whole / 2
    one = nn.Conv3d(1, 8, 1, bias=False)  # counted by hand: every pair is there, and the stem's input has no gradient
    assert machine.count_flops(lambda: one(torch.ones(1, 1, 4, 4, 4)).sum().backward()) == 2 * 2 * 8 * 64


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(volumes, "runs", lambda *args: {name: lambda: torch.ones(()) for name in ("maefast", "dense")})
    arguments = ["--side", "32", "--rounds", "1", "--json", str(tmp_path / "volumes.json")]
    monkeypatch.setattr("sys.argv", ["volumes", *arguments])
    volumes.main()
    assert "x\nresults: " in capsys.readouterr().out
    found = json.loads((tmp_path / "volumes.json").read_text())
    assert [(r["peer"], r["side"]) for r in found["records"]] == [("maefast", 32), ("dense", 32)]
    for record in found["records"]:
        assert record["limit_share"] == pytest.approx(record["flops"] / 1e11 / record["best_s"])
        assert record["peak_bytes"] >= 0
    monkeypatch.setattr(
        volumes, "runs", lambda *args: {"maefast": lambda: torch.ones(()), "dense": lambda: torch.zeros(())}
    )
    with pytest.raises(SystemExit, match="disagree"):
        volumes.main()
