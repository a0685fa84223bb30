from __future__ import annotations

import json

import pytest
import torch

from maefast.bench import volumes


def test_all_networks_are_the_same():
    calls = volumes.runs(1, 32, 0.6, torch.float32, widths=(4, 8))
    values = [float(run()) for run in calls.values()]
    assert len(values) == 3
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(volumes, "runs", lambda *args: {name: lambda: torch.ones(()) for name in ("maefast", "dense")})
    arguments = ["--side", "32", "--rounds", "1", "--json", str(tmp_path / "volumes.json")]
    monkeypatch.setattr("sys.argv", ["volumes", *arguments])
    volumes.main()
    assert "x\nresults: " in capsys.readouterr().out
    found = json.loads((tmp_path / "volumes.json").read_text())
    assert [(r["peer"], r["side"]) for r in found["records"]] == [("maefast", 32), ("dense", 32)]
    monkeypatch.setattr(
        volumes, "runs", lambda *args: {"maefast": lambda: torch.ones(()), "dense": lambda: torch.zeros(())}
    )
    with pytest.raises(SystemExit, match="disagree"):
        volumes.main()
